"""Undocumented API of HF Trainer and DeepSpeed that resuming with another engine or number of ranks needs.

As ``llava_twophase.compat``: libraries are imported inside the functions.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Keys of AdamW's moments in an optimizer's state."""


def load_instead(trainer: Any, load: Callable[[], None]) -> None:
    """Let a trainer that resumes take progress and samples from a checkpoint, and all else from a function.

    Args:
        trainer: An HF Trainer.
        load: Loads model, optimizer, scheduler and scaler; called where ``Trainer`` would do so.
    """
    prepare = trainer._prepare_for_training

    def prepare_and_load(max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        prepared = prepare(max_steps, train_dataloader, None)
        load()
        return prepared

    trainer._prepare_for_training = prepare_and_load
    trainer._load_from_checkpoint = lambda *_: None


def load_best_instead(trainer: Any, load: Callable[[], bool]) -> None:
    """Call a function where ``Trainer`` loads the best checkpoint; ``Trainer`` does so itself if it returns False."""
    load_best = trainer._load_best_model
    trainer._load_best_model = lambda: None if load() else load_best()


def read_zero_checkpoint(folder: Path, work: Path) -> tuple[dict[str, dict[str, torch.Tensor]], float]:
    """Read weights and AdamW's moments of a ZeRO checkpoint, through DeepSpeed's universal format.

    Args:
        folder: What ``save_checkpoint`` wrote, with the optimizer's state in one file per rank.
        work: A folder for about as many bytes again.

    Returns:
        By name of the trained parameter: ``fp32`` (master weights), ``exp_avg``, ``exp_avg_sq``, float32, flat or in
        the parameter's shape; and the optimizer's step count.
    """
    import torch
    from deepspeed.checkpoint import ds_to_universal

    options = SimpleNamespace(
        input_folder=str(folder),
        output_folder=str(work / "universal"),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):  # progress bars
        ds_to_universal.main(options)

    def read(path: Path) -> Any:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return content["param"] if isinstance(content, dict) else content

    parameters = sorted(path.parent for path in (work / "universal" / "zero").glob(f"*/{MOMENTS[0]}.pt"))
    tensors = {path.name: {key: read(path / f"{key}.pt") for key in ("fp32", *MOMENTS)} for path in parameters}
    step = parameters[0] / "step.pt"
    if step.is_file():  # ZeRO-1 and ZeRO-2
        return tensors, float(read(step))
    common = torch.load(work / "universal" / "zero" / "optimizer_state.pt", map_location="cpu", weights_only=False)
    return tensors, float(common["optimizer_state_dict"]["state"][0]["step"])


def load_zero_optimizer(engine: Any, tensors: dict[str, dict[str, torch.Tensor]], step: float) -> None:
    """Set master weights and AdamW's moments of a ZeRO engine that has not made a step; all ranks must call it.

    DeepSpeed's own loader of universal checkpoints is not used. Under ZeRO-3 it gives all parameter groups the
    hyperparameters of the first one and one common step count, which each group then increments (0.19.8).

    Args:
        engine: A DeepSpeed engine of stage 1, 2 or 3.
        tensors: As ``read_zero_checkpoint`` returns them, for every trained parameter of the module, in its shape.
        step: The optimizer's step count.
    """
    import torch
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    zero = engine.optimizer
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    partitions = next(getattr(zero, name) for name in names if hasattr(zero, name))
    is_torchs = isinstance(zero.optimizer, torch.optim.Adam)
    for partition in partitions:
        moments = {key: torch.zeros_like(partition.detach()) for key in MOMENTS}
        # DeepSpeed's own Adam counts with a number.
        zero.optimizer.state[partition] = {"step": torch.tensor(step) if is_torchs else int(step), **moments}
    is_partitioned = engine.zero_optimization_partition_weights()
    if not is_partitioned:
        zero._lazy_init_hp_params_optimizer_state()
    trained = {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        values = tensors[name]
        if is_partitioned:
            # Not by safe_set_full_*, which fails where the ranks do not divide the number of weights.
            values = {key: _local_part(parameter, value) for key, value in values.items()}
        set_weight = safe_set_local_fp32_param if is_partitioned else safe_set_full_fp32_param
        set_state = safe_set_local_optimizer_state if is_partitioned else safe_set_full_optimizer_state
        set_weight(parameter, values["fp32"])
        for key in MOMENTS:
            set_state(parameter, values[key], key)


def _local_part(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    # This rank's part of a ZeRO-3 parameter, the last one padded with zeros.
    import torch

    size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
    flat = value.flatten()
    padding = flat.new_zeros(size * torch.distributed.get_world_size() - flat.numel())
    return torch.cat([flat, padding])[rank * size : (rank + 1) * size]
