"""What a resume must not change."""

import re
import shutil
from dataclasses import fields

import pytest
from safetensors.torch import load_file, save_file

from commands import train_command
from llava_twophase.train.arguments import ProjectorTrainingArguments
from llava_twophase.train.command_line import parse_arguments
from llava_twophase.train.flags import DataArguments, ModelArguments
from llava_twophase.train.identity import identity_differences, run_identity
from llava_twophase.train.preflight import prepare_inputs


@pytest.fixture(scope="module")
def identity(plain_set, tiny_llama, tiny_clip, plain_cache, tmp_path_factory):
    """Return the identity of a command with other flags."""

    def compute(**changes):
        flags = {
            "data_path": plain_set.json,
            "model_name_or_path": tiny_llama,
            "vision_tower": tiny_clip,
            "feature_cache": plain_cache,
            "output_dir": tmp_path_factory.getbasetemp() / "identity",
            **changes,
        }
        arguments = parse_arguments(train_command(**flags)[1:])
        return run_identity(arguments, prepare_inputs(arguments))

    return compute


@pytest.mark.parametrize(
    ("flag", "value", "field"),
    [
        ("learning_rate", 1e-4, "learning_rate"),
        ("warmup_ratio", 0.5, "warmup_steps"),
        ("lr_scheduler_type", "linear", "lr_scheduler_type"),
        ("lr_scheduler_kwargs", '{"num_cycles": 1}', "lr_scheduler_kwargs"),
        ("max_grad_norm", 0.5, "max_grad_norm"),
        ("gradient_accumulation_steps", 2, "global_batch_size"),
        ("adam_beta2", 0.9, "adam"),
        ("data_seed", 7, "data_seed"),
        ("model_max_length", 256, "model_max_length"),
        ("mm_projector_type", "linear", "mm_projector_type"),
    ],
)
def test_run_identity_has_what_decides_the_outcome(identity, flag, value, field):
    one, other = identity(), identity(**{flag: value})
    assert {name for name in one if one[name] != other[name]} == {field}


def test_identity_differences_names_flags_that_exist(identity):
    expected = identity()
    lines = identity_differences(dict.fromkeys(expected, "another"), expected, "the checkpoint")
    groups = (ModelArguments, DataArguments, ProjectorTrainingArguments)
    known = {f"--{field.name}" for group in groups for field in fields(group)}
    named = {line.partition(":")[0].partition(".")[0]: set(re.findall(r"--\w+", line)) for line in lines}
    assert named.keys() == expected.keys()
    assert {flag for flags in named.values() for flag in flags} <= known
    assert all(named.values())
    assert named["records_sha256"] == {"--data_path", "--eval_fraction", "--drop_quarantined"}
    assert any(re.fullmatch(r"seed: the checkpoint has 'another', this run 42 \(--seed\)", line) for line in lines)


def test_run_identity_ignores_how_the_global_batch_is_spread(identity):
    assert identity() == identity(per_device_train_batch_size=2, gradient_accumulation_steps=2)


def test_run_identity_ignores_length_paths_and_speed(identity, tiny_llama, tmp_path):
    spelled = shutil.copytree(tiny_llama, tmp_path / "copy")
    changes = {"max_steps": 7, "num_train_epochs": 5, "logging_steps": 3, "micro_batch_size": 2}
    assert identity() == identity(model_name_or_path=spelled, **changes)


def test_run_identity_differs_if_weights_of_the_llm_change_under_one_path(identity, tiny_llama, tmp_path):
    llm = shutil.copytree(tiny_llama, tmp_path / "llm")
    before = identity(model_name_or_path=llm)
    weights = load_file(llm / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"] *= 1.5
    save_file(weights, llm / "model.safetensors", metadata={"format": "pt"})
    after = identity(model_name_or_path=llm)
    assert {name for name in before if before[name] != after[name]} == {"llm"}
    assert {file for file, digest in before["llm"].items() if after["llm"][file] != digest} == {"model.safetensors"}
