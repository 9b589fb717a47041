"""check_embedding_input refuses LLMs that need more than the embeddings of preceding positions."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llava_twophase.errors import UserError
from llava_twophase.train.model.input_probe import check_embedding_input
from tiny import redraw
from train.model.llms import FAMILIES, build_family

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 100, "pad_token_id": 0}
PER_LAYER = {
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 100,
    "sliding_window": 8,
}


def build(kind, **changes):
    torch.manual_seed(0)
    return redraw(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **changes)), 3).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
def test_probe_accepts_every_supported_family(kind, dtype):
    llm = build_family(kind).to(dtype).eval()
    check_embedding_input("some/llm", llm)
    assert not llm.training and all(parameter.grad is None for parameter in llm.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gemma3n_text", {"laurel_rank": 4, "num_kv_shared_layers": 0, "altup_num_inputs": 2, **PER_LAYER}),
        ("gemma4_text", {"global_head_dim": 16, "num_kv_shared_layers": 0, **PER_LAYER}),
    ],
)
def test_probe_refuses_per_layer_inputs(kind, changes, dtype):
    """transformers#45874: Gemma-3n and Gemma-4 E2B train without them, and nothing is said."""
    llm = build(kind, **changes).to(dtype)
    with pytest.raises(UserError, match=r"some/llm cannot be used: (its logits for embeddings differ|it does not run)"):
        check_embedding_input("some/llm", llm)


def test_probe_refuses_an_embedding_multiplier_that_only_ids_get():
    llm = build_family("llama").eval()
    forward = llm.model.forward

    def scaled(input_ids=None, inputs_embeds=None, **kwargs):
        if inputs_embeds is None:
            inputs_embeds = 1.01 * llm.get_input_embeddings()(input_ids)
        return forward(inputs_embeds=inputs_embeds, **kwargs)

    llm.model.forward = scaled
    with pytest.raises(UserError, match="its logits for embeddings differ"):
        check_embedding_input("some/llm", llm)


def test_probe_reports_logits_that_are_not_finite():
    llm = build_family("llama").to(torch.float16).eval()
    llm.get_output_embeddings().weight.data[5, 5] = float("inf")
    with pytest.raises(UserError, match=r"its logits are not finite in torch\.float16"):
        check_embedding_input("some/llm", llm)


def test_probe_refuses_llms_that_need_ids():
    """As layers that route by a hash of the token id do."""
    llm = build_family("llama").eval()
    forward = llm.model.forward

    def routed(input_ids=None, inputs_embeds=None, **kwargs):
        return forward(inputs_embeds=llm.get_input_embeddings()(input_ids.clone()), **kwargs)

    llm.model.forward = routed
    with pytest.raises(UserError, match="does not run on embeddings without token ids"):
        check_embedding_input("some/llm", llm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_probe_refuses_attention_to_later_positions(dtype):
    with pytest.raises(UserError, match="later tokens change its earlier logits .* not causal"):
        check_embedding_input("some/bert", build("bert").to(dtype))


def test_probe_refuses_embeddings_of_another_width():
    with pytest.raises(UserError, match="its embeddings have width 16, its hidden states 32"):
        check_embedding_input("some/opt", build("opt", word_embed_proj_dim=16))
