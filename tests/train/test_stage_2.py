"""Warnings about files that LLaVA's stage 2 reads wrongly."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from llava_twophase.train.command_line import parse_arguments
from llava_twophase.train.stage_2 import warn_about_stage_2
from train.recipe import recipe


@pytest.fixture
def warnings(tiny_llama, tiny_clip, tmp_path, caplog):
    """Return the warnings for the tiny LLM with other configuration fields, and a tower with or without the prefix."""

    def check(prefix="vision_model.", **changes):
        for source, name in ((tiny_llama, "llm"), (tiny_clip, "tower")):
            shutil.copytree(source, tmp_path / name)
        path = tmp_path / "llm" / "config.json"
        content = json.loads(path.read_text(encoding="utf-8")) | changes
        path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
        weights = load_file(tmp_path / "tower" / "model.safetensors")
        weights = {prefix + name.removeprefix("vision_model."): tensor for name, tensor in weights.items()}
        save_file(weights, tmp_path / "tower" / "model.safetensors", metadata={"format": "pt"})
        flags = ["--model_name_or_path", tmp_path / "llm", "--vision_tower", tmp_path / "tower"]
        arguments = parse_arguments(recipe(tmp_path / "out", *flags))
        caplog.clear()
        warn_about_stage_2(arguments)
        return [record.getMessage() for record in caplog.records if record.name == "llava_twophase.train.stage_2"]

    return check


def test_warn_about_stage_2_is_silent_for_files_that_transformers_4_37_reads(warnings):
    rope = {"rope_type": "default", "rope_theta": 1e6}
    assert warnings(rope_parameters=rope, rope_theta=1e6) == []


def test_warn_about_stage_2_says_which_rope_fields_to_add(warnings):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
    (warning,) = warnings(rope_parameters=rope, rope_theta=None)
    assert 'add "rope_theta": 1000000.0, "rope_scaling": {"type": "linear", "factor": 4.0}' in warning


def test_warn_about_stage_2_names_a_tower_without_the_prefix(warnings):
    (warning,) = warnings(prefix="")
    assert "lack the prefix vision_model." in warning and "random weights" in warning


def test_warn_about_stage_2_names_a_contradictory_generation_config(warnings, tiny_llama, monkeypatch):
    content = json.dumps({"temperature": 0.9, "top_p": 0.6, "do_sample": False})
    copytree = shutil.copytree

    def with_generation_config(source, target):
        copytree(source, target)
        if source == tiny_llama:
            (target / "generation_config.json").write_text(content, encoding="utf-8")

    monkeypatch.setattr(shutil, "copytree", with_generation_config)
    (warning,) = warnings()
    assert "generation_config.json is contradictory" in warning and "do_sample" in warning
