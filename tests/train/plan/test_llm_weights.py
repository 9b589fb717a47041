"""Bytes of an LLM's weights from its configuration, compared with the model itself."""

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from llava_twophase.train.loop.metrics import StepFlops
from llava_twophase.train.plan.llm_weights import LLMWeights, Placement
from train.model.llms import build_family, build_llm


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", "gpt2", "opt"])
def test_weights_of_a_configuration_are_those_of_the_model(kind):
    llm = build_family(kind)
    weights = LLMWeights.of(llm.config)
    (size,) = weights.on_device(Placement(element_size=4)).values()
    assert size == sum(parameter.nbytes for parameter in llm.parameters())
    assert weights.flops == StepFlops.of(llm)


def test_quantised_weights_are_the_matrices_of_the_layers():
    llm = build_llm()
    weights = LLMWeights.of(llm.config)
    assert weights.quantised == sum(parameter.numel() for name, parameter in llm.named_parameters() if "_proj" in name)
    assert weights.largest == 64 * 96


@pytest.mark.parametrize(("bits", "double", "size"), [(8, True, 1.0), (4, True, 0.516), (4, False, 0.5625)])
def test_on_device_counts_bits_and_scales(bits, double, size):
    """bitsandbytes has a scale for 64 weights; QLoRA (arXiv 2305.14314) gives 0.5 and 0.127 bits for it."""
    config = LlamaConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=8)
    weights = LLMWeights.of(config)
    parts = weights.on_device(Placement(element_size=2, bits=bits, double_quant=double))
    assert parts["LLM weights"] - 2 * weights.others == pytest.approx(size * weights.quantised, rel=0.001)
    assert parts["LLM weights, one matrix at full precision"] == 2 * 1024 * 4096


def test_zero3_divides_the_weights_and_gathers_a_limited_number():
    weights = LLMWeights.of(AutoConfig.for_model("llama", hidden_size=256, num_hidden_layers=2, num_attention_heads=4))
    (total,) = weights.on_device(Placement(2)).values()
    shared = weights.on_device(Placement(2, shares=4, most_gathered=1000))
    assert list(shared.values()) == [-(-total // 4), 2000]
    assert list(weights.on_device(Placement(2, shares=4, offloaded=True)).values()) == [0, total]


def test_counting_weights_takes_no_memory_and_draws_no_number():
    state = torch.random.get_rng_state()
    config = LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
    assert 26.0e9 < sum(LLMWeights.of(config).on_device(Placement(2)).values()) < 26.1e9
    assert torch.equal(torch.random.get_rng_state(), state)
