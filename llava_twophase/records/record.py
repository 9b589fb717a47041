r"""One record: what an entry of a data file must have, and its image key.

A record of LLaVA-Pretrain::

    {"id": "004539375", "image": "00453/004539375.jpg", "conversations": [
        {"from": "human", "value": "Render a clear and concise summary of the photo.\n<image>"},
        {"from": "gpt", "value": "select luxury furniture 3 - inch gel memory foam mattress topper"}]}
"""

from __future__ import annotations

import os
import posixpath
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from llava_twophase.constants import IMAGE_TOKEN
from llava_twophase.errors import UserError, short_repr
from llava_twophase.text import counted


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of the data file.

    Attributes:
        image: Image key: the path relative to the image folder, with forward slashes.
        caption: The gpt turn, unstripped.
        prompt: The human turn. Stage 1 replaces it by the image token; only length-grouped sampling counts its words.
    """

    image: str
    caption: str
    prompt: str

    def to_llava(self) -> dict[str, Any]:
        """Return the entry of LLaVA's data file that this record is read from; its id is the image key."""
        turns = [{"from": "human", "value": self.prompt}, {"from": "gpt", "value": self.caption}]
        return {"id": self.image, "image": self.image, "conversations": turns}


def normalize_key(image: str, image_folder: str | Path | None = None) -> str:
    """Turn a record's image path into its image key.

    Args:
        image: The path as the record has it.
        image_folder: The folder to which an absolute path is made relative.

    Returns:
        The path relative to the folder, without ``.`` parts and repeated slashes.

    Raises:
        UserError: The path is outside the image folder, or cannot be a key.
    """
    if "\0" in image or not image.strip():
        raise UserError(f"image path {image!r} is empty or has a NUL byte")
    if not _is_text(image):
        raise UserError(f"image path {image!r} is not valid Unicode")
    key = posixpath.normpath(image)
    if posixpath.isabs(key):
        return _relative(key, image_folder)
    if key in (".", "..") or key.startswith("../"):
        raise UserError(f"image path {image!r} must stay inside --image_folder: make it relative to that folder")
    return key


def _relative(path: str, folder: str | Path | None) -> str:
    # LLaVA reads any absolute path; here it needs a key, so it must be inside the image folder.
    if folder is None:
        raise UserError(
            f"image path {path!r} is absolute: give --image_folder (verify: --sources), the folder that it is in, "
            "or make it relative to that folder"
        )
    parent, name = posixpath.split(path)
    for parents, root in ((parent, os.path.abspath(folder)), (_real(parent), _real(str(folder)))):
        key = posixpath.relpath(posixpath.join(parents, name), root)
        if key not in (".", "..") and not key.startswith("../"):
            return key
    raise UserError(f"image path {path!r} must stay inside --image_folder {folder}; move or link the image there")


@lru_cache(maxsize=4096)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def to_record(raw: Any, image_folder: str | Path | None = None) -> Record:
    """Check an entry of a data file.

    Args:
        raw: The entry as JSON has it.
        image_folder: The folder to which an absolute image path is made relative.

    Raises:
        UserError: The entry is not an image with its caption; the message continues the entry's name.
    """
    if not isinstance(raw, dict):
        raise UserError(f"is {type(raw).__name__}, expected an object with image and conversations")
    image = _image(raw)
    prompt, caption = _turns(raw)
    if IMAGE_TOKEN not in prompt:
        raise UserError(f"its human turn has no {IMAGE_TOKEN}, so LLaVA would not use the image")
    if IMAGE_TOKEN in caption:
        raise UserError(f"its caption holds {IMAGE_TOKEN}, which would take the features of another image; remove it")
    if not (_is_text(caption) and _is_text(prompt)):
        raise UserError("a turn has a lone surrogate, which no tokenizer can read")
    return Record(normalize_key(image, image_folder), caption, prompt)


def _image(raw: dict[str, Any]) -> str:
    image = raw.get("image")
    if isinstance(image, list):
        if len(image) > 1:
            raise UserError(f"has {len(image)} images; stage 1 trains on one image per record")
        image = image[0] if image else None
    if image is None and "images" in raw:
        raise UserError(f"has images ({short_repr(raw['images'])}), expected image with the path of one image")
    if image is None:
        known = "" if "conversations" in raw else f" (its keys are {short_repr(sorted(map(str, raw)))})"
        raise UserError(f"has no image{known}; stage 1 trains on pairs of image and caption only")
    if not isinstance(image, str):
        raise UserError(f"has no image path: image is {short_repr(image)}")
    return image


def _turns(raw: dict[str, Any]) -> tuple[str, str]:
    turns = raw.get("conversations")
    if not isinstance(turns, list):
        raise UserError(f"has no list of turns in conversations (its keys are {short_repr(sorted(map(str, raw)))})")
    if len(turns) != 2:
        raise UserError(f"has {counted(len(turns), 'turn')} in conversations, expected exactly two (human, gpt)")
    prompt, caption = (turn.get("value") if isinstance(turn, dict) else None for turn in turns)
    if not isinstance(prompt, str) or not isinstance(caption, str):
        raise UserError(f"a turn has no text under 'value': {short_repr(turns)}")
    return prompt, caption


def id_in_words(raw: Any) -> str:
    """Return the id of an entry for a message, empty if there is none."""
    return f" (id {short_repr(raw['id'])})" if isinstance(raw, dict) and "id" in raw else ""


def _is_text(value: str) -> bool:
    # JSON can have lone surrogates, which UTF-8 cannot encode.
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
