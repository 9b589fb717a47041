"""Trainer's own switches for kernels and launchers: they keep the losses, or are refused before the LLM loads."""

from importlib.util import find_spec

import pytest

from commands import extract_command, outcome, train_command
from helpers import run


@pytest.fixture(scope="module")
def trained(plain_set, tiny_llama, tiny_clip, tmp_path_factory):
    """Runs the training command on one cache and returns its losses."""
    root = tmp_path_factory.mktemp("kernels")
    inputs = {"data_path": plain_set.json, "vision_tower": tiny_clip, "feature_cache": root / "cache"}
    run(["python", *extract_command(**inputs, image_folder=plain_set.folder)])

    def train(name, expect=0, **changes):
        command = train_command(**inputs, model_name_or_path=tiny_llama, output_dir=root / name, **changes)
        done = run(["python", *command], expect=expect)
        return done.stderr if expect else outcome(root / name).losses

    train.root = root
    return train


def test_compiled_layers_and_another_attention_keep_the_losses(trained):
    plain = trained("plain")
    # The backend that compiles nothing to machine code: what is traced, and how, is the same.
    compiled = trained("compiled", torch_compile=True, torch_compile_backend="aot_eager", attn_implementation="eager")
    assert len(plain) == 6
    assert compiled == pytest.approx(plain, abs=1e-5)
    # The table of both runs shows the arguments that differ.
    plot = trained.root / "losses.png"
    table = run(
        ["python", "pipelines/compare_runs.py", trained.root / "plain", trained.root / "compiled", "--plot", plot]
    )
    assert {"attn_implementation", "torch_compile", "eager", "loss"} <= set(table.stdout.split())
    assert f"{sum(plain) / 6:.4f}" in table.stdout and "seed" not in table.stdout
    if find_spec("matplotlib"):
        assert plot.read_bytes().startswith(b"\x89PNG")
    said = run(["python", "pipelines/compare_runs.py", trained.root], expect=1).stderr
    assert "is not a finished run: arguments.json cannot be read" in said


def test_liger_without_a_gpu_is_refused_before_the_llm_loads(trained):
    import torch

    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator: tests/test_gpu.py runs it")
    said = trained("liger", expect=1, use_liger_kernel=True)
    assert "error: --use_liger_kernel True" in said and "need a GPU" in said and "Traceback" not in said


def test_deepspeed_without_a_launcher_is_refused(trained):
    said = trained("alone", expect=1, deepspeed="pipelines/zero2.json")
    assert "error: --deepspeed needs a launcher" in said and "Traceback" not in said
