"""What the rows of a data set need from the LLM: positions for the longest row, an embedding for every id.

Both are known without tokenizing all captions: 558K of them would take half a minute.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from llava_twophase.records import Record, Records
from llava_twophase.train.data.conversation import PlainTemplate

# Captions to tokenize in search of the longest row: a third of a second.
_MOST_TOKENIZED = 5000


@dataclass(frozen=True)
class RowLengths:
    """How long the rows of a data set are.

    Attributes:
        longest: Ids of the longest row after truncation, including BOS and the image token. The LLM sees
            ``longest - 1 + image_tokens`` positions.
        record: Position of its record, as for ``record_at``.
        exact: False if more captions would have to be tokenized to be sure; a longer row is then possible.
        truncated: Number of rows that ``--model_max_length`` truncates.
    """

    longest: int
    record: int
    exact: bool
    truncated: int


@dataclass(frozen=True)
class IdOutOfRange:
    """A record with an id that has no embedding.

    Attributes:
        record: Position of the record, as for ``record_at``.
        token: The token's text.
        id: Its id.
    """

    record: int
    token: str
    id: int


def record_at(parts: Sequence[Records], position: int) -> Record:
    """Return a record of several parts.

    Args:
        parts: The parts.
        position: Position of the record, counted over all parts.
    """
    for part in parts:
        if position < len(part):
            return part[position]
        position -= len(part)
    raise IndexError(f"there is no record {position}")


def measure_rows(parts: Sequence[Records], template: PlainTemplate) -> RowLengths:
    """Find the longest row and count the rows that are truncated.

    Captions are tokenized longest first, by bytes, until no other caption can have more tokens.

    Args:
        parts: The records to train on and those to evaluate on, at least one.
        template: Tokenizes captions.
    """
    bounds = template.most_ids_of(np.concatenate([part.caption_bytes for part in parts]))
    longest, at, truncated = 0, 0, 0
    for tokenized, position in enumerate(_longest_first(bounds, template.max_ids)):
        may_be_truncated = bounds[position] > template.max_ids
        if not may_be_truncated and bounds[position] <= longest:
            break
        if not may_be_truncated and tokenized >= _MOST_TOKENIZED:
            return RowLengths(longest, at, False, truncated)
        length = template.count_ids(record_at(parts, position).caption)
        truncated += length > template.max_ids
        if min(length, template.max_ids) > longest:
            longest, at = min(length, template.max_ids), position
    return RowLengths(longest, at, True, truncated)


def _longest_first(bounds: np.ndarray, max_ids: int) -> list[int]:
    # The positions that are looked at, without sorting all.
    count = min(len(bounds), int((bounds > max_ids).sum()) + _MOST_TOKENIZED + 1)
    smallest = np.partition(bounds, len(bounds) - count)[len(bounds) - count]
    positions = np.flatnonzero(bounds >= smallest)
    order: list[int] = positions[np.argsort(-bounds[positions], kind="stable")].tolist()
    return order


def find_id_out_of_range(parts: Sequence[Records], template: PlainTemplate, embeddings: int) -> IdOutOfRange | None:
    """Find the first record with an id that has no embedding: a token that was added to the tokenizer alone.

    Args:
        parts: The records, as for ``measure_rows``.
        template: Tokenizes captions.
        embeddings: Rows of the LLM's input embedding.

    Returns:
        The record and the id; None if the embedding covers all ids of all records.
    """
    tokenizer = template.tokenizer
    outside = {token: id for token, id in tokenizer.vocabulary.items() if id >= embeddings}
    if not outside:
        return None
    # Added tokens are found in a caption as they are written. Others need the tokenizer; that case is rare and slow.
    pattern = "|".join(map(re.escape, sorted(outside))) if outside.keys() <= tokenizer.added.keys() else ""
    used = re.compile(pattern.encode())
    names = {id: token for token, id in outside.items()}
    position = 0
    for captions in chain.from_iterable(part.caption_chunks() for part in parts):
        # Nearly all chunks have no such text.
        for offset, caption in enumerate(captions if used.search(b"\0".join(captions)) else ()):
            if used.search(caption):
                found = next((id for id in template(caption.decode())[0] if id in names), None)
                if found is not None:
                    return IdOutOfRange(position + offset, names[found], found)
        position += len(captions)
    return None
