"""Pieces of gpu.py that use the project's commands and classes: memory, launchers, quantised LLMs, reencode, delivery.

    python tests/benchmarks/gpu_commands.py zero2             # full shapes, on a GPU
    python tests/benchmarks/gpu_commands.py zero2 --rehearse  # tiny shapes, on a CPU too

The last line is one JSON object. Inputs are made once, below ./inputs.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "benchmarks")]

import train_step  # noqa: E402

import extract  # noqa: E402
from cache.make import make_cache  # noqa: E402
from commands import deepspeed, extract_command, inspect_command, train_command  # noqa: E402
from llava_twophase.cache.reader import FeatureCache  # noqa: E402
from llava_twophase.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX  # noqa: E402
from llava_twophase.train.data.collator import collate  # noqa: E402
from llava_twophase.train.data.prefetch import PrefetchDataset  # noqa: E402
from llava_twophase.train.model.activation_memory import analytic_estimate, measure_activations  # noqa: E402
from llava_twophase.train.model.frozen_llm import FrozenLLM  # noqa: E402
from llava_twophase.train.model.load_llm import LoadedLLM  # noqa: E402
from tiny import write_clip, write_llama  # noqa: E402

DEVICE = train_step.DEVICE
CAPTION = "a red car beside a tree and two people at the sea"


@dataclass(frozen=True)
class Size:
    """What the pieces work on.

    Attributes:
        images: Drawn pictures, and so records.
        llm: Fields of the LLM's configuration.
        shape: Of ``train_step.py``, for the memory piece.
        batch: Samples of a training batch.
        rows: Rows of the delivery piece.
    """

    images: int
    llm: dict[str, int]
    shape: str
    batch: int
    rows: int


FULL = Size(
    images=256,
    llm={
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    shape="1b",
    batch=16,
    rows=2048,
)
TINY = Size(images=8, llm={"max_position_embeddings": 2048}, shape="tiny", batch=2, rows=64)


def memory(size: Size, rehearse: bool) -> dict[str, Any]:
    """Compare the peak of a step with the trainer's own estimate, for micro-batches of several sizes."""
    found = {}
    shape = train_step.SHAPES[size.shape]
    with DEVICE:
        llm = train_step.LlamaForCausalLM._from_config(shape.config(), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for samples, length, checkpoint_every in ((1, 32, 0), (4, 32, 0), (4, 256, 0), (16, 32, 0), (16, 32, 1)):
        ids = torch.randint(3, shape.vocabulary, (samples, length), generator=generator)
        ids[:, 0], ids[:, 1] = 1, IMAGE_TOKEN_INDEX
        labels = ids.clone()
        labels[:, :2] = IGNORE_INDEX
        ids, labels = ids.to(DEVICE), labels.to(DEVICE)
        features = torch.randn(samples, train_step.PATCHES, shape.hidden, device=DEVICE, dtype=torch.bfloat16)
        frozen = FrozenLLM(LoadedLLM(llm), 1, samples, checkpoint_every)
        _step(frozen, features[:1], ids[:1], labels[:1])  # one-time allocations
        estimate = analytic_estimate(shape.config(), train_step.PATCHES, features.element_size())
        estimate = measure_activations(llm, frozen.splice(features[:1], ids[:1]), estimate)
        before = _reset_peak()
        _step(frozen, features, ids, labels)
        peak = train_step.peak_memory() - before
        estimated = estimate.needed(samples, length, checkpoint_every)
        found[f"{samples} x {length} ids, checkpointing {checkpoint_every}"] = {
            "peak_gb": round(peak / 1e9, 4),
            "estimated_gb": round(estimated / 1e9, 4),
            "peak_over_estimate": round(peak / estimated, 3),
        }
    return found


def _step(frozen: FrozenLLM, features: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor) -> None:
    leaf = features.clone().requires_grad_()
    frozen.loss(leaf, ids, labels, [ids.shape[1]] * len(ids)).backward()


def _reset_peak() -> int:
    gc.collect()
    train_step.reset_peak_memory()
    return torch.cuda.memory_allocated() if DEVICE.type == "cuda" else train_step.peak_memory()


def inputs_of(size: Size) -> dict[str, Path]:
    """Write, once, pictures, records, a tower, an LLM and a feature cache; return the flags that take them."""
    folder = Path("inputs-tiny" if size is TINY else "inputs").resolve()
    tower, llm, images = folder / "tower", folder / "llm", folder / "images"
    flags = {"data_path": folder / "records.json", "vision_tower": tower, "feature_cache": folder / "cache"}
    if not (folder / "made").exists():
        images.mkdir(parents=True, exist_ok=True)
        keys = extract.write_pictures(images, size.images)
        records = [
            {
                "id": key,
                "image": key,
                "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": CAPTION}],
            }
            for key in keys
        ]
        (folder / "records.json").write_text(json.dumps(records), encoding="utf-8")
        if size is TINY:
            write_clip(tower)
        else:
            tower.mkdir(exist_ok=True)
            extract.write_tower(tower, layers=24)
        write_llama(llm, [CAPTION], **size.llm)
        dtype = {"compute_dtype": "bf16", "device": DEVICE.type, "batch_size": 32, "images_per_shard": 128}
        _run(["python", *extract_command(**flags, image_folder=images, **dtype)])
        (folder / "made").touch()
    return {**flags, "model_name_or_path": llm}


