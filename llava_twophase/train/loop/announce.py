"""Tell a remote cache at the start of each epoch which samples come, so that it reads and copies ahead of use."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_twophase.train.data.prefetch import PrefetchDataset
from llava_twophase.train.data.sampler import EpochSampler


class AnnounceOrder(TrainerCallback):
    """Gives the order of an epoch's samples to the data set.

    Args:
        dataset: The data set.
        order: The order of its samples.
        ranks: Ranks that share the samples.
    """

    def __init__(self, dataset: PrefetchDataset, order: EpochSampler, ranks: int) -> None:
        self._dataset, self._order = dataset, order
        self._ranks = ranks

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Announce the epoch's samples; those that a resumed run used already are not copied."""
        order = self._order.order(int(state.epoch or 0))
        used = round(((state.epoch or 0.0) % 1.0) * len(order))
        self._dataset.announce(order, used, self._ranks)
