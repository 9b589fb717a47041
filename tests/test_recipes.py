"""The scripts of pipelines/recipes/, with tiny models and a few steps on the CPU."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

import drawn
import tiny
from commands import deepspeed, outcome
from helpers import ROOT, needs_compiler, run
from llava_twophase import compare_runs
from llava_twophase.deploy import cli as deploy_cli
from llava_twophase.extract import cli as extract_cli
from llava_twophase.projectors.names import SHIPPED
from llava_twophase.train import cli as train_cli
from train.model.llms import build_family

RECIPES = ROOT / "pipelines" / "recipes"
STEPS = 6
# Later arguments override those of a script.
SMALL = ["--use_cpu", "True", "--per_device_train_batch_size", "2", "--max_steps", STEPS, "--logging_steps", "1"]


@pytest.fixture(scope="module")
def inputs(plain_set, tiny_clip, tmp_path_factory):
    """The variables of every script; all of them use one cache."""
    return {
        "DATA": plain_set.json,
        "IMAGES": plain_set.folder,
        "TOWER": tiny_clip,
        "CACHE": tmp_path_factory.mktemp("recipes") / "cache",
        "MASTER_PORT": None,
    }


def run_recipe(name, *arguments, **variables):
    return run(["bash", RECIPES / name, *SMALL, *arguments], **variables)


def assert_trained(output):
    losses = outcome(output).losses
    assert len(losses) == STEPS and losses[-1] < losses[0]


@needs_compiler
def test_vicuna_recipe_trains_with_zero2_on_two_ranks(inputs, tiny_llama, tmp_path):
    """DeepSpeed's launcher with two CPU ranks; nothing frozen in the checkpoint."""
    output = tmp_path / "out"
    launchers = {"EXTRACT_LAUNCHER": "python", "TRAIN_LAUNCHER": " ".join(deepspeed())}
    changes = ["--tf32", "False", "--gradient_checkpointing", "False", "--save_steps", "3"]
    run_recipe("vicuna.sh", *changes, MODEL=tiny_llama, OUTPUT=output, **launchers, **inputs)
    assert_trained(output)
    state = outcome(output).projector
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert [path.name for path in output.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]
    weights = sum(tensor.numel() for tensor in state.values())
    saved = sum(
        path.stat().st_size for path in output.glob("checkpoint-*/**/*") if path.suffix in (".pt", ".safetensors")
    )
    # bf16 weights twice, and fp32 master, momentum and variance: 16 bytes a weight, and a few fixed kilobytes.
    assert saved < 16 * weights + 60_000
    assert saved < (tiny_llama / "model.safetensors").stat().st_size


def test_qwen_recipe_trains_with_torchrun(inputs, plain_set, tmp_path):
    """A Qwen2 with a tokenizer that adds no BOS, as Qwen2.5's."""
    tokenizer = tiny.train_tokenizer(plain_set.captions, add_bos=False)
    llm, output = tmp_path / "tiny-qwen", tmp_path / "out"
    build_family("qwen2", vocab_size=len(tokenizer)).save_pretrained(llm)
    tokenizer.save_pretrained(llm)
    launcher = "torchrun --standalone --nproc_per_node 1"
    run_recipe("qwen2.5.sh", MODEL=llm, OUTPUT=output, LAUNCHER=launcher, **inputs)
    assert_trained(output)
    assert json.loads((output / "config.json").read_text(encoding="utf-8"))["model_type"] == "llava_qwen"


def test_24gb_recipe_accumulates_batches(inputs, tiny_llama, tmp_path):
    """Its cache in int8. --bits 4 needs a GPU."""
    changes = {"MODEL": tiny_llama, "OUTPUT": tmp_path / "out", "STORAGE": "int8", "CACHE": tmp_path / "cache"}
    run_recipe("one_24gb_gpu.sh", "--gradient_accumulation_steps", "2", **inputs | changes)
    assert_trained(tmp_path / "out")


