"""Captions to the ids that LLaVA's slow LLaMA tokenizer gives; knows nothing of images or batches.

LLaVA tokenises with sentencepiece itself. transformers 5 rebuilds a ``tokenizer.model`` as a fast tokenizer, which
gives other ids for a leading space, for special tokens inside a caption, and for a literal U+2581.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

_SPACE = "\u2581"  # how sentencepiece writes a space


class SentencePieceIds:
    """The slow LLaMA tokenizer without its BOS.

    Args:
        model_file: ``tokenizer.model``.
        added_tokens: Special tokens to ids; they are cut out of a text before sentencepiece sees it.
        legacy: As in ``tokenizer_config.json``: every piece between special tokens gets a space in front.
        unk_token: Spelling of the unknown token.
    """

    def __init__(self, model_file: Path, added_tokens: Mapping[str, int], legacy: bool, unk_token: str) -> None:
        self._added, self._legacy, self._unk = dict(added_tokens), legacy, unk_token
        model = ModelProto.FromString(model_file.read_bytes())
        if not legacy:
            model.normalizer_spec.add_dummy_prefix = False
        self._model = SentencePieceProcessor(model_proto=model.SerializeToString())
        longest_first = sorted(self._added, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text, special tokens in it included."""
        if not text:
            return []
        if not self._legacy:
            text = _SPACE + text.replace(_SPACE, " ")
        ids: list[int] = []
        parts = [part for part in self._split.split(text) if part] if self._split else [text]
        for part in parts:
            ids += [self._added[part]] if part in self._added else self._encode(part)
        if not self._legacy and len(parts) > 1 and parts[0] == _SPACE:
            # The space put in front of a text that starts with a special token stands for nothing.
            ids = ids[len(self._encode(_SPACE)) :]
        return ids

    def _encode(self, part: str) -> list[int]:
        if self._legacy or not part.startswith((_SPACE, " ")):
            return self._model.encode(part)
        # sentencepiece strips a leading space; behind another piece it stays.
        skipped = len(self._model.encode(self._unk))
        return self._model.encode(self._unk + part)[skipped:]
