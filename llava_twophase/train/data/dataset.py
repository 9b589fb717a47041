"""A record to a sample: token ids, and features from the cache or pixels for the on-the-fly tower."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from llava_twophase.errors import UserError
from llava_twophase.records import Records
from llava_twophase.train.data.conversation import PlainTemplate
from llava_twophase.train.data.feature_source import Collate, FeatureSource
from llava_twophase.train.data.prefetch import PrefetchDataset


class SampleError(UserError):
    """A sample that cannot be used.

    A data loader raises an error of a worker again with the worker's traceback as its message. Only the original
    message is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class CaptionDataset(Dataset[dict[str, torch.Tensor]]):
    """Image-caption pairs as samples.

    Args:
        records: Validated records.
        template: Tokenizes a caption.
        source: Gives the features of an image.
    """

    def __init__(self, records: Records, template: PlainTemplate, source: FeatureSource) -> None:
        self._records = records
        self._template = template
        self._source = source

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return one sample.

        Returns:
            ``input_ids`` and ``labels``, int64 ``[T]``, and either ``features [L, D]`` or ``crops uint8 [S, S, 3]``.

        Raises:
            SampleError: The image or its features cannot be used.
        """
        record = self._records[index]
        try:
            return {**self.tokenize(index), **self._source.sample(record.image)}
        except UserError as error:
            raise SampleError(f"the record with the caption {record.caption[:60]!r}: {error}") from None

    def tokenize(self, index: int) -> dict[str, torch.Tensor]:
        """Return ``input_ids`` and ``labels`` of one sample, int64 ``[T]``."""
        input_ids, labels = self._template(self._records[index].caption)
        return {"input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels)}

    def prefetch(
        self, collate: Collate, batch_size: int, batches_in_use: int, device: torch.device
    ) -> PrefetchDataset | None:
        """Return a dataset that reads batches ahead of training; None in on-the-fly mode.

        Args:
            collate: Makes a batch of samples.
            batch_size: Largest batch.
            batches_in_use: Batches that training uses at the same time.
            device: Where batches go.
        """
        return self._source.prefetch(
            self.tokenize,
            collate,
            self._records.images,
            batch_size=batch_size,
            batches_in_use=batches_in_use,
            device=device,
        )

    def lengths(self) -> np.ndarray:
        """Return the number of words of each record's turns, by which LLaVA's grouped sampling sorts."""
        return self._records.word_counts
