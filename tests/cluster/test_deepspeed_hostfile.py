"""DeepSpeed's launcher over pdsh and ssh, with the command of docs/cluster.md."""

import pytest

from cluster.runs import assert_same_projector, documented_script

pytestmark = pytest.mark.cluster


def test_hostfile_with_two_hosts_gives_the_projector_of_srun_and_torchrun(hosts, inputs, uninterrupted, tmp_path):
    # What the launcher passes to the hosts beside PYTHON... and NCCL...
    (tmp_path / ".deepspeed_env").write_text(f"TORCH_EXTENSIONS_DIR={hosts.extensions}\n", encoding="utf-8")
    done = hosts.run("node1", documented_script("--hostfile", inputs, tmp_path / "out", ("slots=8", "slots=1")))
    assert "node1: " in done.stderr and "node2: " in done.stderr  # pdsh names the host of each line
    assert_same_projector(tmp_path / "out", uninterrupted.folder)
