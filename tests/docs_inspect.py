"""Run the commands of docs/inspect.md on a seeded cache; as a script, write their output into the page again.

python tests/docs_inspect.py
"""

import os
import re
import shlex
import shutil
import tempfile
from pathlib import Path

import drawn
import tiny
from commands import extract_command
from helpers import ROOT, run
from llava_twophase.cache.shard_files import read_header

PAGE = ROOT / "docs" / "inspect.md"
BLOCK = re.compile(r"^```console\n\$ (llava-inspect-cache .*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def prepare(folder):
    """Write images, records, a tower and the caches that the page's commands name, below `folder`."""
    images = drawn.write_image_set(folder)
    (folder / "towers" / "tiny-clip").mkdir(parents=True)
    tiny.write_clip(folder / "towers" / "tiny-clip")
    (folder / "llm").mkdir()
    tiny.train_tokenizer(images.captions).save_pretrained(folder / "llm")
    for name, storage in {"demo": "auto", "demo-int8": "int8"}.items():
        script, *flags = extract_command(
            data_path="records.json",
            image_folder="images",
            vision_tower="towers/tiny-clip",
            feature_cache=f"caches/{name}",
            storage_dtype=storage,
        )
        run(["python", ROOT / script, *flags], cwd=folder, SOURCE_DATE_EPOCH=1764028800)
    # One bit of a row, and the whole manifest.
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
    """What a command of the page prints: its stdout, then its stderr."""
    words = shlex.split(command)
    done = run(["python", ROOT / "pipelines/inspect_cache.py", *words[1:]], cwd=folder, expect=None, COLUMNS="110")
    return done.stdout + done.stderr


def blocks():
    """Every command of the page with the output shown below it."""
    return BLOCK.findall(PAGE.read_text(encoding="utf-8"))


def main():
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        text = PAGE.read_text(encoding="utf-8")
        fresh = BLOCK.sub(lambda match: f"```console\n$ {match[1]}\n{output(match[1], folder)}```", text)
        PAGE.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    main()
