"""Gradients are accumulated and master weights kept in float32, with DeepSpeed's configurations and without them.

A backward pass in bf16 gives gradients with few bits. The sum of sixteen equal ones is exact in float32, not in bf16.
With float32 accumulation, sixteen equal micro-batches therefore update the projector exactly as one of them does.
"""

import json

import pytest
import torch

import drawn
from commands import checkpoint_command, deepspeed, outcome
from helpers import ROOT, needs_compiler, run

SAME = 16


@pytest.fixture(scope="module")
def repeated(plain_set, tmp_path_factory):
    """Records that are all equal, so that all micro-batches are equal, also on two ranks."""
    path = tmp_path_factory.mktemp("repeated") / "records.json"
    return drawn.write_records(plain_set.records[:1] * (2 * SAME), path)


@pytest.fixture(scope="module")
def train(repeated, tiny_llama, tiny_clip, plain_cache, tmp_path_factory):
    """Train two updates in bf16, each of `accumulation` micro-batches; return the run's folder."""

    def start(launcher, accumulation, **changes):
        output = tmp_path_factory.mktemp("deepspeed") / "out"
        accumulated = {"gradient_accumulation_steps": accumulation, "max_steps": 2, "logging_steps": 1}
        constant = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}
        flags = {"bf16": True, "save_strategy": "no", **accumulated, **constant, **changes}
        run([*launcher, *checkpoint_command(repeated, tiny_llama, tiny_clip, plain_cache, output, **flags)])
        return output

    return start


def assert_equal(one, other):
    """Assert equal projectors bit for bit, and equal losses within the rounding of the sum over micro-batches."""
    assert one.losses == pytest.approx(other.losses, rel=1e-6)
    assert all(torch.equal(one.projector[name], other.projector[name]) for name in one.projector)


def test_sum_of_equal_gradients_is_exact_in_float32_only():
    gradient = torch.arange(128, 256).bfloat16() / SAME
    assert torch.equal(sum([gradient.float()] * SAME), gradient.float() * SAME)
    assert not torch.equal(sum([gradient] * SAME), gradient * SAME)


def test_run_without_deepspeed_accumulates_in_float32(train):
    assert_equal(outcome(train(["python"], SAME)), outcome(train(["python"], 1)))


@needs_compiler
def test_zero2_accumulates_in_float32_and_keeps_float32_master_weights(train, tmp_path):
    """Also under LLaVA's own configuration, which is ours without ``data_types``."""
    config = json.loads((ROOT / "pipelines" / "zero2.json").read_text(encoding="utf-8"))
    assert config.pop("data_types") == {"grad_accum_dtype": "fp32"}
    (tmp_path / "zero2.json").write_text(json.dumps(config), encoding="utf-8")
    accumulated = train(deepspeed(), SAME, deepspeed=tmp_path / "zero2.json", save_strategy="steps", save_steps=2)
    assert_equal(outcome(accumulated), outcome(train(deepspeed(), 1, deepspeed="pipelines/zero2.json")))
    checkpoint, master = accumulated / "checkpoint-2", accumulated / "master"
    run(["python", checkpoint / "zero_to_fp32.py", checkpoint, master])
    state = torch.load(master / "pytorch_model.bin", weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    written = outcome(accumulated).projector
    for name, tensor in state.items():
        assert torch.equal(tensor.bfloat16(), written[f"model.{name}"])
        assert not torch.equal(tensor.bfloat16().float(), tensor)


@needs_compiler
def test_an_llm_in_host_memory_changes_nothing(train):
    """Also that ZeRO-3 accumulates in float32: one of the runs does, the other has nothing to accumulate."""
    offloaded = train(deepspeed(), SAME, deepspeed="pipelines/zero3_offload.json")
    assert_equal(outcome(offloaded), outcome(train(deepspeed(), 1, deepspeed="pipelines/zero3.json")))
    assert (offloaded / "config.json").is_file()
    arguments = json.loads((offloaded / "arguments.json").read_text(encoding="utf-8"))
    assert arguments["training"]["deepspeed"] == "pipelines/zero3_offload.json"
