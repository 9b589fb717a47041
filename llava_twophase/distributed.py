"""Rank and world size as the launchers give them; knows nothing of devices, and needs no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass


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

    def owns(self, shard: int) -> bool:
        """Whether this rank extracts the planned shard with this position: whole shards, each to one rank."""
        return shard % self.world_size == self.rank


def ranks_from_environment() -> Ranks:
    """Read rank and world size from torchrun's and DeepSpeed's variables, then SLURM's.

    SLURM's count only inside ``srun`` with more than one task; an ``sbatch`` script that calls torchrun has both, and
    torchrun's win.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return Ranks(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0")))
    if int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))) > 1 and "SLURM_PROCID" in env:
        tasks = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
        return Ranks(int(env["SLURM_PROCID"]), tasks, int(env.get("SLURM_LOCALID", "0")))
    return Ranks()
