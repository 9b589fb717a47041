"""Decisions that all ranks take together: an error on one rank ends all of them with the same message."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from llava_twophase.errors import UserError

T = TypeVar("T")


def on_all_ranks(action: Callable[[], T]) -> T:
    """Run an action on every rank and fail on all ranks if it fails on one.

    Args:
        action: Returns this rank's result.

    Raises:
        UserError: The action raised one on some rank. The message names the rank if the others had no error.
    """
    result, problem = _attempt(action)
    problems = _gather(problem)
    if not any(problems):
        assert result is not None
        return result[0]
    if problem is not None and len(set(problems)) == 1:
        raise UserError(problem)
    raise UserError("; ".join(f"rank {rank}: {text}" for rank, text in enumerate(problems) if text is not None))


def on_main_rank(action: Callable[[], T]) -> T:
    """Run an action on rank 0 alone and return its result on all ranks.

    Args:
        action: Returns something that can be pickled.

    Raises:
        UserError: The action raised one; all ranks raise it.
    """
    if not _several_ranks():
        return action()
    outcome: list[tuple[tuple[T] | None, str | None]] = [(None, None)]
    if dist.get_rank() == 0:
        outcome[0] = _attempt(action)
    dist.broadcast_object_list(outcome, src=0)
    result, problem = outcome[0]
    if result is None:
        raise UserError(problem)
    return result[0]


def _attempt(action: Callable[[], T]) -> tuple[tuple[T] | None, str | None]:
    try:
        return (action(),), None
    except UserError as error:
        return None, str(error)


def _gather(problem: str | None) -> list[str | None]:
    if not _several_ranks():
        return [problem]
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return problems


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
