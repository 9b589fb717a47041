"""Samples to a right-padded batch.

A batch has no attention mask: with causal attention, a token never attends to the padding after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from llava_twophase.constants import IGNORE_INDEX


def collate(samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Make one batch.

    Args:
        samples: Samples of ``CaptionDataset``.

    Returns:
        ``input_ids`` (padded with 0, which no loss uses) and ``labels`` (padded with -100), int64 ``[B, T]``;
        ``features`` ``[B, L, D]`` or ``crops`` ``[B, S, S, 3]``; and ``lengths``, the number of ids of each sample, a
        list.
    """
    batch: dict[str, Any] = {
        "input_ids": pad_sequence([sample["input_ids"] for sample in samples], batch_first=True, padding_value=0),
        "labels": pad_sequence([sample["labels"] for sample in samples], batch_first=True, padding_value=IGNORE_INDEX),
    }
    for name in samples[0].keys() - batch.keys():
        batch[name] = torch.stack([sample[name] for sample in samples])
    batch["lengths"] = [len(sample["input_ids"]) for sample in samples]
    return batch
