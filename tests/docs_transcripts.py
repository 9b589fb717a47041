"""Run the `llava-...` commands of the pages' console blocks on tiny inputs; as a script, write their output again.

python tests/docs_transcripts.py [PAGE...]
"""

import os
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import drawn
import tiny
from commands import extract_command
from helpers import ROOT, SCRIPTS, run
from llava_twophase.cache.shard_files import read_header

INSPECT = ("docs/inspect.md", "docs/inspect-features.md")
PAGES = ("README.md", "docs/extract.md", "docs/train.md", *INSPECT)
BLOCK = re.compile(r"^```console\n\$ (llava-(?:.*\\\n)*.*)\n((?:.*\n)*?)```$", re.MULTILINE)
PROGRESS = re.compile(r"^.*\| *\d+/\d+ \[[^\]]*\]|^Loading weights.*")


def prepare(folder, page):
    """Write images, records, a tower, an LLM and, for the inspection, the caches that its commands name."""
    images = drawn.write_image_set(folder)
    (folder / "towers" / "tiny-clip").mkdir(parents=True)
    tiny.write_clip(folder / "towers" / "tiny-clip")
    (folder / "llms" / "tiny-llama").mkdir(parents=True)
    tiny.write_llama(folder / "llms" / "tiny-llama", images.captions)
    if page in INSPECT:
        write_caches(folder)


def write_caches(folder):
    """Extract caches/demo and caches/demo-int8; copy the first to caches/damaged and caches/lost."""
    for name, storage in {"demo": "auto", "demo-int8": "int8"}.items():
        script, *flags = extract_command(
            data_path="records.json",
            image_folder="images",
            vision_tower="towers/tiny-clip",
            feature_cache=f"caches/{name}",
            storage_dtype=storage,
        )
        run(["python", ROOT / script, *flags], cwd=folder, SOURCE_DATE_EPOCH=1764028800)
    # A flipped bit in a row; the same without a manifest.
    damaged, lost = folder / "caches/damaged", folder / "caches/lost"
    shutil.copytree(folder / "caches/demo", damaged)
    with (damaged / "shards/shard-000001.h5").open("r+b") as file:
        file.seek(read_header(damaged / "shards/shard-000001.h5").datasets["features"].offset)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    shutil.copytree(damaged, lost)
    (lost / "manifest.json").unlink()


def output(command, folder):
    """Return what a command prints, stdout and stderr in order, without progress bars."""
    name, *flags = shlex.split(command.replace("\\\n", " "))
    together = ["sh", "-c", 'exec "$@" 2>&1', "sh", sys.executable, ROOT / SCRIPTS[name], *flags]
    text = run(together, cwd=folder, expect=None, COLUMNS="110", PYTHONUNBUFFERED="1").stdout
    lines = text.splitlines()  # run() has made a line of each state of a progress bar
    bars = any(map(PROGRESS.match, lines))
    kept = [PROGRESS.sub("", line).rstrip() for line in lines]
    return "".join(f"{line}\n" for line in kept if line or not bars)


def blocks(page):
    """Return every command of a page with the output shown below it."""
    return BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))


def write(page):
    """Replace the outputs of a page by what its commands print now."""
    text = (ROOT / page).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), page)
        text = BLOCK.sub(lambda match: f"```console\n$ {match[1]}\n{output(match[1], Path(folder))}```", text)
    (ROOT / page).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:] or PAGES:
        write(name)
