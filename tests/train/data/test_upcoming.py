"""Batches after one, as accelerate distributes them to the ranks."""

import pytest
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from torch.utils.data import BatchSampler

from llava_twophase.train.data.upcoming import Upcoming

ORDER = [(7 * number) % 36 for number in range(36)]


@pytest.mark.parametrize("skipped", [0, 2])
@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 0), (2, 1), (3, 2)])
def test_upcoming_gives_the_batches_that_the_rank_asks_for(ranks, rank, skipped):
    shard = BatchSamplerShard(BatchSampler(ORDER, 3, drop_last=False), ranks, rank)
    batches = list(SkipBatchSampler(shard, skipped))
    upcoming = Upcoming(ORDER, 3, ranks)
    assert len(batches) == 12 // ranks - skipped
    for number, batch in enumerate(batches):
        assert upcoming.after(batch, 2) == batches[number + 1 : number + 3]


def test_upcoming_gives_nothing_after_a_batch_that_is_not_in_the_order():
    assert Upcoming(ORDER, 3).after([90, 91, 92], 2) == []
    assert Upcoming([], 3).after([1, 2, 3], 2) == []
    assert Upcoming(ORDER, 3).after(ORDER[33:], 2) == []


def test_upcoming_gives_nothing_after_the_batch_that_completes_an_epoch():
    """Accelerate fills the last round of batches with samples of the epoch's start."""
    order = ORDER[:33]
    first, second = (list(BatchSamplerShard(BatchSampler(order, 3, drop_last=False), 2, rank)) for rank in (0, 1))
    assert len(first) == len(second) == 6 and second[-1] == order[:3]
    upcoming = Upcoming(order, 3, 2)
    assert [upcoming.after(batch, 1) for batch in second] == [*([batch] for batch in second[1:-1]), [], []]
