"""Batches on their way through tower and codec, and what happens when memory runs out."""

import logging

import numpy as np
import pytest
import torch

from llava_twophase.cache.codec import Codec
from llava_twophase.errors import UserError
from llava_twophase.extract.encode import TowerRunner


class SmallTower:
    """A tower whose device holds few images at once; its features are the crops' first values."""

    device = torch.device("cpu")

    def __init__(self, limit, error):
        self.limit = limit
        self.error = error
        self.batches = []

    def encode(self, crops):
        if len(crops) > self.limit:
            raise self.error
        self.batches.append(len(crops))
        return crops[:, :2, :4, 0].float()


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: not enough memory: you tried ..."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:116] err == 0. DefaultCPUAllocator: can't allocate memory: you ..."),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS)
def test_tower_runner_halves_the_batch_when_out_of_memory(error, caplog):
    tower, codec = SmallTower(3, error), Codec("float32", (2, 4))
    run_tower = TowerRunner(tower, codec)
    crops = torch.randint(0, 256, (10, 4, 4, 3), dtype=torch.uint8)
    with caplog.at_level(logging.WARNING):
        rows = run_tower(crops).numpy()
        run_tower(crops)
    np.testing.assert_array_equal(rows, codec.to_rows(crops[:, :2, :4, 0].float()).numpy())
    assert tower.batches == [2] * 10
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory with a batch of 10 images: continuing with 5 (--batch_size 5 avoids the attempt)",
        "out of memory with a batch of 5 images: continuing with 2 (--batch_size 2 avoids the attempt)",
    ]


def test_features_halves_the_batch_when_out_of_memory():
    tower = SmallTower(3, ERRORS[0])
    crops = torch.randint(0, 256, (10, 4, 4, 3), dtype=torch.uint8)
    assert torch.equal(TowerRunner(tower).features(crops), crops[:, :2, :4, 0].float())
    assert tower.batches == [2] * 5


@pytest.mark.parametrize("error", ERRORS)
def test_tower_runner_out_of_memory_with_one_image_says_what_to_change(error):
    with pytest.raises(UserError, match="--compute_dtype bf16"):
        TowerRunner(SmallTower(0, error), Codec("float32", (2, 4)))(torch.zeros(4, 4, 4, 3, dtype=torch.uint8))


def test_tower_runner_raises_other_errors():
    with pytest.raises(RuntimeError, match="shapes"):
        TowerRunner(SmallTower(1, RuntimeError("shapes")), Codec("float32", (2, 4)))(
            torch.zeros(4, 4, 4, 3, dtype=torch.uint8)
        )
