"""How the batch of a step is spread over processes."""

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from llava_twophase.train.layout import Layout, describe_change, flags_for_global_batch


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("size", [1, 3, 8, 11, 12, 13])
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 2), (3, 2), (4, 1)])
def test_samples_per_epoch_equals_what_accelerate_deals(world_size, batch_size, size, drop_last):
    batches = BatchSampler(range(size), batch_size, drop_last)
    if world_size > 1:
        shards = [BatchSamplerShard(batches, world_size, rank) for rank in range(world_size)]
    else:
        shards = [batches]
    dealt = sum(len(batch) for shard in shards for batch in shard)
    assert Layout(world_size, batch_size, 2).samples_per_epoch(size, drop_last) == dealt


@pytest.mark.parametrize(
    ("wanted", "layout", "flags"),
    [
        (8, Layout(1, 2, 1), "set --gradient_accumulation_steps 4"),
        (8, Layout(2, 2, 4), "set --gradient_accumulation_steps 2"),
        (256, Layout(4, 32, 1), "set --gradient_accumulation_steps 2"),
        (256, Layout(16, 32, 1), "set --per_device_train_batch_size 16 --gradient_accumulation_steps 1"),
        (12, Layout(2, 4, 1), "set --per_device_train_batch_size 3 --gradient_accumulation_steps 2"),
        (8, Layout(3, 2, 1), "a number of processes that divides 8: 1, 2, 4, 8"),
    ],
)
def test_flags_for_global_batch_keeps_the_batch_size_if_possible(wanted, layout, flags):
    assert flags_for_global_batch(wanted, layout) == flags


def test_describe_change_names_both_layouts_and_what_is_carried_over():
    text = describe_change(Layout(2, 4, 1, zero_stage=2), Layout(1, 4, 2))
    assert "written by 2 processes x 4 samples x 1 accumulation step with ZeRO-2" in text
    assert "this run has 1 process x 4 samples x 2 accumulation steps without DeepSpeed" in text
    assert "float32 weights, the optimizer's state, learning rates and the log are carried over" in text


def test_layout_shards_the_optimizer_by_ranks_and_stage_under_deepspeed_only():
    assert Layout(1, 4, 1).shards_optimizer_like(Layout(2, 2, 1))
    assert Layout(2, 4, 1, 2).shards_optimizer_like(Layout(2, 2, 2, 2))
    assert not Layout(2, 4, 1, 2).shards_optimizer_like(Layout(1, 4, 2, 2))
    assert not Layout(2, 4, 1, 2).shards_optimizer_like(Layout(2, 4, 1, 3))
    assert not Layout(2, 4, 1, 2).shards_optimizer_like(Layout(2, 4, 1))
