"""activation_checkpointing recomputes layers in evaluation mode."""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from llava_twophase.train.model.activation_checkpointing import activation_checkpointing, checkpointable_layers
from llava_twophase.train.model.activation_memory import saved_bytes
from train.model.llms import FAMILIES, WIDTH, build_family, build_llm


def run(llm, embeds):
    return llm(inputs_embeds=embeds, use_cache=False).logits


@pytest.mark.parametrize("kind", FAMILIES)
def test_gradient_is_equal_and_less_memory_is_kept(kind):
    llm, embeds = build_family(kind).eval().requires_grad_(False), torch.randn(2, 30, WIDTH, requires_grad=True)
    layers = checkpointable_layers(llm)
    assert len(layers) == 2
    expected = torch.autograd.grad(run(llm, embeds).square().mean(), embeds)[0]
    everything = saved_bytes(lambda: run(llm, embeds), llm)
    with activation_checkpointing(layers, 1):
        found = torch.autograd.grad(run(llm, embeds).square().mean(), embeds)[0]
        assert saved_bytes(lambda: run(llm, embeds), llm) < everything / 2
    assert torch.equal(found, expected)
    assert saved_bytes(lambda: run(llm, embeds), llm) == everything


def test_every_k_recomputes_one_layer_in_k():
    llm, embeds = build_llm().eval().requires_grad_(False), torch.randn(2, 30, WIDTH, requires_grad=True)
    kept = []
    for every in (0, 4, 2, 1):
        with activation_checkpointing(checkpointable_layers(llm), every):
            kept.append(saved_bytes(lambda: run(llm, embeds), llm))
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # raised inside torch.compile
def test_compiled_layers_are_recomputed_and_share_their_code():
    llm, embeds = build_llm().eval().requires_grad_(False), torch.randn(2, 30, WIDTH, requires_grad=True)
    layers, compiled, kept = checkpointable_layers(llm), [], []

    def backend(graph, inputs):
        compiled.append(graph)
        return aot_eager(graph, inputs)  # recomputes in torch 2.11 too, where running the graph itself does not

    for layer in layers:
        layer.compile(backend=backend)
    for every in (0, 1) * 2:
        with activation_checkpointing(layers, every):
            kept.append(saved_bytes(lambda: run(llm, embeds), llm))
    assert kept[1] < kept[0] / 2 and kept[2:] == kept[:2]
    assert len(compiled) == 2
