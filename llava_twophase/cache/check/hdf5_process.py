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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py

from llava_twophase.cache.format import ENCODINGS, SCHEMA, USER_BLOCK, Header, StoredDataset, fingerprint_hash
from llava_twophase.cache.reader import read_header
from llava_twophase.cache.shard_writer import hdf5_type

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


def disagreements(path: Path, header: Header) -> Iterator[str]:
    """Open a shard with HDF5 in this process and hold it against its header; no link is followed out of the file."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            links = {name: type(file.get(name, getlink=True)) for name in file}
            if links != dict.fromkeys(header.datasets, h5py.HardLink):
                yield f"it holds other HDF5 links than its datasets: {sorted(map(str, links))}"
                return
            if file.userblock_size != USER_BLOCK or file.id.get_create_plist().get_version()[0] != 0:
                yield "its user block or HDF5 superblock is not of this format"
            for name, data in header.datasets.items():
                if not _same(file[name].id, name, data):
                    yield f"its HDF5 metadata of {name} disagree with its header"
            if file.attrs["schema"] != SCHEMA or not isinstance(json.loads(file.attrs["provenance"]), dict):
                yield "its attributes schema or provenance are not of this format"
            if fingerprint_hash(json.loads(file.attrs["fingerprint"])) != header.fingerprint:
                yield "its attribute fingerprint disagrees with its header"
            if file["features"].attrs["encoding"] != ENCODINGS[header.storage]:
                yield "its attribute encoding of /features is not of this format"
    except Exception as error:  # h5py raises nearly anything on crafted files
        yield f"HDF5 cannot read it: {error!r}"


def _attributes(path: Path, header: Header) -> dict[str, Any] | None:
    try:
        with h5py.File(path, "r", locking=False) as file:
            found = {name: json.loads(file.attrs[name]) for name in ("fingerprint", "provenance")}
        whole = all(isinstance(value, dict) for value in found.values())
        return found if whole and fingerprint_hash(found["fingerprint"]) == header.fingerprint else None
    except Exception:  # as above
        return None


def _same(dataset: Any, name: str, data: StoredDataset) -> bool:
    made = dataset.get_create_plist()
    plain = made.get_layout() == h5py.h5d.CONTIGUOUS and not made.get_external_count() and not made.get_nfilters()
    same = (dataset.shape, dataset.get_offset()) == (data.shape, data.offset)
    return bool(plain and same and dataset.get_type().equal(hdf5_type(name, data.dtype)))


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


def _answer() -> None:
    for line in sys.stdin:
        question, path = json.loads(line)
        header = read_header(Path(path))
        found = list(disagreements(Path(path), header)) if question == "check" else _attributes(Path(path), header)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    _answer()
