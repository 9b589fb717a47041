"""Decisions that all ranks take together, and what is said if a rank is lost.

An error on one rank ends all of them with the same message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

from llava_twophase.compat import is_lost_rank
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


@contextmanager
def explain_lost_ranks(timeout: int) -> Iterator[None]:
    """Turn the error of an operation between ranks into a message that says what to do.

    Args:
        timeout: ``--ddp_timeout`` in seconds.

    Raises:
        UserError: Another rank ended or could not be reached.
    """
    try:
        yield
    except RuntimeError as error:
        if not _several_ranks() or not is_lost_rank(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"rank {dist.get_rank()} lost contact with another rank ({reason}). The first error of the others is the "
            f"cause; without one, a process was killed, a node failed, or the network was down for {timeout} s "
            "(--ddp_timeout). Run the same command again: it resumes from the last complete checkpoint"
        ) from error


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
