"""Record i to a sample: token ids, and features from the cache or pixels for on-the-fly mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from llava_twophase.cache.reader import FeatureCache
from llava_twophase.records import Record
from llava_twophase.train.data.conversation import PlainTemplate
from llava_twophase.train.data.prefetch import FeedingDataset

if TYPE_CHECKING:
    from llava_twophase.train.data.on_the_fly import OnTheFly


class CaptionDataset(Dataset[dict[str, torch.Tensor]]):
    """Image-caption pairs as samples.

    Args:
        records: Validated records.
        template: Tokenises a caption.
        source: A feature cache, or the on-the-fly baseline.
    """

    def __init__(self, records: Sequence[Record], template: PlainTemplate, source: FeatureCache | OnTheFly) -> None:
        self._records, self._template, self._source = records, template, source

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return one sample.

        Returns:
            ``input_ids`` and ``labels``, int64 ``[T]``, and either ``features`` ``[L, D]`` in the storage dtype or
            ``crops`` uint8 ``[S, S, 3]``.
        """
        record, sample = self._records[index], self.text(index)
        if isinstance(self._source, FeatureCache):
            sample["features"] = self._source.tensor([record.image])[0]
        else:
            sample["crops"] = self._source.crop(record.image)
        return sample

    def text(self, index: int) -> dict[str, torch.Tensor]:
        """Return ``input_ids`` and ``labels`` of one sample, int64 ``[T]``."""
        input_ids, labels = self._template(self._records[index].caption)
        return {"input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels)}

    def feeding(
        self, collate: Callable[[list[Any]], dict[str, Any]], batch_size: int, held: int, device: torch.device
    ) -> FeedingDataset | None:
        """Return what reads whole batches from the cache while training computes; None in on-the-fly mode.

        Args:
            collate: Makes a batch of samples.
            batch_size: Largest batch.
            held: How many batches training holds at once.
            device: Where batches go.
        """
        if not isinstance(self._source, FeatureCache):
            return None
        keys = [record.image for record in self._records]
        return FeedingDataset(self.text, collate, self._source, keys, batch_size, held, device)

    def lengths(self) -> list[int]:
        """Return the words of each record's turns, what LLaVA's grouped sampling sorts by."""
        return [len(record.prompt.split()) + len(record.caption.split()) for record in self._records]
