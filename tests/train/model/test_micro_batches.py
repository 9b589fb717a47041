"""The choice of micro-batches, and the sizes that it is based on."""

import pytest
import torch

from llava_twophase.train.model.micro_batches import (
    MicroBatching,
    SampleMemory,
    analytic_estimate,
    choose_micro_batching,
    free_memory,
    saved_bytes,
)
from train.model.llms import WIDTH, build_llm

MEMORY = SampleMemory(layers=32, layer=100, boundary=10, head=50)


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (10**6, MicroBatching(8)),
        (16_000, MicroBatching(4)),
        (4_000, MicroBatching(1)),
        (3_500, MicroBatching(1, 4)),
        (700, MicroBatching(1, 1)),
        (1, MicroBatching(1, 1)),
    ],
)
def test_choose_micro_batching_prefers_small_micro_batches_to_recomputation(free, expected):
    assert choose_micro_batching(MEMORY, free, batch=32, saturating=7) == expected


def test_choose_micro_batching_keeps_what_the_user_gave():
    assert choose_micro_batching(MEMORY, 10**6, 32, 7, samples=3) == MicroBatching(3)
    assert choose_micro_batching(MEMORY, 1, 32, 7, samples=3, checkpoint_every=0) == MicroBatching(3)
    assert choose_micro_batching(MEMORY, 10**6, 32, 7, checkpoint_every=2) == MicroBatching(8, 2)


def test_analytic_estimate_agrees_with_a_measurement():
    llm = build_llm(dtype=torch.bfloat16).requires_grad_(False)
    embeds = torch.randn(1, 50, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    found = saved_bytes(lambda: llm(inputs_embeds=embeds, use_cache=False, logits_to_keep=1), llm)
    memory = analytic_estimate(llm.config, 50, 1, 2)
    assert found / memory.layers == pytest.approx(memory.layer, rel=0.15)


def test_free_memory_divides_host_memory_among_the_ranks_of_a_node(monkeypatch):
    device = torch.device("cpu")
    alone = free_memory(device)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0 < free_memory(device) < alone / 2