def _run(command: Sequence[Any]) -> str:
    if command[0] == "python":
        command = [sys.executable, *command[1:]]
    elif command[0] == "deepspeed":
        command = [sys.executable, "-m", "deepspeed.launcher.runner", *command[1:]]
    # The commands of the tests are relative to the repository.
    done = subprocess.run(
        [str(part) for part in command], cwd=TESTS.parent, check=True, stdout=subprocess.PIPE, encoding="utf-8"
    )
    return done.stdout


def _train(name: str, size: Size, launcher: Sequence[str] = ("python",), **changes: Any) -> dict[str, Any]:
    """Train six steps, and return what its last log line says."""
    output = Path(f"run-{name}").resolve()
    flags = {"bf16": True, "use_cpu": DEVICE.type == "cpu", "per_device_train_batch_size": size.batch, "max_steps": 6}
    inputs, started = inputs_of(size), time.monotonic()
    _run([*launcher, *train_command(**inputs, output_dir=output, **{**flags, **changes})])
    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    names = ("samples_per_second", "tflops_per_device", "memory_gb", "data_wait_percent", "loss")
    middle = {name: statistics.median(entry[name] for entry in steps[1:]) for name in names if name in steps[-1]}
    return {**middle, "seconds": round(time.monotonic() - started, 1)}


def plain(size: Size, rehearse: bool) -> dict[str, Any]:
    """Train without a launcher."""
    return _train("plain", size)


def zero2(size: Size, rehearse: bool) -> dict[str, Any]:
    """Train under DeepSpeed with ZeRO-2 on one rank."""
    return _train("zero2", size, deepspeed(1), deepspeed=TESTS.parent / "pipelines" / "zero2.json")


def zero3(size: Size, rehearse: bool) -> dict[str, Any]:
    """Train under DeepSpeed with ZeRO-3 on one rank."""
    return _train("zero3", size, deepspeed(1), deepspeed=TESTS.parent / "pipelines" / "zero3.json")


def bits8(size: Size, rehearse: bool) -> dict[str, Any]:
    """Train with the LLM's weights in 8 bits, which needs a GPU."""
    return {"skipped": "needs a GPU"} if DEVICE.type == "cpu" else _train("bits-8", size, bits=8)


def bits4(size: Size, rehearse: bool) -> dict[str, Any]:
    """Train with the LLM's weights in 4 bits, which needs a GPU."""
    return {"skipped": "needs a GPU"} if DEVICE.type == "cpu" else _train("bits-4", size, bits=4)


def reencode(size: Size, rehearse: bool) -> dict[str, Any]:
    """Compare a cache that the CPU wrote with this device's features, and one that this device wrote."""
    inputs = inputs_of(size)
    images, tower = inputs["data_path"].parent / "images", inputs["vision_tower"]
    few = Path("few.json").resolve()
    few.write_text(json.dumps(json.loads(inputs["data_path"].read_text(encoding="utf-8"))[:8]), encoding="utf-8")
    caches = {"device": inputs["feature_cache"], "cpu": Path("cpu-cache").resolve()}
    own = {"data_path": few, "vision_tower": tower, "image_folder": images, "feature_cache": caches["cpu"]}
    _run(["python", *extract_command(**own, compute_dtype="bf16", device="cpu")])
    found = {}
    for name, cache in caches.items():
        command = inspect_command(
            "reencode", cache, "--image_folder", images, "--device", DEVICE.type, "--n", 8, "--json"
        )
        found[f"cache written on the {name}"] = json.loads(_run(["python", *command]).splitlines()[-1])
    return found


def delivery(size: Size, rehearse: bool) -> dict[str, Any]:
    """Measure the rate from a cache in memory to batches on the device."""
    shape = (64, 64) if rehearse else (576, 1024)
    folder = Path("delivery-tiny" if rehearse else "delivery").resolve()
    if folder.exists():
        keys = list(FeatureCache(folder).keys())
    else:
        _, keys, _ = make_cache(folder, counts=(size.rows // 2, size.rows - size.rows // 2), shape=shape)
    cache, generator = FeatureCache(folder), np.random.default_rng(0)
    rates = []
    for _ in range(3):
        dataset = PrefetchDataset(_sample, collate, cache, keys, 32, device=DEVICE if DEVICE.type == "cuda" else None)
        order = generator.permutation(len(keys)).tolist()
        batches = [order[start : start + 32] for start in range(0, len(order), 32)]
        started, rows = train_step._now(), 0
        ahead = dataset.__getitems__(batches[0])
        for batch in [*batches[1:], []]:
            pending, ahead = ahead, dataset.__getitems__(batch or batches[0])
            rows += len(pending.to(DEVICE)["features"])
        rates.append(rows / (train_step._now() - started))
    rate = statistics.median(rates)
    return {"gb_per_second": round(rate * shape[0] * shape[1] * 2 / 1e9, 4), "rows_per_second": round(rate, 1)}


def _sample(index: int) -> dict[str, torch.Tensor]:
    ids = torch.tensor([1, IMAGE_TOKEN_INDEX, 5, 6])
    return {"input_ids": ids, "labels": ids}


PIECES: dict[str, Callable[[Size, bool], dict[str, Any]]] = {
    "memory": memory,
    "plain": plain,
    "zero2": zero2,
    "zero3": zero3,
    "bits8": bits8,
    "bits4": bits4,
    "reencode": reencode,
    "delivery": delivery,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("piece", choices=PIECES)
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes")
    args = parser.parse_args()
    print(json.dumps(PIECES[args.piece](TINY if args.rehearse else FULL, args.rehearse)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
