"""Build a projector by its type, check what it returns, and count tokens, parameters and FLOPs without weights.

Shapes: B images, L patch tokens, D tower width, L' image tokens, H LLM width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from llava_twophase.errors import UserError, short_repr
from llava_twophase.projectors.find import describe_failure, find_class, source_digests
from llava_twophase.projectors.grid import square_grid
from llava_twophase.projectors.mlp import build_mlp
from llava_twophase.projectors.names import is_llava


@dataclass(frozen=True)
class ProjectorSpec:
    """What a projector is built from.

    Attributes:
        kind: ``--mm_projector_type``.
        patches: L, tokens of the vision tower.
        tower_width: D.
        llm_width: H.
        kwargs: ``--mm_projector_kwargs``.
    """

    kind: str
    patches: int
    tower_width: int
    llm_width: int
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the flags, for messages."""
        kwargs = f" --mm_projector_kwargs '{json.dumps(dict(self.kwargs))}'" if self.kwargs else ""
        return f"--mm_projector_type {self.kind}{kwargs}"


@dataclass(frozen=True)
class ProjectorSize:
    """How large a projector is.

    Attributes:
        tokens: L', positions of the LLM that one image takes.
        parameters: Trainable weights.
        flops: Floating-point operations of the forward pass of one image.
    """

    tokens: int
    parameters: int
    flops: int


def require_projector(kind: str, kwargs: Mapping[str, Any]) -> None:
    """Check a projector type as far as is possible without knowing the features.

    Raises:
        UserError: The type is unknown, its class is not found, or the arguments do not fit.
    """
    if not is_llava(kind):
        find_class(kind, kwargs)
    elif kwargs:
        raise UserError(f"--mm_projector_kwargs: LLaVA's {kind} takes no arguments; remove the flag")


def build_projector(
    kind: str, in_features: int, out_features: int, patches: int = 0, kwargs: Mapping[str, Any] | None = None
) -> nn.Module:
    """Build ``mm_projector`` with initial weights drawn from torch's global generator.

    Args:
        kind: ``linear``, ``mlp{N}x_gelu``, a short name of ``projectors.names.SHIPPED``, or
            ``package.module:ClassName``.
        in_features: Tower width D.
        out_features: LLM width H.
        patches: Tokens L of the features; LLaVA's own types do not need it.
        kwargs: Further arguments of the class.

    Returns:
        A module ``[B, L, D] -> [B, L', H]``.

    Raises:
        UserError: The type is unknown, or cannot be built for these features with these arguments.
    """
    kwargs = kwargs or {}
    require_projector(kind, kwargs)
    if is_llava(kind):
        return build_mlp(kind, in_features, out_features)
    spec = ProjectorSpec(kind, patches, in_features, out_features, kwargs)
    try:
        return find_class(kind, kwargs)(in_features, out_features, square_grid(patches), **kwargs)
    except UserError:
        raise
    except Exception as error:  # a user's class may raise anything
        raise UserError(f"{spec} cannot be built: {describe_failure(error)}") from error


def check_projector(projector: nn.Module, spec: ProjectorSpec) -> int:
    """Run a projector forward and backward on random features, and return its number of image tokens L'.

    Weights, buffers and torch's generator are unchanged afterwards.

    Raises:
        UserError: It fails, or returns another shape than ``[B, L', H]``, another L' for other features, or values that
            are not finite; or it has weights that get no gradient or are shared.
    """
    if is_llava(spec.kind):
        return spec.patches
    _require_own_weights(projector, spec)
    generator = torch.Generator().manual_seed(0)
    shape = (2, spec.patches, spec.tower_width)
    buffers = {name: buffer.clone() for name, buffer in projector.named_buffers()}
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        random = _run(projector, spec, torch.randn(shape, generator=generator))
        other = _run(projector, spec, torch.ones(1, *shape[1:]))
        _require_gradients(projector, spec, random)
    for name, buffer in projector.named_buffers():
        buffer.copy_(buffers[name])  # running statistics of a BatchNorm, for example
    if random.shape[1] != other.shape[1]:
        raise UserError(
            f"{spec} returned {random.shape[1]} tokens for some features and {other.shape[1]} for others; the number "
            "must be the same for every image"
        )
    if not torch.isfinite(random).all():
        raise UserError(f"{spec} returned values that are not finite for normal random features, before any training")
    return int(random.shape[1])


