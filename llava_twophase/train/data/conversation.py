r"""Template ``plain``: a caption to ``input_ids`` and ``labels``; knows nothing of images or batches.

``plain`` replaces the human turn by the image token alone, so the sequence is ``<image>`` + caption + newline::

    input_ids  [BOS, IMAGE, caption ..., "\n"]      (no BOS where the tokenizer adds none)
    labels     [-100, -100, caption ..., "\n"]
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_twophase.compat import find_file, tokenizer_settings
from llava_twophase.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_twophase.errors import UserError
from llava_twophase.train.data.sentencepiece_ids import SentencePieceIds

TEMPLATES = ("plain",)


class PlainTemplate:
    """Tokenises captions for stage 1.

    Args:
        tokenizer: A Hugging Face tokenizer; needs neither a pad token nor a BOS.
        encode: Text to ids without special tokens in front: see ``text_encoder``.
        model_max_length: Longest sequence, in tokens, image features included.
        image_tokens: Positions that the image token becomes.
        drop_unk: Leave out unknown tokens, as LLaVA does where pad and unknown token are one.

    Attributes:
        image_at: Position of the image token: 1 behind a BOS, else 0.
        image_tokens: Positions that the image token becomes.

    Raises:
        UserError: The image alone fills ``model_max_length``, so no caption token would ever be learnt.
    """

    def __init__(
        self,
        tokenizer: Any,
        encode: Callable[[str], list[int]],
        model_max_length: int,
        image_tokens: int,
        drop_unk: bool = False,
    ) -> None:
        self._encode = encode
        self._dropped = tokenizer.unk_token_id if drop_unk else None
        bos = tokenizer.bos_token_id
        self._prefix = [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []
        self.image_at, self.image_tokens = len(self._prefix), image_tokens
        # LLaVA parity: it cuts the text, the image counted as one token, then the spliced sequence: the tighter cut.
        self._longest = model_max_length - image_tokens + 1
        if self._longest <= len(self._prefix) + 1:
            raise UserError(
                f"--model_max_length {model_max_length} leaves no room for a caption behind the image's {image_tokens} "
                f"positions; use at least {image_tokens + len(self._prefix) + 1}, LLaVA's recipe has 2048"
            )

    def is_cut(self, caption: str) -> bool:
        """Tell whether a caption is too long for ``model_max_length``."""
        room = self._longest - len(self.prompt)
        # No token is shorter than a byte, but sentencepiece may put one or two in front: most captions need no look.
        return len(caption.encode()) + 3 > room and len(self._encode(caption + "\n")) > room

    @property
    def prompt(self) -> list[int]:
        """The ids in front of every caption: BOS where there is one, and the image token."""
        return [*self._prefix, IMAGE_TOKEN_INDEX]

    @property
    def newline(self) -> int | None:
        """The id that ends every caption; None where the tokenizer has no newline."""
        return next(reversed(self._encode("\n")), None)

    def __call__(self, caption: str) -> tuple[list[int], list[int]]:
        """Tokenise one caption.

        Args:
            caption: The gpt turn, not stripped; may be empty, the newline is still learnt.

        Returns:
            ``input_ids [T]`` and ``labels [T]``, cut to ``model_max_length``.
        """
        text = [token for token in self._encode(caption + "\n") if token != self._dropped]
        start = self.prompt
        input_ids = (start + text)[: self._longest]
        labels = ([IGNORE_INDEX] * len(start) + text)[: self._longest]
        return input_ids, labels


def text_encoder(name: str, tokenizer: Any, cache_dir: str | None = None) -> Callable[[str], list[int]]:
    """Choose what turns captions into ids: sentencepiece itself wherever the LLM has a ``tokenizer.model``.

    Args:
        name: The LLM's hub id or folder.
        tokenizer: Its Hugging Face tokenizer.
        cache_dir: Where hub downloads are kept.

    Returns:
        Text to ids, with no BOS or EOS.
    """
    model_file = find_file(name, "tokenizer.model", cache_dir)
    if model_file is not None:
        # Absent or null means legacy, as in transformers 4.37; transformers 5's tokenizer no longer knows the setting.
        legacy = tokenizer_settings(name, cache_dir).get("legacy") is not False
        return SentencePieceIds(Path(model_file), tokenizer.get_added_vocab(), legacy, tokenizer.unk_token)
    return lambda text: tokenizer(text, add_special_tokens=False).input_ids
