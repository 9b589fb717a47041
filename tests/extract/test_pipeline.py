"""The extraction loop's warning about a busy CPU."""

import logging

import pytest

from llava_twophase.cpu import CpuUsage
from llava_twophase.extract import pipeline
from llava_twophase.extract.timings import Timings


class Meter:
    def __init__(self, usage):
        self._usage = usage

    def usage(self, idle, threads):
        assert idle == 5 and threads >= 1
        return self._usage


@pytest.mark.parametrize(("waited", "workers", "warns"), [(16, 4, True), (16, 0, True), (0, 4, False)])
def test_extract_warns_early_if_the_cpu_is_shared(waited, workers, warns, caplog):
    timings = Timings(waiting_for_images=2, waiting_for_disk=3, cpu=CpuUsage(wall=1, received=1, waited=0))
    with caplog.at_level(logging.WARNING):
        usage = CpuUsage(wall=20, received=7, waited=waited)
        pipeline._warn_if_starved(Meter(usage), timings, pipeline.Options(batch_size=2, num_workers=workers))
    assert [("received 33% of the CPU" in message) for message in caplog.messages] == [True] * warns
    assert ("lower --num_workers" in caplog.text) == (warns and workers > 0)
