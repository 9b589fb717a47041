"""A shard's HDF5 metadata against its header, as other tools will read it; knows nothing of checksums or manifests.

It runs in a separate process, ``python -m llava_twophase.cache.check.hdf5_process``, because libhdf5 can crash or loop
forever on crafted metadata.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from llava_twophase.cache.format import Header
from llava_twophase.cache.hdf5 import metadata_problems, read_attributes
from llava_twophase.cache.shard_files import read_header

SECONDS = 30.0
"""How long opening one shard may take; it reads a few kilobytes."""


class Hdf5Checker:
    """Asks the other process about one shard after another; starts it when needed, and again when it died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Hdf5Checker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def check(self, path: Path) -> list[str]:
        """Open a shard with HDF5.

        Args:
            path: A shard whose header is in order.

        Returns:
            What disagrees with the header; empty where all is well.
        """
        answer, failure = self._ask("check", path)
        return [failure] if failure else list(answer)

    def attributes(self, path: Path) -> dict[str, Any] | None:
        """Read ``fingerprint`` and ``provenance`` of a shard whose header is in order; None where that fails."""
        answer, _ = self._ask("attributes", path)
        return answer

    def _ask(self, question: str, path: Path) -> tuple[Any, str]:
        # The answer, and what went wrong where there is none.
        process = self._process = self._process or _start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps([question, str(path.absolute())]) + "\n")
            process.stdin.flush()
            answered, _, _ = select.select([process.stdout], [], [], SECONDS)
            answer = process.stdout.readline() if answered else ""
        except BrokenPipeError:
            answered, answer = [process.stdout], ""
        if answer:
            return json.loads(answer), ""
        self._stop()
        return None, f"HDF5 {'crashes' if answered else 'hangs'} on its metadata"

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _start() -> subprocess.Popen[str]:
    root = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", __name__],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    )


def _all_problems(path: Path, header: Header) -> list[str]:
    return list(metadata_problems(path, header))


def _answer() -> None:
    for line in sys.stdin:
        question, path = json.loads(line)
        header = read_header(Path(path))
        look = read_attributes if question == "attributes" else _all_problems
        print(json.dumps(look(Path(path), header)), flush=True)


if __name__ == "__main__":
    _answer()
