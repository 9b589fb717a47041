"""CPU limits as cgroups and affinity state them, and CPU time as the scheduler gives it."""

import os
import subprocess
import sys
import time

import pytest
import torch

from llava_twophase import cpu
from llava_twophase.cpu import CpuMeter, CpuUsage, available_cpus, cpu_quota, limit_torch_threads


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="ascii")
    return root


V1 = "4:memory:/job\n3:cpu,cpuacct:/job\n"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "50000 100000\n"}, 0.5),  # a parent's quota
        ({"proc/self/cgroup": "0::/on/the/host\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4.0),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "garbage\n"}, None),
        ({}, None),
    ],
)
def test_cpu_quota_reads_cgroups(tmp_path, files, quota):
    assert cpu_quota(write(tmp_path, files)) == quota


def test_available_cpus_is_limited_by_the_quota(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"})
    assert available_cpus(tmp_path) == 2
    assert available_cpus(tmp_path / "no limits") == 64


def test_available_cpus_respects_affinity():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from llava_twophase.cpu import available_cpus; print(available_cpus())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1\n"


def test_limit_torch_threads_leaves_omp_num_threads_alone(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(cpu, "available_cpus", lambda: 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    assert limit_torch_threads() == 64 and chosen == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert limit_torch_threads() == 3 and chosen == [3]


def test_advice_does_not_repeat_what_is_set(monkeypatch):
    usage = CpuUsage(wall=10, received=4, waited=16)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "take the rest: use a machine with free CPUs" in usage.advice(None)
    assert "OMP" not in usage.advice() and ": lower --dataloader_num_workers" in usage.advice(
        "--dataloader_num_workers"
    )
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert "set OMP_NUM_THREADS=1 or OMP_WAIT_POLICY=passive, lower --num_workers" in usage.advice()


def test_meter_finds_a_process_that_shares_its_cpu(monkeypatch):
    """Three busy processes on one CPU: each of them receives about a third of what it asks for."""
    monkeypatch.setattr(cpu, "_SECONDS_JUDGED", 0.5)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        time.sleep(0.3)
        meter = CpuMeter()
        deadline = time.perf_counter() + 1.5
        while time.perf_counter() < deadline:
            pass
        usage = meter.usage()
    finally:
        for other in others:
            other.kill()
            other.wait()
        os.sched_setaffinity(0, before)
    assert usage.share < 0.5
    assert "--num_workers" in usage.advice()


def test_meter_counts_no_waiting_while_idle():
    meter = CpuMeter()
    time.sleep(0.2)
    usage = meter.usage()
    assert usage.waited < 0.15 and usage.wall >= 0.2 and usage.advice() is None


def test_meter_estimates_without_scheduler_statistics(monkeypatch):
    monkeypatch.setattr(cpu, "_thread_waits", dict)
    meter = CpuMeter()
    time.sleep(0.2)
    usage = meter.usage(threads=4)
    assert usage.estimated and usage.waited > 0.6
    assert meter.usage(idle=60).waited == 0


@pytest.mark.parametrize(
    ("usage", "starved"),
    [
        (CpuUsage(wall=10, received=18, waited=2), False),
        (CpuUsage(wall=10, received=4, waited=16), True),
        (CpuUsage(wall=1, received=0.4, waited=1.6), False),  # too short
        (CpuUsage(wall=10, received=0.1, waited=0.5), False),  # hardly needs the CPU
        (CpuUsage(wall=10, received=8, waited=12, estimated=True), False),
        (CpuUsage(wall=10, received=2, waited=18, estimated=True), True),
    ],
)
def test_usage_is_starved(usage, starved, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert usage.is_starved() is starved
    assert (usage.advice() is not None) is starved


def test_meter_is_due_once():
    meter = CpuMeter()
    assert not meter.is_due(after=60)
    assert meter.is_due(after=0) and not meter.is_due(after=0)


def test_usage_of_processes_adds_up():
    total = CpuUsage(5, 1, 2) + CpuUsage(4, 3, 4)
    assert total == CpuUsage(5, 4, 6) and total.share == 0.4
