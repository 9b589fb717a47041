"""Text to the ids of LLaVA's slow LLaMA tokenizer, by sentencepiece.

transformers 5 converts a ``tokenizer.model`` to a fast tokenizer, which gives other ids for a leading space, for
special tokens inside a caption, and for a literal U+2581.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

_SPACE = "\u2581"  # how sentencepiece writes a space


def is_sentencepiece_model(content: bytes) -> bool:
    """Return whether a ``tokenizer.model`` is sentencepiece's; other tokenizers use that name too."""
    try:
        return len(ModelProto.FromString(content).pieces) > 0
    except DecodeError:
        return False


class SentencePieceIds:
    """The slow LLaMA tokenizer without its BOS.

    Args:
        model_file: ``tokenizer.model``.
        added_tokens: Special tokens to ids. A text is split at them, and sentencepiece gets the parts between them.
        legacy: As in ``tokenizer_config.json``: every part between special tokens gets a space in front.
        unk_token: Text of the unknown token.
    """

    def __init__(self, model_file: Path, added_tokens: Mapping[str, int], legacy: bool, unk_token: str) -> None:
        self._added = dict(added_tokens)
        self._legacy = legacy
        self._unk = unk_token
        model = ModelProto.FromString(model_file.read_bytes())
        if not legacy:
            model.normalizer_spec.add_dummy_prefix = False
        self._model = SentencePieceProcessor(model_proto=model.SerializeToString())
        longest_first = sorted(self._added, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text, including special tokens in it."""
        if not text:
            return []
        if not self._legacy:
            text = _SPACE + text.replace(_SPACE, " ")
        ids: list[int] = []
        parts = [part for part in self._split.split(text) if part] if self._split else [text]
        for part in parts:
            ids += [self._added[part]] if part in self._added else self._encode(part)
        if not self._legacy and len(parts) > 1 and parts[0] == _SPACE:
            # Before a special token at the start of the text, the added space is not part of the text.
            ids = ids[len(self._encode(_SPACE)) :]
        return ids

    def _encode(self, part: str) -> list[int]:
        if self._legacy or not part.startswith((_SPACE, " ")):
            return list(self._model.encode(part))
        # sentencepiece strips a leading space, but keeps it after another piece.
        skipped = len(self._model.encode(self._unk))
        return list(self._model.encode(self._unk + part)[skipped:])
