"""LLM folders that are not what they seem: found before a step is taken, most of them before the weights are read."""

import json
import logging
import shutil

import pytest
from safetensors.torch import load_file, save_file

from llava_twophase.errors import UserError
from llava_twophase.train.command_line import parse_arguments
from llava_twophase.train.model.load_llm import load_llm
from llava_twophase.train.preflight import check_inputs
from train.commands import command

GONE = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "llm")


@pytest.fixture
def arguments(folder, plain_set, tiny_clip, plain_cache, tmp_path):
    return lambda: parse_arguments(
        command(plain_set.json, folder, tiny_clip, plain_cache, tmp_path / "out")[1:],
    )


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("tokenizer.json", "{}", "its config or tokenizer cannot be loaded: KeyError"),
        ("tokenizer_config.json", "[]", "its config or tokenizer cannot be loaded: AttributeError"),
        ("config.json", "{}", "its config or tokenizer cannot be loaded"),
        ("config.json", '{"model_type": "mamba"}', "mamba is no transformer"),
        ("generation_config.json", "[]", "its generation_config.json is invalid"),
        ("generation_config.json", '{"early_stopping": "maybe"}', "its generation_config.json is invalid"),
    ],
)
def test_files_that_cannot_be_read_are_named(folder, arguments, name, content, named):
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=named):
        check_inputs(arguments())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": "big"}, "Field 'hidden_size' expected int"),
        ({"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
    ],
)
def test_a_config_that_describes_no_llm_is_named(folder, arguments, changes, named):
    change_config(folder, **changes)
    with pytest.raises(UserError, match=named):
        check_inputs(arguments())


def test_weights_that_would_be_random_are_refused(folder, arguments):
    weights = load_file(folder / "model.safetensors")
    weights["renamed"] = weights.pop(GONE)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"(?s)is not whole, it lacks weights:.*{GONE}"):
        load_llm(arguments())


def test_weights_of_another_shape_are_refused(folder, arguments):
    change_config(folder, hidden_size=32)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_llm(arguments())


def test_a_file_that_is_cut_short_is_named(folder, arguments):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot be loaded: SafetensorError"):
        load_llm(arguments())


def test_vicunas_generation_config_is_warned_of_and_captions_stay_greedy(folder, arguments, caplog):
    """LLaVA's stage 2 trains for a day and then cannot save; here nothing depends on it."""
    text = '{"temperature": 0.9, "top_p": 0.6, "num_beams": 4}'
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        check_inputs(arguments())
    assert "generation_config.json is contradictory" in caplog.text and "`temperature`" in caplog.text
    generation = load_llm(arguments()).generation_config
    assert not generation.do_sample and generation.num_beams in (None, 1)
