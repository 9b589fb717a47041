"""``mm_projector``: the module, and its file as LLaVA writes and reads it.

Shapes: B images, L patch tokens, D tower width, H LLM width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from llava_twophase.errors import UserError
from llava_twophase.files import replace_file

FILE = "mm_projector.bin"
# LLaVA's loader strips this and loads with strict=False, so another prefix would silently leave random weights.
_PREFIX = "model.mm_projector."


def build_projector(kind: str, in_features: int, out_features: int) -> nn.Module:
    """Build ``mm_projector`` with nn.Linear's default init, drawn from torch's global generator.

    Args:
        kind: ``linear`` or ``mlp{N}x_gelu``, N layers with GELU between them.
        in_features: Tower width D.
        out_features: LLM width H.

    Returns:
        A module ``[B, L, D] -> [B, L, H]``.

    Raises:
        UserError: The kind is unknown, or ``identity``, which has nothing to train.
    """
    if kind == "linear":
        return nn.Linear(in_features, out_features)
    if kind == "identity":
        raise UserError(
            "--mm_projector_type identity has no weights, so stage 1 would have nothing to train; "
            "use linear or mlp2x_gelu (LLaVA-1.5)"
        )
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if match is None:
        raise UserError(f"--mm_projector_type {kind} is unknown; expected linear or mlpNx_gelu such as mlp2x_gelu")
    layers: list[nn.Module] = [nn.Linear(in_features, out_features)]
    for _ in range(1, int(match[1])):
        layers += [nn.GELU(), nn.Linear(out_features, out_features)]
    return nn.Sequential(*layers)


def save_projector(projector: nn.Module, folder: Path) -> Path:
    """Write ``mm_projector.bin``, a plain dict of CPU tensors under LLaVA's names, atomically.

    Args:
        projector: The trained module; its weights keep their dtype, as in LLaVA.
        folder: Folder of the file.

    Returns:
        The file's path.
    """
    state = {_PREFIX + name: tensor.detach().cpu() for name, tensor in projector.state_dict().items()}
    assert all(tensor.numel() for tensor in state.values()), "under ZeRO-3 the projector must be gathered first"
    path = folder / FILE
    with replace_file(path) as file:
        torch.save(state, file)
    return path


def read_projector(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the weights of a projector file, whatever prefix their names have.

    Args:
        path: ``mm_projector.bin`` as written here or by LLaVA, or a file of LLaVA's stage 2 with its longer prefixes.

    Returns:
        Tensors on the CPU, named as in the module: ``weight`` and ``bias`` for ``linear``, else ``0.weight``, ...

    Raises:
        UserError: The file cannot be read, or has no projector weights.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises errors of many types
        raise UserError(f"{path} cannot be read as a projector file: {error}") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, expected a dict of projector weights")
    named = {str(name): tensor for name, tensor in state.items() if "mm_projector." in str(name)}
    if not named:
        raise UserError(f"{path} has no mm_projector weights; expected LLaVA's {FILE}")
    return {name.split("mm_projector.")[-1]: tensor for name, tensor in named.items()}


def load_weights(path: str | Path, projector: nn.Module) -> None:
    """Load a projector file into a module of the same kind, strictly.

    Args:
        path: As for ``read_projector``.
        projector: Receives the weights, cast to its own dtype.

    Raises:
        UserError: The file cannot be read, or its names or shapes differ from the module's.
    """
    found = read_projector(path)
    expected = {name: tuple(tensor.shape) for name, tensor in projector.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if shapes != expected:
        raise UserError(f"{path} holds another projector: it has {shapes}, this run needs {expected}")
    projector.load_state_dict(found, strict=True)


def projector_type(weights: Mapping[str, torch.Tensor]) -> str:
    """Return the type of a projector, ``linear`` or ``mlpNx_gelu``, from the names of its weights.

    Raises:
        UserError: The names are those of another module.
    """
    if set(weights) == {"weight", "bias"}:
        return "linear"
    layers = sorted(int(match[1]) for name in weights if (match := re.fullmatch(r"(\d+)\.weight", name)))
    if not layers or layers != list(range(0, 2 * len(layers), 2)):
        raise UserError(f"these projector weights are neither linear nor mlpNx_gelu: {sorted(weights)}")
    return f"mlp{len(layers)}x_gelu"
