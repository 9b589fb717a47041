"""Rank, world size and rendezvous address, as torchrun, DeepSpeed or SLURM give them; needs no torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from llava_twophase.errors import UserError

# SLURM numbers the steps of srun from 0. The batch script, interactive shells and other steps of its own have numbers
# from here on.
_SPECIAL_STEPS = 0xFFFFFFF0


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of a run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def owns(self, position: int) -> bool:
        """Return whether this rank extracts the planned shard at a position.

        Args:
            position: The shard's place in the plan of rank 0, from 0.
        """
        return position % self.world_size == self.rank


def ranks_from_environment() -> Ranks:
    """Read rank and world size from the variables of torchrun and DeepSpeed, else from those of a SLURM job step.

    ``sbatch`` and ``salloc`` set ``SLURM_NTASKS`` in their shells too, but a program that is started there is one
    process: only the variables of a step, which ``srun`` starts, describe ranks.

    Raises:
        UserError: A variable is not an integer.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return Ranks(_integer(env, "RANK"), _integer(env, "WORLD_SIZE"), _integer(env, "LOCAL_RANK"))
    tasks = _integer(env, "SLURM_STEP_NUM_TASKS")
    if tasks > 1 and "SLURM_PROCID" in env and _integer(env, "SLURM_STEP_ID") < _SPECIAL_STEPS:
        return Ranks(_integer(env, "SLURM_PROCID"), tasks, _integer(env, "SLURM_LOCALID"))
    return Ranks()


def export_slurm_ranks() -> None:
    """Set the variables that torch.distributed reads, in a job step of several ranks that no launcher has set them for.

    Raises:
        UserError: A variable is not an integer, or the node list cannot be read.
    """
    ranks = ranks_from_environment()
    if "RANK" in os.environ or ranks.world_size == 1:
        return
    host, port = rendezvous_address()
    # With --gpus-per-task, each rank sees its own GPU alone.
    alone = len(os.environ.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1
    values = {"RANK": ranks.rank, "WORLD_SIZE": ranks.world_size, "LOCAL_RANK": 0 if alone else ranks.local_rank}
    os.environ.update({name: str(value) for name, value in values.items()}, MASTER_ADDR=host, MASTER_PORT=str(port))


def rendezvous_address() -> tuple[str, int]:
    """Return host and port at which rank 0 is reached.

    torchrun and DeepSpeed set MASTER_ADDR and MASTER_PORT. Under plain srun, the host is the first node of the step,
    and the port follows from the numbers of job and step.

    Raises:
        UserError: The node list cannot be read, or a variable is not an integer.
    """
    env = os.environ
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or "127.0.0.1"
    job = _integer(env, "SLURM_JOB_ID") + _integer(env, "SLURM_STEP_ID")
    port = _integer(env, "MASTER_PORT") or 20000 + job % 20000
    return env.get("MASTER_ADDR") or expand_hosts(nodes)[0], port


def expand_hosts(nodes: str) -> list[str]:
    """Expand a SLURM node list such as ``gpu[003-007,12],login1``, with ``scontrol`` if it is installed.

    Raises:
        UserError: It cannot be read.
    """
    if shutil.which("scontrol"):
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()
    hosts: list[str] = []
    for name in re.split(r",(?![^\[]*\])", nodes):
        parts = re.split(r"(\[[^\[\]]*\])", name)
        if not name or any(("[" in part or "]" in part) != (place % 2 == 1) for place, part in enumerate(parts)):
            raise _unreadable(nodes)
        choices = [_numbers(part[1:-1], nodes) if place % 2 else [part] for place, part in enumerate(parts)]
        hosts += ["".join(chosen) for chosen in product(*choices)]
    return hosts


def _numbers(ranges: str, nodes: str) -> list[str]:
    # "003-005,12" to 003, 004, 005, 12.
    numbers: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise _unreadable(nodes)
        width = len(match[1])
        numbers += [f"{number:0{width}d}" for number in range(int(match[1]), int(match[2] or match[1]) + 1)]
    return numbers


def _unreadable(nodes: str) -> UserError:
    return UserError(f"the SLURM node list {nodes!r} cannot be read; set MASTER_ADDR to the host of rank 0")


def _integer(env: Mapping[str, str], name: str) -> int:
    value = env.get(name) or "0"
    try:
        return int(value)
    except ValueError:
        raise UserError(f"the environment variable {name} is {value!r}, expected an integer") from None
