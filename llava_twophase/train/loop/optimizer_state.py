"""Carry the optimizer's state over to another engine or another number of ranks.

A checkpoint of DeepSpeed has the optimizer's state in one file per rank, and only as many ranks of the same ZeRO stage
can load it. Here the state is read by the names of the parameters: float32 weights and AdamW's moments.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers.training_args import OptimizerNames

from llava_twophase.compat import deepspeed_config, parameter_shape
from llava_twophase.errors import UserError
from llava_twophase.train.compat import (
    MOMENTS,
    load_best_instead,
    load_instead,
    load_zero_optimizer,
    read_zero_checkpoint,
)
from llava_twophase.train.layout import Layout
from llava_twophase.train.loop.agreement import on_main_rank
from llava_twophase.train.loop.checkpoints import read_record
from llava_twophase.train.model.load_llm import gathered

_ADAMW = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)
_SCHEDULER, _SCALER = "scheduler.pt", "scaler.pt"
_WORK = "optimizer_state"  # folder for the conversion, inside the run's folder


@dataclass(frozen=True)
class OptimizerState:
    """State that does not depend on ranks and engine.

    Attributes:
        tensors: By name of the trained parameter: ``fp32`` (its weights), ``exp_avg`` and ``exp_avg_sq``, float32.
        step: AdamW's step count.
        buffers: By name, those of a projector that has some.
    """

    tensors: dict[str, dict[str, torch.Tensor]]
    step: float
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)


def require_portable(checkpoint: Path | None, layout: Layout | None, training: Any) -> None:
    """Check that a run can take over the optimizer's state of a checkpoint from other ranks or another engine.

    Args:
        checkpoint: The checkpoint; None without one.
        layout: The layout of the run that wrote it.
        training: The arguments of this run.

    Raises:
        UserError: It cannot.
    """
    here = Layout.of(training)
    if checkpoint is None or layout is None or here.shards_optimizer_like(layout):
        return
    config = deepspeed_config(training) or {}
    problem = None
    if OptimizerNames(training.optim) not in _ADAMW:
        problem = f"the state of --optim {OptimizerNames(training.optim).value}"
    elif "scheduler" in config or not (checkpoint / _SCHEDULER).is_file():
        problem = 'the state of a "scheduler" in the configuration of --deepspeed'
    if problem is not None:
        raise UserError(
            f"{checkpoint} was written by {layout}, this run has {here}: {problem} cannot be carried over; use the "
            "same number of processes and the same ZeRO stage"
        )


def load_portably(trainer: Any, checkpoint: Path | None, layout: Layout | None) -> None:
    """Let a trainer load checkpoints whose optimizer is sharded in another way, also as the best one at the end.

    Args:
        trainer: An HF Trainer before ``train``.
        checkpoint: The checkpoint to resume from; None without one.
        layout: The layout of the run that wrote it.
    """
    here = Layout.of(trainer.args)

    def load_best() -> bool:
        best = Path(str(trainer.state.best_model_checkpoint))
        written = read_record(best).layout
        if here.shards_optimizer_like(written):
            return False
        _load_weights(trainer.model, _read_on_main_rank(trainer, best, written))
        return True

    load_best_instead(trainer, load_best)
    if checkpoint is not None and layout is not None and not here.shards_optimizer_like(layout):
        load_instead(trainer, lambda: load_state(trainer, checkpoint, layout))


def read_state(checkpoint: Path, layout: Layout, names: Sequence[str], buffers: Collection[str] = ()) -> OptimizerState:
    """Read a checkpoint of any layout.

    Args:
        checkpoint: The checkpoint.
        layout: The layout of the run that wrote it.
        names: Names of the trained parameters in the optimizer's order.
        buffers: Names of the projector's buffers.
    """
    path = checkpoint / "model.safetensors"
    weights = load_file(path) if path.is_file() else {}
    kept = {name: weights[name] for name in buffers if name in weights}
    if layout.zero_stage is not None:
        work = checkpoint.parent / _WORK
        shutil.rmtree(work, ignore_errors=True)
        try:
            folder = checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()
            return OptimizerState(*read_zero_checkpoint(folder, work), kept)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    content = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    indices = [index for group in content["param_groups"] for index in group["params"]]
    states = {name: content["state"][index] for name, index in zip(names, indices, strict=True)}
    tensors = {
        name: {"fp32": weights[name].float(), **{key: state[key] for key in MOMENTS}} for name, state in states.items()
    }
    return OptimizerState(tensors, float(states[names[0]]["step"]), kept)


def load_state(trainer: Any, checkpoint: Path, layout: Layout) -> None:
    """Load a checkpoint of another layout: weights, moments, scheduler, learning rates and scaler.

    Args:
        trainer: An HF Trainer with optimizer and scheduler, about to train.
        checkpoint: The checkpoint.
        layout: The layout of the run that wrote it.
    """
    state = _read_on_main_rank(trainer, checkpoint, layout)
    _load_weights(trainer.model, state)
    if trainer.is_deepspeed_enabled:
        load_zero_optimizer(trainer.deepspeed, state.tensors, state.step)
        trainer.deepspeed.global_steps = trainer.state.global_step
    else:
        _load_optimizer(trainer, state)
    trainer.lr_scheduler.load_state_dict(torch.load(checkpoint / _SCHEDULER, weights_only=True))
    for group, rate in zip(trainer.optimizer.param_groups, trainer.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    scaler = getattr(trainer.accelerator, "scaler", None)
    if scaler is not None and (checkpoint / _SCALER).is_file():
        scaler.load_state_dict(torch.load(checkpoint / _SCALER, weights_only=True))


def _read_on_main_rank(trainer: Any, checkpoint: Path, layout: Layout) -> OptimizerState:
    shapes = {name: parameter_shape(parameter) for name, parameter in trainer.model.named_parameters()}
    buffers = [name for name, _ in trainer.model.named_buffers()]
    state = on_main_rank(lambda: read_state(checkpoint, layout, parameter_order(trainer), buffers))
    tensors = {
        name: {key: value.view(shapes[name]) for key, value in tensors.items()}
        for name, tensors in state.tensors.items()
    }
    return OptimizerState(tensors, state.step, state.buffers)


def parameter_order(trainer: Any) -> list[str]:
    """Return the names of the trained parameters in the optimizer's order: first those with weight decay."""
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    return sorted(names, key=lambda name: name not in decayed)


def _load_weights(module: nn.Module, state: OptimizerState) -> None:
    with gathered(module, modified=True), torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:  # others never change
                parameter.copy_(state.tensors[name]["fp32"])
        for name, buffer in module.named_buffers():
            if name in state.buffers:
                buffer.copy_(state.buffers[name])


def _load_optimizer(trainer: Any, state: OptimizerState) -> None:
    order = parameter_order(trainer)
    moments = [{key: state.tensors[name][key] for key in MOMENTS} for name in order]
    states = {index: {"step": torch.tensor(state.step), **tensors} for index, tensors in enumerate(moments)}
    groups = trainer.optimizer.state_dict()["param_groups"]
    trainer.optimizer.load_state_dict({"state": states, "param_groups": groups})
