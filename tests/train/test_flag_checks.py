"""Flags that stage 1 cannot honour."""

import json

import pytest

from helpers import ROOT
from llava_twophase.errors import UserError
from llava_twophase.train.arguments import ProjectorTrainingArguments
from llava_twophase.train.command_line import parse_arguments, parse_command
from llava_twophase.train.flag_checks import flag_hints
from train.recipe import recipe


@pytest.fixture
def parse(tmp_path):
    return lambda *extra: parse_arguments(recipe(tmp_path / "out", *extra))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--tune_mm_mlp_adapter", "False"], "--tune_mm_mlp_adapter must be True"),
        (["--freeze_mm_mlp_adapter", "True"], "--freeze_mm_mlp_adapter"),
        (["--lora_enable", "True"], "--lora_enable"),
        (["--bits", "5"], "--bits 5"),
        (["--train_sampling_strategy", "sequential"], "--train_sampling_strategy: the sample order is LLaVA's"),
        (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor"),
        (["--neftune_noise_alpha", "5"], "--neftune_noise_alpha"),
        (["--fsdp", "full_shard"], "--fsdp: to spread the LLM"),
        (["--push_to_hub", "True"], "--push_to_hub True"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0"),
        (["--learning_rate", "-1"], "--learning_rate -1"),
        (["--warmup_ratio", "1"], "--warmup_ratio 1"),
        (["--num_train_epochs", "0"], "--num_train_epochs 0: expected more than 0"),
        (["--save_only_model", "True"], "--save_only_model True"),
        (["--mm_use_im_start_end", "True"], "--mm_use_im_start_end"),
        (["--mm_use_im_patch_token", "True"], "--mm_use_im_patch_token"),
        (["--mm_patch_merge_type", "spatial"], "--mm_patch_merge_type spatial"),
        (["--version", "plian"], "the templates of stage 1 are: plain"),
        (["--compute_dtype", "float16"], "--compute_dtype float16"),
        (["--mm_tunable_parts", "mm_vision_tower,mm_mlp_adapter"], "use --mm_tunable_parts mm_mlp_adapter"),
    ],
)
def test_parse_arguments_refuses_flags_that_stage_one_cannot_honour(parse, flags, named):
    with pytest.raises(UserError, match=named):
        parse(*flags)


def test_parse_arguments_reports_all_refused_flags_together(parse):
    with pytest.raises(UserError) as caught:
        parse("--lora_enable", "True", "--version", "v1", "--bits", "3")
    assert all(flag in str(caught.value) for flag in ("--lora_enable", "--version", "--bits"))


def test_mm_tunable_parts_replaces_tune_mm_mlp_adapter(parse):
    arguments = parse("--tune_mm_mlp_adapter", "False", "--mm_tunable_parts", "mm_mlp_adapter")
    assert arguments.model.mm_tunable_parts == "mm_mlp_adapter"


def test_several_gpus_without_a_launcher_are_refused(tmp_path, monkeypatch):
    """HF Trainer would wrap the model in DataParallel."""
    monkeypatch.setattr(ProjectorTrainingArguments, "n_gpu", property(lambda self: 4))
    problems = parse_command(recipe(tmp_path / "out")).flag_problems
    assert len(problems) == 1
    assert "torchrun --nproc_per_node 4" in problems[0] and "CUDA_VISIBLE_DEVICES=0" in problems[0]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"zero_optimization": {"stage": 0}}, "only ZeRO stages 1 to 3 accumulate gradients in float32"),
        (
            {"train_micro_batch_size_per_gpu": 7},
            "ds train_micro_batch_size_per_gpu=7 vs hf per_device_train_batch_size=32",
        ),
        ({"bf16": {"enabled": False}}, "ds bf16.enabled=False"),
    ],
)
def test_parse_arguments_refuses_a_deepspeed_config_that_differs_from_the_flags(parse, tmp_path, changes, named):
    config = json.loads((ROOT / "pipelines" / "zero2.json").read_text(encoding="utf-8")) | changes
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=named):
        parse("--deepspeed", str(path))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval_strategy", "epoch"], "--eval_strategy needs records"),
        (["--sample_captions", "2"], "--sample_captions writes captions at each evaluation"),
        (["--eval_fraction", "1.5"], "--eval_fraction 1.5"),
    ],
)
def test_parse_arguments_refuses_incomplete_evaluation_flags(parse, flags, message):
    with pytest.raises(UserError, match=message):
        parse(*flags)


@pytest.mark.parametrize(
    ("flags", "hints"),
    [
        ([], []),
        (["--eval_fraction", "0.2"], ["--eval_fraction without --eval_strategy: its records are not evaluated"]),
        (["--eval_data_path", "r.json"], ["--eval_data_path without --eval_strategy: its records are not evaluated"]),
        (["--eval_fraction", "0.2", "--eval_strategy", "epoch"], []),
    ],
)
def test_flag_hints_says_that_held_out_records_are_not_evaluated(parse, flags, hints):
    found = flag_hints(parse(*flags))
    assert len(found) == len(hints) and all(map(str.startswith, found, hints))


def test_flag_hints_says_that_the_default_learning_rate_is_not_that_of_llava(tmp_path):
    flags = recipe(tmp_path / "out")
    position = flags.index("--learning_rate")
    without = flags[:position] + flags[position + 2 :]
    (hint,) = flag_hints(parse_arguments(without))
    assert hint == (
        "--learning_rate was not given: the default of HF Trainer, 5e-05, is used; LLaVA's recipe has "
        "--learning_rate 1e-3"
    )
    assert flag_hints(parse_arguments([*without, "--mm_projector_lr", "1e-3"])) == []
