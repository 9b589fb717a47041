"""docs/quickstart.md: its commands, in order and as they are on the page, lead from `git clone` to captions."""

import re
import shutil
import subprocess
import sysconfig

import pytest

import tiny
from helpers import ROOT, fenced_blocks, run

PAGE = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8").partition("\n## How long")[0]
IMAGES = 40


def copy_repository(folder):
    """Write a git repository with the files of this checkout, changed and new ones included."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        source = ROOT / name
        if name and source.is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, folder / name)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--no-verify", "--message", "copy"]):
        subprocess.run([*git, *command], cwd=folder, check=True)
    return folder


def write_hub_model(hub, name, write):
    """Write a model as the hub's cache on this machine would hold it."""
    model = hub / f"models--{name.replace('/', '--')}"
    snapshot = model / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    write(snapshot)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(snapshot.name, encoding="utf-8")


@pytest.fixture
def own_images(plain_set, tmp_path):
    """A folder of .jpg files, each with its caption in a .txt file."""
    folder = tmp_path / "my-images"
    folder.mkdir()
    for number in range(IMAGES):
        record = plain_set.records[number % len(plain_set.records)]
        shutil.copy(plain_set.folder / record["image"], folder / f"{number:02}.jpg")
        (folder / f"{number:02}.txt").write_text(record["conversations"][1]["value"], encoding="utf-8")
    return folder


@pytest.fixture
def hub(plain_set, tmp_path):
    """HF_HOME with tiny models under the names of the page."""
    folder = tmp_path / "hf" / "hub"
    write_hub_model(folder, "openai/clip-vit-large-patch14-336", tiny.write_clip)
    write_hub_model(folder, "HuggingFaceTB/SmolLM2-135M", lambda path: tiny.write_llama(path, plain_set.captions))
    return folder.parent


def test_commands_of_the_quickstart_lead_from_git_clone_to_captions(own_images, hub, tmp_path):
    (script,) = fenced_blocks(PAGE, "python")
    (tmp_path / "write_records.py").write_text(script, encoding="utf-8")
    commands = fenced_blocks(PAGE, "bash")
    assert [block.split()[0] for block in commands] == [
        *("git", "python", "llava-extract-features", "llava-train-projector", "llava-use-projector")
    ]
    done = run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(commands)],
        cwd=tmp_path,
        REPOSITORY=copy_repository(tmp_path / "origin"),
        HF_HOME=hub,
        # pip installs the package alone: its dependencies are those of this environment.
        PIP_NO_DEPS=1,
        PIP_NO_INDEX=1,
        PIP_NO_BUILD_ISOLATION=0,  # "no" to build_isolation: the option's name in pip's configuration
        PYTHONPATH=sysconfig.get_path("purelib"),
    )
    assert (tmp_path / "llava-env" / "bin" / "llava-train-projector").exists()
    assert "%|" not in done.stderr  # no progress bar in a log file, of no library
    assert f"{IMAGES} images in 1 shard" in done.stderr
    captions = [line for line in done.stdout.splitlines() if line.startswith("my-images/")]
    assert len(captions) == IMAGES and all("\t" in line for line in captions)
    samples = tmp_path / "my-projector" / "samples"
    steps = re.findall(r'href="(step-\d+\.html)"', (samples / "index.html").read_text(encoding="utf-8"))
    assert len(steps) == 2 and (samples.parent / "loss.png").exists()
    for page in (samples / steps[-1], tmp_path / "my-captions.html"):
        assert "data:image" in page.read_text(encoding="utf-8")
