"""The device of a command's ``--device`` flag."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava_twophase.cpu import limit_torch_threads
from llava_twophase.errors import UserError

if TYPE_CHECKING:
    import torch


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return a device that works; on a CPU, torch gets as many threads as this process may use.

    Args:
        name: ``auto`` (the GPU of this rank, else the CPU), or a torch device such as ``cuda:1``.
        local_rank: This process's number on its node.

    Raises:
        UserError: The device does not exist or cannot be used.
    """
    import torch

    if name == "auto":
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
        raise UserError(f"--device {name} cannot be used: {str(error).partition(chr(10))[0]}") from None
    device = torch.device(name)
    if device.type == "cpu":
        limit_torch_threads()
    return device
