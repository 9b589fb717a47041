"""The order of samples against LLaVA's own.

Provenance of the numbers: LLaVA v1.2.2.post1 (commit c121f04) run unedited on a CPU over 18 records with --seed 42,
batches of 4 on one process and of 2 on two (gloo); torch 2.13.0, transformers 4.37.2, accelerate 0.21.0.
"""

import numpy as np
import pytest

from llava_twophase.train.data.sampler import EpochSampler

ONE_PROCESS = [
    [10, 3, 9, 16, 12, 4, 6, 1, 13, 0, 7, 5, 11, 14, 17, 8, 15, 2],
    [10, 5, 17, 14, 2, 15, 13, 0, 9, 16, 7, 8, 6, 1, 4, 11, 3, 12],
]
# Batches of two, dealt to the ranks in turn; the last batch of rank 1 starts over with the first samples.
RANK_0 = [
    [[0, 16], [5, 9], [17, 6], [3, 14], [11, 2]],
    [[13, 17], [0, 9], [10, 15], [14, 2], [3, 7]],
]
RANK_1 = [
    [[15, 13], [8, 12], [1, 10], [7, 4], [0, 16]],
    [[12, 16], [1, 8], [6, 5], [11, 4], [13, 17]],
]


@pytest.mark.parametrize("epoch", [1, 0])
def test_epoch_sampler_equals_llava_on_one_process(epoch):
    order = EpochSampler(18, seed=42)
    order.set_epoch(epoch)
    assert list(order) == ONE_PROCESS[epoch]


@pytest.mark.parametrize("epoch", [1, 0])
def test_epoch_sampler_equals_llava_on_two_processes_for_any_seed(epoch):
    order = EpochSampler(18, seed=7, world_size=2).order(epoch).tolist()
    batches = [order[i : i + 2] for i in range(0, 18, 2)]
    batches.append(order[:2])
    assert batches[0::2] == RANK_0[epoch]
    assert batches[1::2] == RANK_1[epoch]


def test_epoch_sampler_order_depends_on_the_seed():
    assert list(EpochSampler(18, seed=1)) != list(EpochSampler(18, seed=2))


def test_epoch_sampler_grouped_order_has_every_sample_once_sorted_within_mega_batches():
    lengths = 7 * np.arange(50) % 23
    sampler = EpochSampler(50, seed=3, world_size=2, lengths=lengths, batch_size=4, groups=2)
    sampler.set_epoch(1)
    order = sampler.order(1).tolist()
    assert list(sampler) == order
    assert sorted(order) == list(range(50))
    first, second = order[:4], order[4:8]
    for batch in (first, second):
        assert [lengths[i] for i in batch] == sorted((lengths[i] for i in batch), reverse=True)
    # Dealt evenly: the two shares of a mega-batch differ by less than its longest sample.
    assert abs(sum(lengths[i] for i in first) - sum(lengths[i] for i in second)) <= max(lengths[i] for i in order[:8])
