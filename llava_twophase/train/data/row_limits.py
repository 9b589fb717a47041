"""What the rows of a data set need from the LLM: positions for the longest row, an embedding for every id.

Both are known without tokenizing all captions: 558K of them would take half a minute.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llava_twophase.records import Record
from llava_twophase.train.data.conversation import PlainTemplate

# Captions to tokenize in search of the longest row: a third of a second.
_MOST_TOKENIZED = 5000


@dataclass(frozen=True)
class RowLengths:
    """How long the rows of a data set are.

    Attributes:
        longest: Ids of the longest row after truncation, including BOS and the image token. The LLM sees
            ``longest - 1 + image_tokens`` positions.
        record: Position of its record.
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
        record: Position of the record.
        token: The token's text.
        id: Its id.
    """

    record: int
    token: str
    id: int


def measure_rows(records: Sequence[Record], template: PlainTemplate) -> RowLengths:
    """Find the longest row and count the rows that are truncated.

    Captions are tokenized from the longest in bytes on, until no other caption can have more tokens.

    Args:
        records: At least one.
        template: Tokenizes captions.
    """
    bounds = np.fromiter((template.most_ids(record.caption) for record in records), np.int64, len(records))
    longest, at, truncated = 0, 0, 0
    for tokenized, position in enumerate(np.argsort(-bounds, kind="stable").tolist()):
        may_be_truncated = bounds[position] > template.max_ids
        if not may_be_truncated and bounds[position] <= longest:
            break
        if not may_be_truncated and tokenized >= _MOST_TOKENIZED:
            return RowLengths(longest, at, False, truncated)
        length = template.count_ids(records[position].caption)
        truncated += length > template.max_ids
        if min(length, template.max_ids) > longest:
            longest, at = min(length, template.max_ids), position
    return RowLengths(longest, at, True, truncated)


def find_id_out_of_range(records: Sequence[Record], template: PlainTemplate, embeddings: int) -> IdOutOfRange | None:
    """Find the first record with an id that has no embedding: a token that was added to the tokenizer alone.

    Args:
        records: The records.
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
    used = re.compile(pattern)
    names = {id: token for token, id in outside.items()}
    for position, record in enumerate(records):
        if used.search(record.caption):
            found = next((id for id in template(record.caption)[0] if id in names), None)
            if found is not None:
                return IdOutOfRange(position, names[found], found)
    return None
