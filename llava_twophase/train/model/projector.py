"""``mm_projector``: the module, and its file as LLaVA writes and reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from llava_twophase.errors import UserError, short_repr
from llava_twophase.files import replace_file
from llava_twophase.projectors.build import build_projector as build_projector

FILE = "mm_projector.bin"
# LLaVA's loader strips this and loads with strict=False, so another prefix would silently leave random weights.
_PREFIX = "model.mm_projector."


def save_projector(projector: nn.Module, folder: Path) -> Path:
    """Write ``mm_projector.bin``, a plain dict of CPU tensors under LLaVA's names, atomically.

    Args:
        projector: The trained module; its weights keep their dtype, as in LLaVA.
        folder: Folder of the file.

    Returns:
        The file's path.
    """
    assert all(weight.numel() for weight in projector.parameters()), "under ZeRO-3 the projector must be gathered first"
    state = {_PREFIX + name: tensor.detach().cpu() for name, tensor in projector.state_dict().items()}
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
    return {name.partition("mm_projector.")[2]: tensor for name, tensor in named.items()}


def load_weights(path: str | Path, projector: nn.Module) -> None:
    """Load a projector file into a module of the same kind, strictly.

    Args:
        path: As for ``read_projector``.
        projector: Receives the weights, cast to its own dtype.

    Raises:
        UserError: The file cannot be read, or its names or shapes differ from the module's.
    """
    weights = read_projector(path)
    found, expected = different_shapes(weights, projector)
    if found or expected:
        raise UserError(
            f"{path} holds another projector: it has {short_repr(found, 400)}, this run needs "
            f"{short_repr(expected, 400)}"
        )
    projector.load_state_dict(weights, strict=True)


def different_shapes(
    weights: Mapping[str, torch.Tensor], projector: nn.Module
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Compare weights with those of a module; return the shapes of each that the other does not have."""
    found = {name: list(tensor.shape) for name, tensor in weights.items()}
    expected = {name: list(tensor.shape) for name, tensor in projector.state_dict().items()}
    return (
        {name: shape for name, shape in found.items() if expected.get(name) != shape},
        {name: shape for name, shape in expected.items() if found.get(name) != shape},
    )


def projector_type(weights: Mapping[str, torch.Tensor]) -> str:
    """Return the type of a projector, ``linear`` or ``mlpNx_gelu``, from the names of its weights.

    Raises:
        UserError: The names are those of another module.
    """
    if set(weights) == {"weight", "bias"}:
        return "linear"
    layers = sorted(int(match[1]) for name in weights if (match := re.fullmatch(r"(\d+)\.weight", name)))
    if not layers or layers != list(range(0, 2 * len(layers), 2)):
        raise UserError(
            f"these projector weights are neither linear nor mlpNx_gelu, but {short_repr(sorted(weights))}; give the "
            "--output_dir of their run, whose config.json says what they are"
        )
    return f"mlp{len(layers)}x_gelu"
