"""Phase one under SLURM, with the recipe that users copy: killed, requeued, and the bytes of one process."""

import pytest

from cluster.hosts import wait_for
from cluster.runs import EXTRACT_FLAGS, RECIPES

pytestmark = pytest.mark.cluster


def files(cache):
    """Return all files of a cache."""
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def submit(slurm, inputs, cache, *flags):
    return slurm.submit(RECIPES / "extract.sbatch", *flags, arguments=EXTRACT_FLAGS, **inputs.variables(CACHE=cache))


def wait_for_shards(cache, job):
    wait_for(lambda: list(cache.glob("shards/*.h5")), lambda: f"a shard: {job.describe()}")


def test_job_over_two_nodes_completes_after_a_node_is_killed(idle_slurm, inputs, new_cache):
    job = submit(idle_slurm, inputs, new_cache, "--nodes=2")
    wait_for_shards(new_cache, job)
    idle_slurm.hosts.power_off("node2")
    job.wait_for_restart()
    idle_slurm.restore_nodes()
    log = job.wait()
    assert "0 images cached" in log and log.count("complete, 192 images in 48 shards") == 1
    assert files(new_cache) == files(inputs.cache)


def test_job_array_resumes_after_sigterm_and_the_later_jobs_find_nothing_to_do(idle_slurm, inputs, new_cache):
    job = submit(idle_slurm, inputs, new_cache, "--array=1-3%1")
    wait_for_shards(new_cache, job)
    # For a job of an array, scancel sends the signal, may send it again, and fails because the job is ending.
    idle_slurm.run(f"scancel --signal=TERM {job.number}_1", expect=None)
    log = job.wait()
    assert job.restarts >= 1
    assert "received SIGTERM: interrupted" in log and "Traceback" not in log
    assert log.count("complete, 192 images in 48 shards") == 1 and log.count("nothing to do") == 2
    assert files(new_cache) == files(inputs.cache)
