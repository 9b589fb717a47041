r"""LLaVA's JSON or JSONL to validated records; knows nothing of images, tokens or caches.

One raw record of LLaVA-Pretrain::

    {"id": "004539375", "image": "00453/004539375.jpg", "conversations": [
        {"from": "human", "value": "Render a clear and concise summary of the photo.\n<image>"},
        {"from": "gpt", "value": "select luxury furniture 3 - inch gel memory foam mattress topper"}]}
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_twophase.constants import IMAGE_TOKEN
from llava_twophase.errors import UserError, combined_error


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of the data file.

    Attributes:
        image: Image key, the picture's path relative to the image folder, with forward slashes.
        caption: The gpt turn, unstripped.
        prompt: The human turn; stage 1 replaces it by the image token, only grouped sampling counts its words.
    """

    image: str
    caption: str
    prompt: str


def load_records(path: str | Path, flag: str = "--data_path") -> list[Record]:
    """Read and check a data file.

    Args:
        path: A JSON list or JSON lines, UTF-8 whatever the locale says; told apart by content.
        flag: What named it, for errors.

    Returns:
        The records in file order.

    Raises:
        UserError: The file is missing, empty or not JSON, or records are bad: all of them, by position and id.
    """
    records: list[Record] = []
    problems: list[str] = []
    for position, raw in enumerate(_read_json(Path(path), flag)):
        try:
            records.append(_record(raw))
        except UserError as error:
            name = f" (id {raw['id']!r})" if isinstance(raw, dict) and "id" in raw else ""
            problems.append(f"record {position}{name}: {error}")
    if problems:
        raise combined_error(problems, f"{path} has {len(problems)} bad records; mend or remove them")
    if not records:
        raise UserError(f"{path} holds no records; expected LLaVA's list of id, image and conversations")
    return records


def image_keys(records: Sequence[Record]) -> list[str]:
    """Give each image key once, in the order of its first record."""
    return list(dict.fromkeys(record.image for record in records))


def normalize_key(image: str) -> str:
    """Turn a record's image path into its image key.

    Args:
        image: Path relative to the image folder, as the record has it.

    Returns:
        The same path without ``.`` parts and doubled slashes.

    Raises:
        UserError: The path is absolute, leaves the image folder, or cannot be a key.
    """
    if "\0" in image or not image.strip():
        raise UserError(f"image path {image!r} is empty or holds a NUL byte")
    if not _is_text(image):
        raise UserError(f"image path {image!r} is not valid Unicode")
    key = posixpath.normpath(image)
    if posixpath.isabs(key) or key in (".", "..") or key.startswith("../"):
        raise UserError(f"image path {image!r} must stay inside --image_folder: make it relative to that folder")
    return key


def _record(raw: Any) -> Record:
    if not isinstance(raw, dict):
        raise UserError(f"is {type(raw).__name__}, expected an object with image and conversations")
    image = raw.get("image")
    if not isinstance(image, str):
        raise UserError("has no image; stage 1 trains on image-caption pairs only")
    turns = raw.get("conversations")
    if not isinstance(turns, list) or len(turns) != 2:
        found = f"{len(turns)} turns" if isinstance(turns, list) else "no list of turns"
        raise UserError(f"has {found} in conversations, expected exactly two (human, gpt)")
    texts = [turn.get("value") if isinstance(turn, dict) else None for turn in turns]
    prompt, caption = texts
    if not isinstance(prompt, str) or not isinstance(caption, str):
        raise UserError("a turn has no text under 'value'")
    if IMAGE_TOKEN not in prompt:
        raise UserError(f"its human turn has no {IMAGE_TOKEN}, so LLaVA would not show it the picture")
    if IMAGE_TOKEN in caption:
        raise UserError(f"its caption holds {IMAGE_TOKEN}, which would take another picture's features; remove it")
    if not (_is_text(caption) and _is_text(prompt)):
        raise UserError("a turn holds half a surrogate pair, which no tokenizer can read")
    return Record(normalize_key(image), caption, prompt)


def _is_text(value: str) -> bool:
    # JSON can spell lone surrogates, which UTF-8 cannot.
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_json(path: Path, flag: str) -> Iterator[Any]:
    if not path.is_file():
        raise UserError(f"{flag} {path} does not exist or is not a file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}); convert it first") from None
    if text.lstrip().startswith("["):
        try:
            yield from json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not valid JSON: {error}") from None
        return
    # Only "\n" ends a JSON line; str.splitlines would also split at U+2028 inside a caption.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path} line {number} is not valid JSON: {error}") from None
