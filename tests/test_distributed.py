"""Ranks and rendezvous address from the variables of torchrun, DeepSpeed and SLURM."""

import os
import stat

import pytest

from llava_twophase.distributed import (
    Ranks,
    expand_hosts,
    export_slurm_ranks,
    ranks_from_environment,
    rendezvous_address,
)
from llava_twophase.errors import UserError

TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES")


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """Sets exactly the given variables of launchers; scontrol is not installed."""

    def set_variables(**values):
        for name in list(os.environ):
            if name.startswith(("SLURM_", "MASTER_")) or name in TORCH:
                monkeypatch.delenv(name)
        for name in (*TORCH, "MASTER_ADDR", "MASTER_PORT"):  # what a test sets is removed after it
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    monkeypatch.setenv("PATH", str(tmp_path))
    set_variables()
    return set_variables


SBATCH = {"SLURM_JOB_ID": 7, "SLURM_NTASKS": 2, "SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_JOB_NODELIST": "n[1-2]"}
STEP = {**SBATCH, "SLURM_STEP_ID": 3, "SLURM_STEP_NUM_TASKS": 2, "SLURM_STEP_NODELIST": "n[1-2]"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Ranks(0, 1, 0)),
        ({"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1}, Ranks(3, 4, 1)),
        ({"RANK": 3, "WORLD_SIZE": 4}, Ranks(3, 4, 0)),
        ({**STEP, "SLURM_PROCID": 1, "SLURM_LOCALID": 1}, Ranks(1, 2, 1)),
        ({**STEP, "RANK": 5, "WORLD_SIZE": 8}, Ranks(5, 8, 0)),
        (SBATCH, Ranks(0, 1, 0)),  # the shell of a batch script
        ({**SBATCH, "SLURM_STEP_ID": 0xFFFFFFFA, "SLURM_STEP_NUM_TASKS": 1}, Ranks(0, 1, 0)),  # salloc's shell
        ({**STEP, "SLURM_STEP_ID": 0xFFFFFFFB}, Ranks(0, 1, 0)),  # the number of a batch step
        ({**STEP, "SLURM_STEP_NUM_TASKS": 1}, Ranks(0, 1, 0)),  # srun --ntasks 1, a notebook for one
    ],
)
def test_ranks_come_from_a_launcher_or_a_job_step_only(environment, variables, expected):
    environment(**variables)
    assert ranks_from_environment() == expected


def test_a_variable_that_is_not_an_integer_is_reported(environment):
    environment(RANK="one", WORLD_SIZE=2)
    with pytest.raises(UserError, match="RANK is 'one', expected an integer"):
        ranks_from_environment()


def test_rendezvous_address_is_the_first_node_of_the_step(environment):
    environment(**STEP)
    assert rendezvous_address() == ("n1", 20010)
    environment(**STEP, MASTER_ADDR="10.0.0.1", MASTER_PORT=29500)
    assert rendezvous_address() == ("10.0.0.1", 29500)
    environment()
    assert rendezvous_address() == ("127.0.0.1", 20000)


def torch_variables():
    return [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")]


def test_export_slurm_ranks_sets_what_torch_reads_in_a_step_of_several_ranks(environment):
    environment(**{**STEP, "SLURM_PROCID": 1, "SLURM_LOCALID": 1})
    export_slurm_ranks()
    assert torch_variables() == ["1", "2", "1", "n1", "20010"]


def test_export_slurm_ranks_gives_a_rank_its_only_visible_device(environment):
    environment(**{**STEP, "SLURM_PROCID": 1, "SLURM_LOCALID": 1, "CUDA_VISIBLE_DEVICES": "5"})
    export_slurm_ranks()
    assert os.environ["LOCAL_RANK"] == "0"


@pytest.mark.parametrize("variables", [{}, SBATCH, {**STEP, "RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1}])
def test_export_slurm_ranks_changes_nothing_for_one_process_and_after_a_launcher(environment, variables):
    environment(**variables)
    before = dict(os.environ)
    export_slurm_ranks()
    assert dict(os.environ) == before


def test_training_command_exports_the_ranks_of_a_slurm_step(environment, monkeypatch):
    """Two processes of plain srun would otherwise train independently and overwrite each other's files."""
    from llava_twophase.train import command_line
    from llava_twophase.train.cli import main

    found = []

    def parse(argv):
        found.extend(torch_variables())
        raise UserError("no further")

    monkeypatch.setattr(command_line, "parse_command", parse)
    environment(**{**STEP, "SLURM_PROCID": 1})
    assert main([]) == 1
    assert found == ["1", "2", "0", "n1", "20010"]


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("node7", ["node7"]),
        ("a1,b2", ["a1", "b2"]),
        ("gpu[003-005,12],login1", ["gpu003", "gpu004", "gpu005", "gpu12", "login1"]),
        ("n[1,3]-ib", ["n1-ib", "n3-ib"]),
        ("rack[0-1]_blade[0-1]", ["rack0_blade0", "rack0_blade1", "rack1_blade0", "rack1_blade1"]),
        ("host-1.example[5-6].org,x", ["host-1.example5.org", "host-1.example6.org", "x"]),
        ("a[1-2]b[3]c[09-10],d", ["a1b3c09", "a1b3c10", "a2b3c09", "a2b3c10", "d"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("[1-2]", ["1", "2"]),
    ],
)
def test_expand_hosts_expands_as_slurm_does(environment, nodes, expected):
    assert expand_hosts(nodes) == expected


@pytest.mark.parametrize("nodes", ["a[1-2", "a1]", "a[[1-2]]", "a[1-2[3]]", "a[2-1]", "a[x]", "a[]", "a,,b", "a[1-2,]"])
def test_expand_hosts_refuses_a_malformed_list(environment, nodes):
    with pytest.raises(UserError, match="cannot be read; set MASTER_ADDR"):
        expand_hosts(nodes)


def test_expand_hosts_asks_scontrol_if_it_is_installed(environment, tmp_path, monkeypatch):
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\n[ "$1 $2" = "show hostnames" ] && echo "first-of-$3" && echo second\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert expand_hosts("n[1-2]") == ["first-of-n[1-2]", "second"]


def test_owns_gives_every_position_to_one_rank():
    for position in range(10):
        assert sum(Ranks(rank, 3).owns(position) for rank in range(3)) == 1
