"""Fixtures of the cluster tests: hosts, SLURM on them, and one set of inputs for all runs."""

import shutil
from typing import NamedTuple

import pytest

import drawn
from cluster.hosts import Hosts, why_unavailable
from cluster.runs import EXTRACT_FLAGS, submit_training
from cluster.slurm import Slurm
from commands import flag_list
from helpers import SCRIPTS, run

PROGRAMS = ("munged", "pdsh", "sbatch", "slurmctld", "slurmd", "sshd")
# Twelve scenes under several names: enough work to be interrupted.
COPIES = 16


class Inputs(NamedTuple):
    """The inputs of all runs, on the hosts' shared storage."""

    records: object
    images: object
    tower: object
    llm: object
    cache: object  # written by one process
    new_cache: object  # where that process wrote it: shards and manifest record the command line

    def variables(self, **changes):
        """Return the variables that the recipes read."""
        named = {"DATA": self.records, "IMAGES": self.images, "TOWER": self.tower, "MODEL": self.llm}
        return {**named, "CACHE": self.cache, "SOURCE_DATE_EPOCH": 0, **changes}


@pytest.fixture(scope="session")
def hosts(tmp_path_factory):
    """The test hosts; the tests are skipped where there can be none."""
    reason = why_unavailable()
    missing = [program for program in PROGRAMS if shutil.which(program, path="/usr/bin:/usr/sbin") is None]
    if missing:
        reason = reason or f"{', '.join(missing)} not installed (apt-get install slurm-wlm munge pdsh openssh-server)"
    if reason:
        pytest.skip(f"no test cluster: {reason}")
    with Hosts(tmp_path_factory.mktemp("hosts")) as started:
        yield started


@pytest.fixture(scope="session")
def slurm(hosts, tmp_path_factory):
    """SLURM on the hosts."""
    started = Slurm(hosts, tmp_path_factory.mktemp("slurm"))
    started.start()
    return started


@pytest.fixture
def idle_slurm(slurm):
    """SLURM with both nodes idle; after the test its jobs are killed and nodes that it powered off are started."""
    yield slurm
    slurm.run("scancel --user root", expect=None)
    slurm.restore_nodes()
    slurm.hosts.unlock_extensions()


@pytest.fixture(scope="session")
def inputs(plain_set, tiny_clip, tiny_llama, tmp_path_factory):
    """192 images with their records, models, and the cache that a single process writes."""
    folder = tmp_path_factory.mktemp("inputs")
    records = []
    for copy in range(COPIES):
        for record in plain_set.records:
            key = f"{copy}/{record['image'].replace('/', '-')}"
            (folder / "images" / key).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(plain_set.folder / record["image"], folder / "images" / key)
            records.append({**record, "id": key, "image": key})
    made = Inputs(
        records=drawn.write_records(records, folder / "records.json"),
        images=folder / "images",
        tower=tiny_clip,
        llm=tiny_llama,
        cache=folder / "cache",
        new_cache=folder / "new_cache",
    )
    flags = {
        "data_path": made.records,
        "image_folder": made.images,
        "vision_tower": made.tower,
        "mm_vision_select_layer": -2,
        "compute_dtype": "bf16",
        "feature_cache": made.new_cache,
    }
    run(["python", SCRIPTS["llava-extract-features"], *flag_list(flags), *EXTRACT_FLAGS], SOURCE_DATE_EPOCH=0)
    made.new_cache.rename(made.cache)
    return made


@pytest.fixture
def new_cache(inputs):
    """The path of a cache to write; empty before and after a test."""
    yield inputs.new_cache
    shutil.rmtree(inputs.new_cache, ignore_errors=True)


class Finished(NamedTuple):
    """A finished training run."""

    folder: object
    log: str


@pytest.fixture(scope="session")
def uninterrupted(slurm, inputs, tmp_path_factory):
    """The training job that nothing interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    return Finished(folder, submit_training(slurm, inputs, folder).wait())
