"""Command 2 over tiny inputs, as the training tests start it."""

import json

import torch

from helpers import free_port

LOSS = ("step", "loss", "learning_rate")


def command(records, llm, tower, cache, output, **changes):
    """Command 2 without its launcher."""
    flags = {
        "model_name_or_path": llm,
        "data_path": records,
        "vision_tower": tower,
        "feature_cache": cache,
        "mm_projector_type": "mlp2x_gelu",
        "tune_mm_mlp_adapter": True,
        "output_dir": output,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 1,
        "save_strategy": "steps",
        "save_steps": 3,
        "save_total_limit": 1,
        "learning_rate": 1e-3,
        "warmup_ratio": 0.1,
        "lr_scheduler_type": "cosine",
        "logging_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        **changes,
    }
    return [
        "pipelines/train_projector.py",
        *(part for name, value in flags.items() for part in (f"--{name}", str(value))),
    ]


def deepspeed(ranks=2):
    """DeepSpeed's launcher with so many CPU ranks."""
    return ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port())]


def outcome(output):
    """The loss curve of a finished run, and its projector."""
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    curve = [tuple(entry[name] for name in LOSS) for entry in state["log_history"] if "loss" in entry]
    return curve, torch.load(output / "mm_projector.bin", weights_only=True)


def assert_equal(one, other):
    """Two outcomes, bit for bit."""
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])
