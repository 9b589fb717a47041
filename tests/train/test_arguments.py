"""What the flags of LLaVA's recipe mean."""

import json
import shlex

import pytest
import torch

from llava_twophase.train.command_line import parse_arguments
from train.recipe import KNOWN_TO_LLAVA, recipe


@pytest.fixture
def parse(tmp_path):
    return lambda *extra: parse_arguments(recipe(tmp_path / "out", *extra))


def test_published_recipe_has_llavas_values(parse):
    arguments = parse()
    training = arguments.training
    assert arguments.model.select_layer == -2
    assert arguments.model.mm_projector_type == "mlp2x_gelu"
    assert training.bf16 and training.activation_checkpointing
    assert training.eval_strategy.value == "no"
    assert training.get_warmup_steps(1000) == 30
    assert training.get_warmup_steps(1001) == 31  # ceil, as LLaVA
    assert training.learning_rate == 1e-3
    assert training.optim.value == "adamw_torch"
    assert not training.remove_unused_columns


def test_other_flags_of_llava_are_accepted(parse):
    assert parse(*shlex.split(KNOWN_TO_LLAVA)).training.bits == 16


@pytest.mark.parametrize(("plan", "warned"), [([], True), (["--plan"], True), (["--plan", "24"], False)])
def test_the_cpu_is_not_mentioned_for_devices_that_are_not_at_hand(plan, warned, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    parse_arguments([*recipe(tmp_path / "out", "--use_cpu", "False"), *plan])
    assert ("training runs on the CPU" in caplog.text) is warned


def test_bf16_false_is_false(parse):
    assert parse("--bf16", "False").training.bf16 is False


def test_mm_projector_lr_overrides_learning_rate(parse):
    assert parse("--mm_projector_lr", "2e-5").training.learning_rate == 2e-5


def test_tower_dtype_follows_llava(parse):
    assert parse().tower_dtypes == [torch.bfloat16]
    assert parse("--bf16", "False").tower_dtypes == [torch.float16]
    assert parse("--bf16", "False", "--compute_dtype", "fp32").tower_dtypes == [torch.float32]
    several = ("--vision_tower", "a", "b", "--compute_dtype")
    assert parse(*several, "bf16").tower_dtypes == [torch.bfloat16] * 2
    assert parse(*several, "fp32", "bf16").tower_dtypes == [torch.float32, torch.bfloat16]


def test_for_trainer_leaves_the_parsed_arguments_unchanged(parse):
    """A run with Liger kernels or a limit of checkpoints is stored as such in ``arguments.json``."""
    arguments = parse("--use_liger_kernel", "True", "--lr-scheduler-type", "linear")
    before = json.dumps(arguments.to_dict())
    changed = arguments.for_trainer()
    assert (changed.save_total_limit, changed.use_liger_kernel) == (None, False)
    assert json.dumps(arguments.to_dict()) == before
    stored = json.loads(before)
    assert (stored["training"]["save_total_limit"], stored["training"]["use_liger_kernel"]) == (1, True)
    assert stored["given"]["evaluation_strategy"] == "no" and stored["given"]["lr_scheduler_type"] == "linear"
    assert "seed" not in stored["given"] and stored["training"]["seed"] == 42
