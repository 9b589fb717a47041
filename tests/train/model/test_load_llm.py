"""load_llm and the checks before it: broken LLM folders are refused, most of them before weights are read."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertLMHeadModel,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from commands import checkpoint_command
from llava_twophase.errors import UserError
from llava_twophase.train.command_line import parse_arguments
from llava_twophase.train.model.load_llm import load_llm
from llava_twophase.train.preflight import prepare_inputs
from llava_twophase.train.stage_2 import warn_about_stage_2
from tiny import redraw

MISSING = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "llm")


@pytest.fixture
def arguments(folder, plain_set, tiny_clip, plain_cache, tmp_path):
    return lambda: parse_arguments(
        checkpoint_command(plain_set.json, folder, tiny_clip, plain_cache, tmp_path / "out")[1:],
    )


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "its config or tokenizer cannot be loaded: KeyError"),
        ("tokenizer_config.json", "[]", "its config or tokenizer cannot be loaded: AttributeError"),
        ("config.json", "{}", "its config or tokenizer cannot be loaded"),
        ("config.json", '{"model_type": "mamba"}', "mamba is not a transformer"),
        ("generation_config.json", "[]", "its generation_config.json is invalid"),
        ("generation_config.json", '{"early_stopping": "maybe"}', "its generation_config.json is invalid"),
    ],
)
def test_prepare_inputs_refuses_unreadable_files(folder, arguments, name, content, message):
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        prepare_inputs(arguments())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "big"}, "Field 'hidden_size' expected int"),
        ({"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
    ],
)
def test_prepare_inputs_refuses_an_invalid_config(folder, arguments, changes, message):
    change_config(folder, **changes)
    with pytest.raises(UserError, match=message):
        prepare_inputs(arguments())


def test_prepare_inputs_refuses_a_vision_tower(folder, arguments, tiny_clip):
    shutil.rmtree(folder)
    shutil.copytree(tiny_clip, folder)
    with pytest.raises(UserError, match=r"type clip_vision_model, expected a causal LM .*--vision_tower"):
        prepare_inputs(arguments())


def test_load_llm_refuses_missing_weights(folder, arguments):
    weights = load_file(folder / "model.safetensors")
    weights["renamed"] = weights.pop(MISSING)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"(?s)is incomplete: it lacks weights:.*{MISSING}"):
        load_llm(arguments())


def test_load_llm_refuses_weights_of_another_shape(folder, arguments):
    change_config(folder, hidden_size=32)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_llm(arguments())


def test_load_llm_refuses_a_truncated_file(folder, arguments):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot be loaded: SafetensorError"):
        load_llm(arguments())


def test_contradictory_generation_config_is_warned_about_and_not_used(folder, arguments, caplog):
    """Vicuna's: LLaVA's stage 2 trains for a day and then cannot save."""
    text = '{"temperature": 0.9, "top_p": 0.6, "num_beams": 4}'
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    prepare_inputs(arguments())
    with caplog.at_level(logging.WARNING):
        warn_about_stage_2(arguments())
    assert "generation_config.json is contradictory" in caplog.text and "`temperature`" in caplog.text
    generation = load_llm(arguments()).model.generation_config
    assert not generation.do_sample and generation.num_beams in (None, 1)


TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 300,
    "pad_token_id": 0,
}
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TOWER |= {"image_size": 28, "patch_size": 14}


def build_multimodal(kind):
    if kind == "gemma3":
        config = Gemma3Config(text_config=TEXT, vision_config=TOWER, mm_tokens_per_image=4, image_token_index=299)
        return redraw(Gemma3ForConditionalGeneration(config), 1)
    config = LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=CLIPVisionConfig(**TOWER))
    return redraw(LlavaForConditionalGeneration(config), 1)


@pytest.mark.parametrize("kind", ["gemma3", "llava"])
def test_load_llm_keeps_only_the_text_model_of_a_multimodal_checkpoint(kind, folder, arguments):
    multimodal = build_multimodal(kind)
    (folder / "model.safetensors").unlink()
    multimodal.save_pretrained(folder)
    llm = load_llm(arguments()).model
    expected = sum(parameter.numel() for parameter in multimodal.model.language_model.parameters())
    head = 0 if llm.config.tie_word_embeddings else 300 * 32
    assert sum(parameter.numel() for parameter in llm.parameters()) == expected + head
    assert not any("vision" in name for name, _ in llm.named_modules())
    ids = torch.arange(5, 25)[None]
    assert torch.equal(llm(input_ids=ids).logits, multimodal(input_ids=ids).logits)


def test_load_llm_refuses_an_llm_that_is_not_causal(folder, arguments):
    config = BertConfig(**{name: value for name, value in TEXT.items() if "key_value" not in name})
    (folder / "model.safetensors").unlink()
    redraw(BertLMHeadModel(config), 1).save_pretrained(folder)
    with pytest.raises(UserError, match="later tokens change its earlier logits"):
        load_llm(arguments())
