"""Lengths of the samples of a run, and its optimizer steps."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from llava_twophase.records import Record, Records
from llava_twophase.train.arguments import ProjectorTrainingArguments
from llava_twophase.train.data.conversation import PlainTemplate
from llava_twophase.train.data.row_limits import RowLengths

PERCENTILES = (10, 50, 90, 99)
# Captions that are tokenized for the percentiles: half a second.
_MOST_TOKENIZED = 5000


@dataclass(frozen=True)
class Lengths:
    """Positions of the samples as the LLM sees them: caption, BOS and image.

    Attributes:
        image_tokens: Positions of the image.
        mean: Mean number of positions.
        percentiles: Positions by percent of the samples.
        longest: Positions of the longest sample.
        exact: Whether no longer sample is possible.
        truncated: Number of captions that ``--model_max_length`` truncates.
    """

    image_tokens: int
    mean: float
    percentiles: Mapping[int, int]
    longest: int
    exact: bool
    truncated: int


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of a run.

    Attributes:
        per_epoch: Steps of an epoch.
        total: Steps of the run.
        ranks: Devices.
        batch: Samples of a batch of one device.
        accumulation: Batches of one step.
    """

    per_epoch: int
    total: int
    ranks: int
    batch: int
    accumulation: int

    @property
    def samples(self) -> int:
        """Samples of a step, over all devices."""
        return self.ranks * self.batch * self.accumulation


def measure_lengths(records: Records, template: PlainTemplate, rows: RowLengths) -> Lengths:
    """Return the lengths of samples, percentiles from a seeded draw of records if there are many.

    Args:
        records: The records to train on.
        template: Tokenizes captions.
        rows: Lengths of all rows.
    """
    drawn: Iterable[Record] = records
    if len(records) > _MOST_TOKENIZED:
        drawn = (records[position] for position in random.Random(0).sample(range(len(records)), _MOST_TOKENIZED))
    before_caption = template.image_tokens - 1
    found = [min(template.count_ids(record.caption), template.max_ids) + before_caption for record in drawn]
    values = np.percentile(found, PERCENTILES, method="nearest").astype(int).tolist()
    return Lengths(
        image_tokens=template.image_tokens,
        mean=sum(found) / len(found),
        percentiles=dict(zip(PERCENTILES, values, strict=True)),
        longest=rows.longest + before_caption,
        exact=rows.exact,
        truncated=rows.truncated,
    )


def count_steps(training: ProjectorTrainingArguments, samples: int, ranks: int) -> Steps:
    """Count optimizer steps as HF Trainer and accelerate do.

    Args:
        training: The run's arguments.
        samples: Samples of an epoch.
        ranks: Devices.
    """
    batch, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    if training.dataloader_drop_last:
        batches = samples // batch // ranks
    else:
        batches = math.ceil(math.ceil(samples / batch) / ranks)
    per_epoch = max(math.ceil(batches / accumulation), 1)
    total = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * per_epoch)
    return Steps(per_epoch, total, ranks, batch, accumulation)
