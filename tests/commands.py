"""The commands as argument lists, their launchers, and what a training run wrote.

A keyword is a flag: `train_command(data_path=records, max_steps=3)`. A flag whose value is None is not passed, and a
list is passed as several values.
Lists start with the script, so a launcher goes first: `run(["python", *train_command(...)])`, `[*torchrun(2), ...]`.
"""

import json
from typing import NamedTuple

import torch

from helpers import SCRIPTS, free_port

# Small and quick to start: float32, one process, no workers.
EXTRACT_FLAGS = {
    "compute_dtype": "fp32",
    "batch_size": 4,
    "images_per_shard": 8,
    "num_workers": 0,
    "device": "cpu",
}
# LLaVA's recipe on twelve samples: six steps, nothing saved before the end.
TRAIN_FLAGS = {
    "version": "plain",
    "mm_projector_type": "mlp2x_gelu",
    "tune_mm_mlp_adapter": True,
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "evaluation_strategy": "no",
    "save_strategy": "no",
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "warmup_ratio": 0.03,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "model_max_length": 512,
    "lazy_preprocess": True,
    "report_to": "none",
    "use_cpu": True,
}
# For tests that interrupt and resume: 24 steps, a checkpoint at every third, the newest one kept.
CHECKPOINT_FLAGS = {
    "per_device_train_batch_size": 1,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 1,
    "warmup_ratio": 0.1,
    "logging_steps": 2,
}


class Outcome(NamedTuple):
    """What a training run wrote: (step, loss, learning rate) of each log line, and the projector's tensors by name."""

    curve: list
    projector: dict

    @property
    def losses(self):
        return [loss for _, loss, _ in self.curve]


def flag_list(values):
    """Return `{"a": 1}` as `["--a", "1"]`."""
    return [
        part
        for name, value in values.items()
        if value is not None
        for part in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))
    ]


def extract_command(**flags):
    """Return the extraction's command; `data_path`, `image_folder`, `vision_tower` and `feature_cache` are needed."""
    return [SCRIPTS["llava-extract-features"], *flag_list(flags | EXTRACT_FLAGS | flags)]


def train_command(**flags):
    """Return the training's command.

    `model_name_or_path`, `data_path`, `vision_tower`, `output_dir` and `feature_cache` or `image_folder` are needed.
    """
    return [SCRIPTS["llava-train-projector"], *flag_list(TRAIN_FLAGS | flags)]


def checkpoint_command(records, llm, tower, cache, output, **flags):
    """Return a training command that saves checkpoints, without its launcher."""
    inputs = {"data_path": records, "model_name_or_path": llm, "vision_tower": tower, "feature_cache": cache}
    return train_command(**{**CHECKPOINT_FLAGS, **inputs, "output_dir": output, **flags})


def inspect_command(subcommand, *arguments):
    """Return the inspection's command."""
    return [SCRIPTS["llava-inspect-cache"], subcommand, *map(str, arguments)]


def use_command(subcommand, *arguments, **flags):
    """Return the command that uses a trained projector."""
    return [SCRIPTS["llava-use-projector"], subcommand, *map(str, arguments), *flag_list(flags)]


def deepspeed(ranks=2):
    """Return DeepSpeed's launcher with this many ranks."""
    return ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port())]


def torchrun(ranks=2):
    """Return torchrun with this many ranks on one node."""
    return ["torchrun", "--nproc_per_node", str(ranks), "--master_port", str(free_port())]


def outcome(output):
    """Return the `Outcome` of a finished run from its output folder."""
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    lines = [entry for entry in state["log_history"] if "loss" in entry]
    curve = [(entry["step"], entry["loss"], entry["learning_rate"]) for entry in lines]
    return Outcome(curve, torch.load(output / "mm_projector.bin", weights_only=True))


def assert_same_outcome(one, other):
    """Assert that two outcomes are equal bit for bit."""
    assert one.curve == other.curve
    assert one.projector.keys() == other.projector.keys()
    assert all(torch.equal(one.projector[name], other.projector[name]) for name in one.projector)