def test_comparison_of_projectors_ends_with_table_plot_and_evaluation(inputs, plain_set, tiny_llama, tmp_path):
    held_out = drawn.write_records(plain_set.records[:4], tmp_path / "held_out.json")
    sizes = {"PROJECTORS": "linear mlp2x_gelu", "LAYER": -2, "STEPS": STEPS}
    paths = {"MODEL": tiny_llama, "HELD_OUT": held_out, "RUNS": tmp_path / "runs"}
    result = run_recipe("compare_projectors.sh", **inputs, **sizes, **paths)
    for name in ("linear", "mlp2x_gelu"):
        assert_trained(tmp_path / "runs" / name)
        assert re.search(rf"^{name} +{name} +\d\.\d+ +\d\.\d+ ", result.stdout, re.MULTILINE)
    assert "loss with the right image" in result.stdout
    assert (tmp_path / "runs" / "losses.png").exists() and (tmp_path / "runs" / "evaluation.html").exists()


RECORDER = """#!/bin/sh
printf '%s\\0' "$@" >> "$RECORDED"
printf '\\n' >> "$RECORDED"
"""
# Sizes that fit 16 patches of width 32.
ARGUMENTS = {
    "KWARGS_c_abstractor": '{"hidden": 16, "depth": 1}',
    "KWARGS_perceiver": '{"queries": 3, "depth": 1, "heads": 2, "head_width": 8}',
    "KWARGS_own_projectors_Mean": '{"scale": 2}',
}
OWN_PROJECTOR = """
from torch import nn
class Mean(nn.Linear):
    def __init__(self, tower_width, llm_width, grid, scale=1):
        super().__init__(tower_width, llm_width)
        self.scale = scale
    def forward(self, features):
        return super().forward(self.scale * features.mean(dim=1, keepdim=True))
"""


def recorded_commands(folder, **variables):
    """Return the commands that the comparison would start, as lists that begin with the script's name."""
    recorder = folder / "bin" / "python"
    recorder.parent.mkdir()
    recorder.write_text(RECORDER, encoding="utf-8")
    recorder.chmod(0o755)
    path = {"PATH": f"{recorder.parent}:{os.environ['PATH']}", "RECORDED": folder / "recorded"}
    run_recipe("compare_projectors.sh", **variables, **path)
    lines = (folder / "recorded").read_text(encoding="utf-8").splitlines()
    commands = [line.removesuffix("\0").split("\0") for line in lines]
    return [[Path(script).name, *arguments] for script, *arguments in commands]


def test_comparison_trains_compares_and_evaluates_every_type(
    inputs, plain_set, tiny_llama, tmp_path, monkeypatch, capsys
):
    """Its commands in this process: those of LLaVA's MLP, the five projectors of this package, and a user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "own_projectors.py").write_text(OWN_PROJECTOR, encoding="utf-8")
    held_out = drawn.write_records(plain_set.records[:4], tmp_path / "held_out.json")
    paths = {"MODEL": tiny_llama, "HELD_OUT": held_out, "RUNS": "runs", "LAYER": -2}
    (default,) = re.findall(r"PROJECTORS:-(.*)}", (RECIPES / "compare_projectors.sh").read_text(encoding="utf-8"))
    variables = {**inputs, "CACHE": tmp_path / "cache", **paths, **ARGUMENTS}
    mains = {
        "extract_features.py": extract_cli.main,
        "train_projector.py": train_cli.main,
        "compare_runs.py": compare_runs.main,
        "use_projector.py": deploy_cli.main,
    }
    for script, *arguments in recorded_commands(tmp_path, PROJECTORS=f"{default} own_projectors:Mean", **variables):
        capsys.readouterr()
        small = ["--num_workers", "0", "--device", "cpu"] if script == "extract_features.py" else []
        assert mains[script]([*arguments, *small]) == 0, capsys.readouterr().err
        if script == "compare_runs.py":
            table = capsys.readouterr().out
    tokens = {"mlp2x_gelu": 16, "perceiver": 3, "own_projectors:Mean": 1}
    for name in [*default.split(), "own_projectors:Mean"]:
        assert_trained(tmp_path / "runs" / name)
        assert re.search(rf"^{name} +{tokens.get(name, 4)} .* {name} ", table, re.MULTILINE), table
    assert set(default.split()) == {"mlp2x_gelu", *SHIPPED}
    report = (tmp_path / "runs" / "evaluation.html").read_text(encoding="utf-8")
    assert all(f"runs/{name}" in report for name in default.split())
