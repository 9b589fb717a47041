r"""Template ``plain``: a caption to ``input_ids`` and ``labels``.

``plain`` replaces the human turn by the image token, so the sequence is ``<image>`` + caption + newline::

    input_ids  [BOS, IMAGE, caption ..., "\n"]      (without BOS if the tokenizer adds none)
    labels     [-100, -100, caption ..., "\n"]
"""

from __future__ import annotations

import numpy as np

from llava_twophase.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_twophase.errors import UserError
from llava_twophase.train.data.tokenizer import CaptionTokenizer, most_tokens

TEMPLATES = ("plain",)


class PlainTemplate:
    """Tokenizes captions for stage 1.

    Args:
        tokenizer: The LLM's.
        model_max_length: Longest sequence in positions, image features included.
        image_tokens: Positions that the image token becomes.
        drop_unk: Drop unknown tokens, as LLaVA does if the pad token is the unknown token.

    Attributes:
        image_position: Index of the image token in ``input_ids``: 1 after a BOS, else 0.
        image_tokens: Positions that the image token becomes.
        max_ids: Longest ``input_ids``; longer ones are truncated.
        tokenizer: The LLM's.

    Raises:
        UserError: The image fills ``model_max_length``, so no caption token would be learned.
    """

    def __init__(
        self, tokenizer: CaptionTokenizer, model_max_length: int, image_tokens: int, drop_unk: bool = False
    ) -> None:
        self.tokenizer, self._encode = tokenizer, tokenizer.encode
        self._dropped = tokenizer.unknown if drop_unk else None
        bos = [] if tokenizer.bos is None else [tokenizer.bos]
        self.prompt = [*bos, IMAGE_TOKEN_INDEX]
        self.image_position = len(bos)
        self.image_tokens = image_tokens
        # LLaVA parity: it truncates the text, with the image as one token, and then the spliced sequence. The second
        # limit is the tighter one.
        self.max_ids = model_max_length - image_tokens + 1
        if self.max_ids <= len(self.prompt):
            raise UserError(
                f"--model_max_length {model_max_length} leaves no room for a caption after the image's {image_tokens} "
                f"positions; use at least {image_tokens + len(self.prompt)}, LLaVA's recipe has 2048"
            )

    @property
    def newline(self) -> int | None:
        """The id that ends every caption; None if the tokenizer has no newline."""
        return next(reversed(self._encode("\n")), None)

    def __call__(self, caption: str) -> tuple[list[int], list[int]]:
        """Tokenize one caption.

        Args:
            caption: The gpt turn, not stripped. It may be empty: the newline is still learned.

        Returns:
            ``input_ids [T]`` and ``labels [T]``, truncated to ``max_ids``.
        """
        text = self._text_ids(caption)
        input_ids = (self.prompt + text)[: self.max_ids]
        labels = ([IGNORE_INDEX] * len(self.prompt) + text)[: self.max_ids]
        return input_ids, labels

    def truncates(self, caption: str) -> bool:
        """Return whether a caption is too long for ``model_max_length``."""
        return self.most_ids(caption) > self.max_ids and self.count_ids(caption) > self.max_ids

    def most_ids(self, caption: str) -> int:
        """Return an upper bound of the row's ids before truncation, without tokenizing the caption."""
        return len(self.prompt) + most_tokens(caption + "\n")

    def most_ids_of(self, caption_bytes: np.ndarray) -> np.ndarray:
        """Return the bound of ``most_ids`` for captions of which ``Records.caption_bytes`` is known, int64."""
        return caption_bytes.astype(np.int64) + len(self.prompt) + most_tokens("\n")

    def count_ids(self, caption: str) -> int:
        """Return the number of the row's ids before truncation."""
        return len(self.prompt) + len(self._text_ids(caption))

    def _text_ids(self, caption: str) -> list[int]:
        return [token for token in self._encode(caption + "\n") if token != self._dropped]
