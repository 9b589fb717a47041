"""Decisions that all ranks take together."""

import pytest

from commands import torchrun
from helpers import run
from llava_twophase.errors import UserError
from llava_twophase.train.loop.agreement import explain_lost_ranks, on_all_ranks, on_main_rank

SCRIPT = """\
import os, time
from datetime import timedelta
import torch
import torch.distributed as dist
from llava_twophase.compat import set_group_timeouts
from llava_twophase.errors import UserError
from llava_twophase.train.loop.agreement import explain_lost_ranks, on_all_ranks, on_main_rank

dist.init_process_group("gloo")
rank = dist.get_rank()

def fail(ranks):
    if rank in ranks:
        raise UserError("no space")
    return rank

def outcome(decide, action):
    try:
        return decide(action)
    except UserError as error:
        return str(error)

lines = [
    outcome(on_all_ranks, lambda: fail([])),
    outcome(on_all_ranks, lambda: fail([1])),
    outcome(on_all_ranks, lambda: fail([0, 1])),
    outcome(on_main_rank, lambda: rank),
    outcome(on_main_rank, lambda: fail([0])),
    outcome(on_main_rank, lambda: fail([1])),
]
for turn in range(2):
    dist.barrier()
    if turn == rank:
        print(rank, lines, flush=True)
group = dist.new_group([0, 1])  # as DeepSpeed makes them, with torch's timeout of 30 minutes
set_group_timeouts(timedelta(seconds=2))
dist.barrier(group=group)
if rank == 1:
    time.sleep(20)  # as a host without network
    os._exit(0)
try:
    with explain_lost_ranks(2):
        dist.all_reduce(torch.ones(1), group=group)
except UserError as error:
    print(error, flush=True)
os._exit(0)
"""


def test_two_ranks_end_with_the_same_result_or_error_and_a_lost_rank_is_reported(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    *lines, lost = run([*torchrun(2), script]).stdout.splitlines()
    common = "'rank 1: no space', 'no space', 0, 'no space', 0]"
    assert lines == [f"0 [0, {common}", f"1 [1, {common}"]
    assert lost.startswith("rank 0 lost contact with another rank (") and "Timed out" in lost
    assert "down for 2 s (--ddp_timeout). Run the same command again" in lost


def test_explain_lost_ranks_leaves_other_errors_alone():
    with pytest.raises(RuntimeError, match="^shapes differ$"), explain_lost_ranks(600):
        raise RuntimeError("shapes differ")


def test_one_process_decides_alone():
    assert on_all_ranks(lambda: 3) == on_main_rank(lambda: 3) == 3
    for decide in (on_all_ranks, on_main_rank):
        with pytest.raises(UserError, match="^no$"):
            decide(_fail)


def _fail():
    raise UserError("no")
