"""Captions to token ids, with the ids that LLaVA's slow tokenizer gives; which id a row begins with.

LLaVA tokenizes with sentencepiece wherever the LLM has a ``tokenizer.model``; ``sentencepiece_ids.py`` does the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_twophase.compat import find_file, tokenizer_settings
from llava_twophase.errors import UserError
from llava_twophase.train.data.sentencepiece_ids import SentencePieceIds, is_sentencepiece_model

logger = logging.getLogger(__name__)

# Two files of one tokenizer give the same ids for plain words.
_PROBE = "a photo of a cat"
# sentencepiece may add one or two spaces in front of a text.
_ADDED_SPACES = 2


@dataclass(frozen=True)
class CaptionTokenizer:
    """The tokenizer of an LLM, as stage 1 uses it.

    Attributes:
        encode: Text to ids, without special tokens in front or after it.
        bos: The id that every row begins with, None if rows begin with the image.
        unknown: The id of the unknown token, None if there is none.
        vocabulary: Every token's id, added tokens included.
        added: The ids of added tokens.
        identity: JSON values that are equal for two tokenizers that give the same ids.
    """

    encode: Callable[[str], list[int]]
    bos: int | None
    unknown: int | None
    vocabulary: Mapping[str, int]
    added: Mapping[str, int]
    identity: Mapping[str, Any]


def load_caption_tokenizer(name: str, tokenizer: Any, cache_dir: str | None = None) -> CaptionTokenizer:
    """Prepare an LLM's tokenizer for captions.

    Args:
        name: The LLM's hub id or folder.
        tokenizer: Its Hugging Face tokenizer; needs neither a pad token nor a BOS.
        cache_dir: Where hub downloads are kept.

    Raises:
        UserError: ``tokenizer.model`` is a Git LFS pointer.
    """
    settings = tokenizer_settings(name, cache_dir)
    model_file = _find_sentencepiece_model(name, cache_dir)
    bos = _choose_bos(name, tokenizer, settings)
    added = tokenizer.get_added_vocab()
    encode: Callable[[str], list[int]]
    identity: dict[str, Any]
    if model_file is None:
        content = _content(tokenizer)
        identity = {"kind": "tokenizer.json", "sha256": hashlib.sha256(content).hexdigest()}
        encode = _PlainIds(tokenizer)
    else:
        # Absent or null means legacy, as in transformers 4.37; transformers 5's tokenizers do not have the setting.
        legacy = settings.get("legacy") is not False
        encode = SentencePieceIds(model_file, added, legacy, tokenizer.unk_token)
        if encode(_PROBE) != tokenizer(_PROBE, add_special_tokens=False).input_ids:
            logger.warning("%s: tokenizer.model and tokenizer.json give different ids; tokenizer.model is used", name)
        identity = {
            "kind": "tokenizer.model",
            "sha256": hashlib.sha256(model_file.read_bytes()).hexdigest(),
            "added_tokens_sha256": _sha256_of_json([sorted(added.items()), tokenizer.unk_token]),
            "legacy": legacy,
        }
    return CaptionTokenizer(
        encode=encode,
        bos=bos,
        unknown=tokenizer.unk_token_id,
        vocabulary=tokenizer.get_vocab(),
        added=added,
        identity={**identity, "bos": bos},
    )


def _find_sentencepiece_model(name: str, cache_dir: str | None) -> Path | None:
    path = find_file(name, "tokenizer.model", cache_dir)
    if path is None:
        return None
    content = Path(path).read_bytes()
    if content.startswith(b"version https://git-lfs"):
        raise UserError(
            f"--model_name_or_path {name}: {path} is a Git LFS pointer, not the file itself; run: git lfs pull"
        )
    if not is_sentencepiece_model(content):
        logger.info("%s: tokenizer.model is not a sentencepiece model; the ids are those of tokenizer.json", name)
        return None
    return Path(path)


@dataclass(frozen=True)
class _PlainIds:
    # A class and not a closure, so that a spawned data loader worker can have it.
    tokenizer: Any

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids


def most_tokens(text: str) -> int:
    """Return an upper bound of a text's tokens without tokenizing it: no token is shorter than a byte."""
    size = len(text.encode())
    if not text.isascii():
        # Tokenizers may decompose characters first: U+FDFA grows from 3 bytes to 33.
        size = max(size, len(unicodedata.normalize("NFKD", text).encode()))
    return size + _ADDED_SPACES


def _choose_bos(name: str, tokenizer: Any, settings: Mapping[str, Any]) -> int | None:
    """Return the id that rows begin with.

    ``add_bos_token`` of ``tokenizer_config.json`` decides, as for LLaVA's slow tokenizers. transformers 5 ignores it
    where there is a ``tokenizer.json``. Without the setting, the tokenizer's own behaviour decides.
    """
    before, after = _added_around(tokenizer)
    bos = tokenizer.bos_token_id
    added = bos is not None and bos in before
    wanted = settings.get("add_bos_token")
    if not isinstance(wanted, bool):
        wanted = added
    if wanted and bos is None:
        logger.warning("%s: add_bos_token is true, but the tokenizer has no BOS token; rows begin with the image", name)
        return None
    if wanted != added:
        logger.warning(
            "%s: tokenizer_config.json has add_bos_token: %s, but its tokenizer %s BOS; rows begin with %s",
            name,
            str(wanted).lower(),
            "adds" if added else "does not add",
            "BOS" if wanted else "the image",
        )
    rest = [token for token in before if token != bos] + after
    if before.count(bos) > 1:
        logger.warning("%s: its tokenizer adds BOS %d times; rows have it once", name, before.count(bos))
    if rest:
        shown = ", ".join(map(str, tokenizer.convert_ids_to_tokens(rest)))
        logger.warning(
            "%s: its tokenizer also adds %s; rows do not have it: a caption ends with its newline", name, shown
        )
    elif settings.get("add_eos_token") is True:
        logger.warning("%s: add_eos_token is true; rows have no EOS: a caption ends with its newline", name)
    return bos if wanted else None


def _added_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    # From a text and not from "": with EOS added and one token for BOS and EOS, an empty text would seem to get a BOS.
    plain = tokenizer("a", add_special_tokens=False).input_ids
    ids = tokenizer("a").input_ids
    for start in range(len(ids) - len(plain) + 1):
        if ids[start : start + len(plain)] == plain:
            return ids[:start], ids[start + len(plain) :]
    return [], []


def _content(tokenizer: Any) -> bytes:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        text: str = backend.to_str()
        return text.encode()
    return json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]).encode()


def _sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
