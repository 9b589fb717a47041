"""Tests that need a GPU: pinned copies, flash attention, out-of-memory, synchronisation, kernels.

Skipped where there is none, as on the machines that these tests were written on: there they have not been run.
"""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from cache.make import make_cache
from commands import deepspeed, extract_command, outcome, train_command
from helpers import run
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.train.data.collator import collate
from llava_twophase.train.data.prefetch import PrefetchDataset
from train.model.llms import build_batch, build_llm, freeze, step

pytestmark = pytest.mark.gpu


def on_gpu(batch, dtype=torch.float32):
    """The batch of `build_batch` as in training: tensors on the device, lengths on the host."""
    features, ids, labels, lengths = batch
    return features.to("cuda", dtype), ids.cuda(), labels.cuda(), lengths


def test_step_on_the_gpu_equals_the_cpu():
    batch = build_batch()
    expected = step(freeze(build_llm(), 1, 4), *batch)
    found = step(freeze(build_llm().cuda(), 1, 4), *on_gpu(batch))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-4, atol=1e-6)


def test_step_runs_with_flash_attention():
    """Flash attention refuses a mask."""
    frozen = freeze(build_llm(dtype=torch.bfloat16).cuda(), 1, 4)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        loss, gradient = step(frozen, *on_gpu(build_batch(), torch.bfloat16))
    assert torch.isfinite(loss) and gradient.abs().sum() > 0


def test_step_does_not_synchronise():
    frozen, batch = freeze(build_llm(dtype=torch.bfloat16).cuda(), 1, 4, 0), on_gpu(build_batch(), torch.bfloat16)
    step(frozen, *batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, gradient = step(frozen, *batch)  # raises at a synchronisation
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss) and gradient.abs().sum() > 0


def test_out_of_memory_makes_micro_batches_smaller():
    frozen, batch = freeze(build_llm().cuda(), 1, 64, 0), on_gpu(build_batch((200,) * 64))
    step(freeze(frozen.llm, 1, 1, 0), *batch)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    expected = step(freeze(frozen.llm, 1, 8, 0), *batch)
    _, total = torch.cuda.mem_get_info()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.2 * torch.cuda.max_memory_allocated() / total)
    try:
        found = step(frozen, *batch)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert frozen.micro_batching is not None and frozen.micro_batching.next([202] * 64).samples < 64
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("storage", ["bfloat16", "int8", "int4"])
def test_features_are_copied_from_pinned_memory_before_it_is_reused(storage, tmp_path):
    """More batches than the ring holds, while the device is busy."""
    shape = (4, 32) if storage == "int4" else (64, 64)
    path, keys, _ = make_cache(tmp_path / "cache", counts=(40, 24), dtype=storage, shape=shape)
    cache, order = FeatureCache(path), np.random.default_rng(0).permutation(64).tolist()
    dataset = PrefetchDataset(
        lambda index: {"input_ids": torch.tensor([index]), "labels": torch.tensor([index])}, collate, cache, keys, 4,
        device=torch.device("cuda"),
    )  # fmt: skip
    loader = Accelerator().prepare(DataLoader(dataset, 4, sampler=order, collate_fn=lambda pending: pending))
    busy, seen = torch.randn(4096, 4096, device="cuda"), []
    for batch in loader:
        busy = busy @ busy / 64
        assert batch["features"].is_cuda
        seen.append((batch["input_ids"][:, 0].tolist(), batch["features"].clone()))
    for rows, features in seen:
        torch.testing.assert_close(features.cpu(), cache.read_tensor([keys[row] for row in rows]), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def trained(plain_set, tiny_llama, tiny_clip, tmp_path_factory):
    """Runs both commands on the GPU, on one cache, and returns the losses."""
    root = tmp_path_factory.mktemp("gpu")
    inputs = {"data_path": plain_set.json, "vision_tower": tiny_clip, "feature_cache": root / "cache"}
    run(["python", *extract_command(**inputs, image_folder=plain_set.folder, compute_dtype="bf16", device="cuda")])

    def train(name, **changes):
        flags = {"model_name_or_path": tiny_llama, "use_cpu": False, "bf16": True, "output_dir": root / name, **changes}
        launcher = deepspeed(1) if "deepspeed" in changes else ["python"]
        run([*launcher, *train_command(**inputs, **flags)], CUDA_VISIBLE_DEVICES="0")
        return outcome(root / name).losses

    return train


@pytest.fixture(scope="module")
def plain_losses(trained):
    """Losses without any switch."""
    return trained("plain")


@pytest.mark.parametrize(
    ("needs", "changes"),
    [
        ("torch", {"torch_compile": True}),
        ("torch", {"deepspeed": "pipelines/zero2.json"}),
        ("liger_kernel", {"use_liger_kernel": True}),
        ("flash_attn", {"attn_implementation": "flash_attention_2"}),
    ],
)
def test_faster_kernels_keep_the_losses(trained, plain_losses, needs, changes):
    if not find_spec(needs):
        pytest.skip(f"{needs} is not installed")
    assert trained("-".join(changes), **changes) == pytest.approx(plain_losses, abs=0.02)


@pytest.mark.parametrize("bits", [4, 8])
def test_training_with_a_quantised_llm(trained, bits):
    if not find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is not installed")
    assert len(trained(f"bits-{bits}", bits=bits)) == 6