def projector_record(projector: nn.Module, spec: ProjectorSpec, tokens: int) -> dict[str, Any]:
    """Return what ``config.json`` records about a projector beside its type; nothing for LLaVA's own types.

    Args:
        projector: The module.
        spec: What it was built from.
        tokens: L', as ``check_projector`` returned it.
    """
    if is_llava(spec.kind):
        return {}
    return {
        "mm_projector_input": [spec.patches, spec.tower_width],
        "mm_projector_kwargs": dict(spec.kwargs),
        "mm_projector_output": [tokens, spec.llm_width],
        "mm_projector_source": source_digests(projector),
    }


def recorded_spec(config: Mapping[str, Any]) -> ProjectorSpec | None:
    """Return what a projector that LLaVA does not have was built from; None for another ``config.json``.

    Args:
        config: The ``config.json`` of its run.
    """
    if "mm_projector_input" not in config:
        return None
    (patches, tower_width), (_, llm_width) = config["mm_projector_input"], config["mm_projector_output"]
    return ProjectorSpec(config["mm_projector_type"], patches, tower_width, llm_width, config["mm_projector_kwargs"])


def measure_projector(spec: ProjectorSpec) -> ProjectorSize:
    """Return the size of a projector, without memory for its weights where its class allows that.

    Raises:
        UserError: It cannot be built or run.
    """
    try:
        return _measure(spec, "meta")
    except Exception:  # a user's class that reads a value, which the meta device does not have, or one that fails
        return _measure(spec, "cpu")


def _measure(spec: ProjectorSpec, device: str) -> ProjectorSize:
    with torch.random.fork_rng(devices=[]), torch.device(device), torch.enable_grad():
        projector = build_projector(spec.kind, spec.tower_width, spec.llm_width, spec.patches, spec.kwargs)
        counter = FlopCounterMode(display=False)
        features = torch.ones(1, spec.patches, spec.tower_width)
        with counter:
            projected = _run(projector, spec, features)
    weights = sum(parameter.numel() for parameter in projector.parameters() if parameter.requires_grad)
    return ProjectorSize(tokens=int(projected.shape[1]), parameters=weights, flops=counter.get_total_flops())


def _run(projector: nn.Module, spec: ProjectorSpec, features: torch.Tensor) -> torch.Tensor:
    try:
        projected = projector(features)
    except Exception as error:  # a user's class may raise anything
        raise UserError(
            f"{spec} failed on features of shape {list(features.shape)}: {describe_failure(error)}"
        ) from error
    found = list(projected.shape) if isinstance(projected, torch.Tensor) else short_repr(type(projected))
    expected = [len(features), "tokens", spec.llm_width]
    if not isinstance(projected, torch.Tensor) or projected.ndim != 3 or found[::2] != expected[::2] or not found[1]:
        raise UserError(
            f"{spec} returned {found} for features of shape {list(features.shape)}; expected a tensor "
            f"[{len(features)}, tokens, {spec.llm_width}], tokens at least 1 and the last number the LLM's width"
        )
    if not projected.is_floating_point():
        raise UserError(f"{spec} returned {projected.dtype}; expected a floating-point tensor")
    return projected


def _require_own_weights(projector: nn.Module, spec: ProjectorSpec) -> None:
    names = {name for name, _ in projector.named_parameters(remove_duplicate=False)}
    shared = sorted(names - {name for name, _ in projector.named_parameters()})
    if shared:
        raise UserError(
            f"{spec}: {', '.join(shared[:5])} is the same tensor as another weight; checkpoints need one name for "
            "each, so register it once"
        )
    if not any(parameter.requires_grad for parameter in projector.parameters()):
        raise UserError(f"{spec} has no trainable weights, so stage 1 would have nothing to train")


def _require_gradients(projector: nn.Module, spec: ProjectorSpec, projected: torch.Tensor) -> None:
    weights = {name: weight for name, weight in projector.named_parameters() if weight.requires_grad}
    if projected.requires_grad:
        gradients = torch.autograd.grad(projected.float().sum(), list(weights.values()), allow_unused=True)
        weights = {
            name: weight for (name, weight), found in zip(weights.items(), gradients, strict=True) if found is None
        }
    if weights:
        raise UserError(
            f"{spec}: {', '.join(list(weights)[:5])} gets no gradient, because the output does not depend on it; use "
            "it, or remove it, or set requires_grad to False"
        )
