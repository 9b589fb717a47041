"""A step on another number of processes has the samples of the first layout, with the same weights in the loss.

Loader and processes are simulated with accelerate's own sharding of batches.
"""

from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from llava_twophase.constants import IGNORE_INDEX
from llava_twophase.train.data.loss_weights import LossWeights
from llava_twophase.train.data.sampler import EpochSampler
from llava_twophase.train.layout import Layout

LENGTHS = [1 + 7 * number % 11 for number in range(40)]  # caption tokens of each sample
GLOBAL_BATCH_8 = [Layout(1, 8, 1), Layout(1, 2, 4), Layout(2, 4, 1), Layout(2, 2, 2), Layout(4, 2, 1), Layout(8, 1, 1)]


def batch_of(indices):
    labels = torch.full((len(indices), max(LENGTHS) + 2), IGNORE_INDEX)
    for row, index in enumerate(indices):
        labels[row, 2 : 2 + LENGTHS[index]] = 1
    return {"labels": labels, "indices": indices}


def steps_of(layout, order, drop_last):
    """Return the batches of each step of an epoch: for each step one list per process."""
    batches = BatchSampler(order, layout.batch_size, drop_last)
    shards = [
        list(BatchSamplerShard(batches, layout.world_size, rank) if layout.world_size > 1 else batches)
        for rank in range(layout.world_size)
    ]
    starts = range(0, len(shards[0]), layout.accumulation)
    return [[list(map(batch_of, shard[start : start + layout.accumulation])) for shard in shards] for start in starts]


def weights_in_loss(ranks):
    """Return the weight of a token of each sample in the loss of a step; a sample may be there twice."""
    found = Counter()
    for batches in ranks:
        for batch in batches:
            tokens = (batch["labels"] != IGNORE_INDEX).sum(1)
            weights = batch.get("weights", torch.full((len(tokens),), 1.0) / tokens.sum().clamp(min=1))
            for index, weight, count in zip(batch["indices"], weights.tolist(), tokens.tolist(), strict=True):
                found[index] += weight / len(batches) / len(ranks) if count else 0
    return {index: weight for index, weight in found.items() if weight}


def sampler(layout, size, grouped, samples):
    return EpochSampler(
        size,
        seed=42,
        world_size=layout.world_size,
        lengths=np.array(LENGTHS) if grouped else None,
        batch_size=layout.batch_size,
        groups=layout.world_size * layout.accumulation,
        samples=samples,
    )


def resumed_steps(origin, layout, size, grouped, drop_last):
    samples = origin.samples_per_epoch(size, drop_last)
    steps = []
    for step, ranks in enumerate(steps_of(layout, sampler(origin, size, grouped, samples), drop_last=False)):
        shares = [LossWeights(origin, layout, rank, samples) for rank in range(layout.world_size)]
        used = [list(share.without_surplus(batches, step)) for share, batches in zip(shares, ranks, strict=True)]
        counts = [
            torch.tensor([[(row != IGNORE_INDEX).sum() for row in batch["labels"]] for batch in batches])
            if len({len(batch["labels"]) for batch in batches}) == 1
            else None
            for batches in used
        ]

        def gather(own, counts=counts):
            if layout.world_size == 1:
                return own
            return torch.stack(counts).float()

        steps.append([share.weigh(batches, step, gather) for share, batches in zip(shares, used, strict=True)])
    return steps


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("size", [40, 37, 33, 5])
def test_steps_of_other_layouts_have_the_samples_and_weights_of_the_first(size, grouped, drop_last):
    compared = 0
    for origin in GLOBAL_BATCH_8:
        first = steps_of(origin, sampler(origin, size, grouped, None), drop_last)
        for layout in GLOBAL_BATCH_8:
            if layout == origin:
                continue
            resumed = resumed_steps(origin, layout, size, grouped, drop_last)
            assert len(resumed) == len(first)
            for one, other in zip(first, resumed, strict=True):
                assert weights_in_loss(other) == pytest.approx(weights_in_loss(one), rel=1e-5)
                compared += 1
    assert compared or (drop_last and size == 5)


def test_equal_batch_sizes_need_no_weights_before_the_end_of_an_epoch():
    """Their batches go through the LLM exactly as in the first layout."""
    steps = resumed_steps(Layout(2, 2, 2), Layout(4, 2, 1), 36, grouped=False, drop_last=False)
    assert all("weights" not in batch for ranks in steps[:-1] for batches in ranks for batch in batches)
    assert all("weights" in batch for batches in steps[-1] for batch in batches)
