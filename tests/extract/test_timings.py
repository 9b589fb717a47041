"""The step that limits a run, and the advice that follows."""

import pytest

from llava_twophase.cpu import CpuUsage
from llava_twophase.extract.timings import Timings

STARVED = CpuUsage(wall=10, received=4, waited=16)


@pytest.mark.parametrize(
    ("timings", "bound"),
    [
        (Timings(total=10, waiting_for_images=1, waiting_for_disk=1), "tower"),
        (Timings(total=10, waiting_for_images=7, decode=50, read=2), "decode"),
        (Timings(total=10, waiting_for_images=7, decode=2, read=50), "read"),
        (Timings(total=10, waiting_for_images=1, waiting_for_disk=6), "disk"),
        (Timings(total=10, cpu=STARVED), "cpu"),
        (Timings(total=10, waiting_for_images=7, decode=50, read=2, cpu=STARVED), "cpu"),
        (Timings(total=10, waiting_for_images=7, decode=2, read=50, cpu=STARVED), "read"),
        (Timings(total=10, waiting_for_images=1, waiting_for_disk=6, cpu=STARVED), "disk"),
    ],
)
def test_timings_bound_by(timings, bound):
    assert timings.bound_by() == bound
    assert f"bound by: {bound}; " in timings.describe()


def test_timings_describe_says_what_to_set_if_the_cpu_is_shared(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    text = Timings(total=10, cpu=STARVED).describe()
    assert "bound by: cpu; this process received 20% of the CPU time" in text and "OMP_NUM_THREADS=1" in text
    assert "--device" not in text


def test_timings_describe_has_all_steps():
    text = Timings(read=1, waiting_for_images=2, waiting_for_disk=3, total=9).describe()
    assert text.startswith("seconds of 9.0: read 1.0, decode 0.0, encode 0.0, copy 0.0, write 0.0, seal 0.0, ")
    assert "waiting for images 2.0, waiting for disk 3.0\n" in text
