"""Check the HDF5 metadata of shards in a separate process, because libhdf5 can crash or loop forever on damaged files.

The process runs ``python -m llava_twophase.cache.check.hdf5_process`` and answers one request at a time.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from llava_twophase.cache.hdf5 import metadata_problems, read_attributes
from llava_twophase.cache.shard_files import read_header

SECONDS = 30.0
"""Time limit for one shard. A check reads a few kilobytes."""


class Hdf5Checker:
    """Sends requests to the other process; starts it on first use, and again after it died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Hdf5Checker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def check(self, path: Path) -> list[str]:
        """Compare a shard's HDF5 metadata with its header, which must be valid.

        Returns:
            One sentence for each difference.
        """
        answer, failure = self._request("check", path)
        return [failure] if failure else list(answer)

    def attributes(self, path: Path) -> dict[str, Any] | None:
        """Read the attributes ``fingerprint`` and ``provenance`` of a shard with a valid header; None on failure."""
        answer, _ = self._request("attributes", path)
        return answer if isinstance(answer, dict) else None

    def _request(self, kind: str, path: Path) -> tuple[Any, str]:
        # Return the answer, or None and the reason.
        process = self._process = self._process or _start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps([kind, str(path.absolute())]) + "\n")
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


def _serve() -> None:
    for line in sys.stdin:
        kind, name = json.loads(line)
        path = Path(name)
        header = read_header(path)
        answer = list(metadata_problems(path, header)) if kind == "check" else read_attributes(path, header)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
