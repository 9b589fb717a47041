"""Check the entries of a data file and append them to columns, many at a time.

Entries that look like LLaVA's are checked together. Where one does not, each of that batch is checked on its own, as
``to_record`` does, which also says what is wrong.
"""

from __future__ import annotations

import hashlib
import posixpath
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from llava_twophase.constants import IMAGE_TOKEN
from llava_twophase.errors import UserError
from llava_twophase.records.columns import DTYPES, digested_text, record_text
from llava_twophase.records.record import Record, id_in_words, to_record

_BATCH = 8192
_SHOWN = 20  # problems that an error lists
_KNOWN_PROMPTS = 1 << 16  # prompts that are stored once; LLaVA-Pretrain has 22


@dataclass
class Built:
    """What was appended to columns.

    Attributes:
        records: Number of records.
        problems: The first problems, one line each.
        bad: Number of entries that are not valid.
        has_absolute_paths: Whether image keys depend on the image folder.
        ascii_keys: Whether all image keys are ASCII.
        digest: SHA-256 of ``digested_text``.
    """

    records: int = 0
    problems: list[str] = field(default_factory=list)
    bad: int = 0
    has_absolute_paths: bool = False
    ascii_keys: bool = True
    digest: str = ""

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what columns need to know about themselves, as arrays."""
        return {
            "digest": np.frombuffer(self.digest.encode("ascii"), np.uint8),
            "ascii_keys": np.array([self.ascii_keys], np.uint8),
        }


class ColumnBuilder:
    """Appends records to columns.

    Args:
        files: An open binary file for each column of ``DTYPES``.
        image_folder: The folder to which absolute image paths are made relative.
    """

    def __init__(self, files: Mapping[str, IO[bytes]], image_folder: str | Path | None = None) -> None:
        self._files, self._image_folder = files, image_folder
        self._built, self._digest = Built(), hashlib.sha256()
        self._text_end = self._prompt_end = 0
        self._prompts: dict[str, tuple[int, int]] = {}  # number and words
        self._next_prompt = 0
        for name in ("starts", "prompt_starts"):
            self._write(name, [0])

    def add_entries(self, entries: Iterable[Any]) -> None:
        """Check and append entries of a data file; those that are not valid are counted."""
        entries, position = iter(entries), 0
        while batch := list(islice(entries, _BATCH)):
            columns = _check_together(batch)
            if columns is None:
                self.add_records(self._check_each(batch, position))
            else:
                self._append(*columns)
            position += len(batch)

    def add_records(self, records: Sequence[Record]) -> None:
        """Append valid records."""
        for start in range(0, len(records), _BATCH):
            part = records[start : start + _BATCH]
            self._append(
                [record.image for record in part],
                [record.prompt for record in part],
                [record.caption for record in part],
            )

    def finish(self) -> Built:
        """Return what was appended."""
        self._built.digest = self._digest.hexdigest()
        return self._built

    def _check_each(self, batch: Sequence[Any], position: int) -> list[Record]:
        records, built = [], self._built
        for place, entry in enumerate(batch, position):
            try:
                records.append(to_record(entry, self._image_folder))
            except UserError as error:
                built.bad += 1
                if built.bad <= _SHOWN:
                    built.problems.append(f"record {place}{id_in_words(entry)}: {error}")
            else:
                built.has_absolute_paths |= _is_absolute(entry)
        return records

    def _append(self, images: Sequence[str], prompts: Sequence[str], captions: Sequence[str]) -> None:
        names, texts = [image.encode() for image in images], [caption.encode() for caption in captions]
        text = record_text(names, texts)
        self._digest.update(digested_text(names, texts, text))
        self._files["text"].write(text)
        image_bytes, sizes = _lengths(names), _lengths(texts)
        ends = self._text_end + np.cumsum(image_bytes + sizes + 2)
        self._text_end = int(ends[-1]) if len(ends) else self._text_end
        self._write("starts", ends)
        self._write("image_bytes", image_bytes)
        self._write("hashes", np.fromiter(map(xxhash.xxh3_64_intdigest, names), np.uint64, len(names)))
        self._built.ascii_keys = self._built.ascii_keys and all(map(bytes.isascii, names))
        if not text.isascii():
            for place, caption in enumerate(captions):
                if not caption.isascii():
                    # Tokenizers may decompose characters first: U+FDFA grows from 3 bytes to 33.
                    sizes[place] = max(sizes[place], len(unicodedata.normalize("NFKD", caption).encode()))
        self._write("caption_bytes", sizes)
        found = [self._prompts.get(prompt) or self._add_prompt(prompt) for prompt in prompts]
        self._write("prompts", [number for number, _ in found])
        words = _lengths(list(map(str.split, captions)))
        self._write("words", words + np.fromiter((count for _, count in found), np.int64, len(found)))
        self._built.records += len(names)

    def _add_prompt(self, prompt: str) -> tuple[int, int]:
        if len(self._prompts) >= _KNOWN_PROMPTS:
            self._prompts.clear()
        text = prompt.encode()
        self._files["prompt_text"].write(text)
        self._prompt_end += len(text)
        self._write("prompt_starts", [self._prompt_end])
        entry = self._prompts[prompt] = (self._next_prompt, len(prompt.split()))
        self._next_prompt += 1
        return entry

    def _write(self, name: str, values: np.ndarray | Sequence[int]) -> None:
        self._files[name].write(np.asarray(values).astype(DTYPES[name]).tobytes())


def _check_together(batch: Sequence[Any]) -> tuple[list[str], list[str], list[str]] | None:
    """Return the images, prompts and captions of entries that are all valid and have simple image paths.

    None means that an entry may be different; it need not be bad.
    """
    try:
        images = [entry["image"] for entry in batch]
        turns = [entry["conversations"] for entry in batch]
        prompts = [human["value"] for human, _ in turns]
        captions = [gpt["value"] for _, gpt in turns]
        paths, text = "\0".join(["", *images]), "\0".join(captions)
        for part in (paths, text):
            part.encode()
        distinct = set(prompts)
    except (TypeError, ValueError, LookupError):  # UnicodeEncodeError is a ValueError
        return None
    if not all(isinstance(prompt, str) and IMAGE_TOKEN in prompt and _can_encode(prompt) for prompt in distinct):
        return None
    if not all(type(entry) is dict for entry in batch) or not all(type(pair) is list for pair in turns):
        return None
    if IMAGE_TOKEN in text or paths.count("\0") != len(batch) or "\0/" in paths or "\0." in paths:
        return None
    if list(map(posixpath.normpath, images)) != images or not all(map(str.strip, images)):
        return None
    return images, prompts, captions


def _can_encode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_absolute(entry: Any) -> bool:
    image = entry["image"]
    return str(image[0] if isinstance(image, list) else image).startswith("/")


def _lengths(parts: Sequence[Any]) -> np.ndarray:
    return np.fromiter(map(len, parts), np.int64, len(parts))
