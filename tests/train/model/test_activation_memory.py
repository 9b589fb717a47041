"""Estimates and measurements of the memory for activations."""

from types import SimpleNamespace

import pytest
import torch

from helpers import run
from llava_twophase.train.model.activation_memory import (
    analytic_estimate,
    free_memory,
    measure_activations,
    process_memory,
    saved_bytes,
)
from train.model.llms import WIDTH, build_family, build_llm


def embeds_of(positions, dtype=torch.float32):
    return torch.randn(1, positions, WIDTH, dtype=dtype)


def kept(llm, positions):
    """Bytes that autograd keeps of one sample."""
    leaf = embeds_of(positions, llm.dtype).requires_grad_()
    return saved_bytes(lambda: llm(inputs_embeds=leaf, use_cache=False, logits_to_keep=1), llm)


def test_analytic_estimate_agrees_with_a_measurement():
    llm = build_llm(dtype=torch.bfloat16).requires_grad_(False)
    estimate = analytic_estimate(llm.config, image_tokens=1, element_size=2)
    assert kept(llm, 50) / estimate.layers / 50 == pytest.approx(estimate.layer, rel=0.15)


def test_analytic_estimate_takes_the_largest_of_values_for_each_layer():
    config = build_llm().config
    expected = analytic_estimate(config, image_tokens=1, element_size=4)
    values = {**config.to_dict(), "intermediate_size": [32, config.intermediate_size]}
    assert analytic_estimate(SimpleNamespace(**values), image_tokens=1, element_size=4) == expected


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_measure_activations_predicts_other_lengths(attention):
    """Eager attention keeps its weights, so its memory grows with the square of the length."""
    llm = build_llm(attn_implementation=attention).requires_grad_(False).eval()
    estimate = analytic_estimate(llm.config, image_tokens=1, element_size=4)
    memory = measure_activations(llm, embeds_of(100), estimate)
    assert (memory.attention > 0) == (attention == "eager")
    for positions in (50, 100, 300):
        predicted = memory.layers * (positions * memory.layer + positions**2 * memory.attention)
        assert predicted == pytest.approx(kept(llm, positions), rel=0.05)


def test_measure_activations_returns_the_estimate_if_the_sample_does_not_fit():
    def llm(**inputs):
        raise torch.OutOfMemoryError("simulated")

    estimate = analytic_estimate(build_family("gpt2").config, image_tokens=1, element_size=4)
    llm.parameters = llm.buffers = lambda: []
    assert measure_activations(llm, embeds_of(10), estimate) is estimate


def test_free_memory_divides_host_memory_among_the_ranks_of_a_node(monkeypatch):
    device = torch.device("cpu")
    alone = free_memory(device)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0 < free_memory(device) < alone / 2


def test_process_memory_is_that_of_this_process_and_not_of_its_parent():
    """A block that was freed counts in the peak alone; the peak of a child is not that of its large parent."""
    before = process_memory()
    block = torch.ones(64, 2**20)
    assert process_memory() - before > 200 * 2**20
    del block
    assert process_memory(peak=True) > process_memory() + 100 * 2**20
    code = "from llava_twophase.train.model.activation_memory import process_memory; print(process_memory(peak=True))"
    assert int(run(["python", "-c", code]).stdout) < process_memory(peak=True)
