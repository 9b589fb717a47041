"""Stream the tensors of a model folder and write them under other names, with bounded memory.

Supported are the formats of the Hugging Face Hub: safetensors and ``torch.save`` files, in one file or in several with
an index.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llava_twophase.errors import UserError
from llava_twophase.hub import download_advice, use_cache_if_unreachable
from llava_twophase.model_names import require_model_folder

_PATTERNS = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja")
_INDEX = "model.safetensors.index.json"


def model_folder(name: str, flag: str) -> Path:
    """Return the local folder of a model; a hub id is downloaded or taken from the hub's cache.

    Args:
        name: Folder or hub id.
        flag: The flag that gave it, for error messages.

    Raises:
        UserError: There is no such folder and no such model.
    """
    if Path(name).is_dir():
        return Path(name)
    require_model_folder(flag, name, "a model")
    use_cache_if_unreachable([name])
    try:
        return Path(snapshot_download(name, allow_patterns=list(_PATTERNS)))
    except Exception as error:  # hub and network errors have no common base class
        raise UserError(
            f"{flag} {name}: it is not a folder and cannot be downloaded: {error}{download_advice(name)}"
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """List the weight files of a model folder, safetensors before ``torch.save`` files.

    Raises:
        UserError: The folder has no weight files, or its index lists a file that is missing.
    """
    for index, single in ((_INDEX, "model.safetensors"), ("pytorch_model.bin.index.json", "pytorch_model.bin")):
        if (folder / index).is_file():
            names = sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise UserError(f"{folder / index} lists {missing[0]}, which is missing; download the model again")
            return [folder / name for name in names]
        if (folder / single).is_file():
            return [folder / single]
    raise UserError(f"{folder} has no model.safetensors or pytorch_model.bin; expected a Hugging Face model folder")


def tensor_names(folder: Path) -> list[str]:
    """List the names of a model folder's tensors, in the order of its files.

    Raises:
        UserError: The folder has no weight files, or one of them cannot be read.
    """
    return [name for path in weight_files(folder) for name in _names(path)]


def stream_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over names and tensors of a model folder; each tensor is a copy, the files are memory-mapped.

    Raises:
        UserError: The folder has no weight files, or one of them cannot be read.
    """
    for path in weight_files(folder):
        with _explained(path):
            yield from _tensors(path)


def _names(path: Path) -> list[str]:
    with _explained(path):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return list(file.keys())
        return list(_load(path))


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    names = _names(path)
    if path.suffix == ".safetensors":
        for name in names:
            # Opened for each tensor: pages of an open mapping stay in this process's memory.
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(name).clone()
            yield name, tensor
    elif _is_mappable(path):
        for name in names:
            yield name, _load(path)[name].clone()
    else:
        yield from _load(path).items()


def _load(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_mappable(path))
    return state


def _is_mappable(path: Path) -> bool:
    # torch's format from before 1.6 is not a zip file and is read into memory as a whole.
    return zipfile.is_zipfile(path)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read as weights: {error}; download the model again") from None


@dataclass
class SafetensorsWriter:
    """Write tensors to ``model-NNNNN-of-NNNNN.safetensors`` and an index.

    Attributes:
        folder: Where the files go.
        piece_bytes: Size at which a file is closed and the next one begins.
    """

    folder: Path
    piece_bytes: int = 1 << 29
    _pending: dict[str, torch.Tensor] = field(default_factory=dict)
    _pending_bytes: int = 0
    _pieces: list[list[str]] = field(default_factory=list)
    _total: int = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add one tensor; the writer keeps it until its file is written."""
        if self._pending and self._pending_bytes + tensor.nbytes > self.piece_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is pending, give the files their final names and write the index."""
        if self._pending:
            self._flush()
        count, weight_map = len(self._pieces), {}
        for number, names in enumerate(self._pieces, 1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            self._path(number).rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index: dict[str, Any] = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        (self.folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        self._pieces.append(list(self._pending))
        save_file(self._pending, self._path(len(self._pieces)), metadata={"format": "pt"})
        self._total += self._pending_bytes
        self._pending.clear()
        self._pending_bytes = 0

    def _path(self, number: int) -> Path:
        return self.folder / f".piece-{number:05d}.safetensors"
