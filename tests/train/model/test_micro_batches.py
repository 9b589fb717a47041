"""MicroBatching and its choice."""

import json
from dataclasses import asdict, replace

import pytest

from llava_twophase.text import format_bytes
from llava_twophase.train.model.activation_memory import ActivationMemory
from llava_twophase.train.model.micro_batches import MicroBatch, MicroBatching, choose_micro_batching

# With one image token, a sample of n ids has n positions; 1 byte for each position and layer.
MEMORY = ActivationMemory(layers=32, image_tokens=1, layer=1, attention=0, boundary=0, head=0)


def choose(free, first=100, longest=100, memory=MEMORY, batch=32, saturating=7, **given):
    return choose_micro_batching(memory, (first, longest), batch, free, saturating, **given)


@pytest.mark.parametrize(
    ("free", "samples", "every"),
    [(10**6, 8, 0), (16_000, 4, 0), (4_000, 1, 0), (3_500, 1, 4), (700, 2, 1), (1, 1, 1)],
)
def test_choose_micro_batching_prefers_small_micro_batches_to_recomputation(free, samples, every):
    choice = choose(free)
    assert (choice.samples, choice.checkpoint_every) == (samples, every)


@pytest.mark.parametrize(
    ("free", "given", "expected"),
    [
        (10**6, {"samples": 3}, (3, 0)),
        (1, {"samples": 3, "checkpoint_every": 0}, (3, 0)),
        (10**6, {"checkpoint_every": 2}, (8, 2)),
        (None, {"samples": 3, "checkpoint_every": 3}, (3, 3)),
    ],
)
def test_choose_micro_batching_keeps_what_the_user_gave(free, given, expected):
    choice = choose(free, **given)
    assert (choice.samples, choice.checkpoint_every) == expected
    assert choice.next([100] * 32).samples == 3 if "samples" in given else 8


def test_longest_sample_does_not_change_the_choice_for_the_others():
    alone = choose(10**6)
    for longest in (285, 2000):
        choice = choose(10**6, longest=longest)
        assert (choice.samples, choice.checkpoint_every) == (alone.samples, alone.checkpoint_every)
        assert choice.next([100] * 8) == MicroBatch(8, 100, 0)


@pytest.mark.parametrize(("length", "samples"), [(100, 8), (149, 8), (285, 4), (400, 3), (1000, 1), (2000, 1)])
def test_micro_batches_are_bounded_by_positions(length, samples):
    choice = choose(10**6, longest=1000)
    assert choice.next([length] * 8).samples == samples


def test_logits_count_too():
    """A large vocabulary: caption positions need more memory than the decoder."""
    choice = choose(10**6, first=20, longest=60, memory=replace(MEMORY, head=32))
    assert choice.next([20] * 8).samples == 8
    assert choice.next([60] * 8).samples == 4


def test_attention_weights_count_by_pairs_of_positions():
    choice = choose(10**7, longest=200, memory=replace(MEMORY, attention=1))
    assert choice.next([100] * 8).samples == 8
    assert choice.next([200] * 8).samples == 3


def test_sample_that_exceeds_the_free_memory_is_recomputed_alone():
    choice = choose(16_000, longest=1000)
    assert (choice.samples, choice.checkpoint_every) == (4, 0)
    assert choice.limit <= 16_000
    assert choice.next([1000, 100, 100]) == MicroBatch(1, 1000, 1)
    assert choice.next([100, 100]) == MicroBatch(2, 100, 0)
    assert choice.next([9000, 100]) == MicroBatch(1, 9000, 1)


def test_peak_is_the_largest_need_of_any_micro_batch():
    choice = choose(10**6, longest=1000)
    assert choice.peak(100) == MEMORY.needed(8, 100, 0)
    assert choice.peak(1000) == max(MEMORY.needed(*choice.next([length] * 8)) for length in range(1, 1001))
    assert choice.peak(1000) <= choice.limit


@pytest.mark.parametrize(("batch", "used"), [(1, "1 sample,"), (5, "5 samples,"), (20, "8 samples,")])
def test_describe_counts_no_more_samples_than_the_batch_has(batch, used):
    """Sizes are powers of two: for a batch of 5 a micro-batch may hold 8."""
    memory = replace(MEMORY, layer=10**6, image_tokens=7)
    choice = choose(10**12, first=100, longest=1000, memory=memory, batch=batch)
    assert choice.samples >= min(batch, 8)
    samples = int(used.split()[0])
    said = choice.describe(batch, (100, 1000))
    assert said.startswith(f"a batch of {batch} goes through the LLM in micro-batches of {used} no activation")
    assert f"about {format_bytes(memory.needed(samples, 100, 0), 1)}, at most " in said
    assert said.endswith("B for the longest sample (1006 positions)")


def test_after_out_of_memory_halves_then_recomputes_then_gives_up():
    choice, steps = choose(10**6), []
    while choice is not None:
        failed = choice.next([100] * 8)
        steps.append((failed.samples, failed.checkpoint_every))
        choice = choice.after_out_of_memory(failed)
    assert steps == [(8, 0), (4, 0), (2, 0), (1, 0), (1, 4), (1, 2), (1, 1)]


def test_micro_batching_survives_json():
    choice = choose(16_000, longest=1000)
    assert MicroBatching.from_dict(json.loads(json.dumps(asdict(choice)))) == choice
