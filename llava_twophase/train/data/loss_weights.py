"""The loss of a step as the run's first layout weights it, for a run that was resumed with other batches.

LLaVA's loss is the mean over the tokens of a process's batch, then the mean over batches and processes. So batches of
another size would weight the captions of a step differently, and a process that fills up its last batch would count
samples twice. Here each sample keeps the weight that it has in the batches of the first layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from llava_twophase.constants import IGNORE_INDEX
from llava_twophase.train.layout import Layout

Batch = dict[str, Any]


class LossWeights:
    """Weights of samples, from their places in an epoch.

    Args:
        origin: The layout at the run's start.
        layout: The layout of this run, with the same global batch.
        rank: This process.
        samples: Samples of an epoch in the first layout.
    """

    def __init__(self, origin: Layout, layout: Layout, rank: int, samples: int) -> None:
        self._origin, self._layout = origin, layout
        self._rank, self._samples = rank, samples
        self._steps = -(-samples // layout.global_batch)

    def without_surplus(self, batches: Iterable[Batch], step: int) -> Iterator[Batch]:
        """Take the labels from samples that only fill up the last batches of an epoch.

        Args:
            batches: This process's batches of an optimizer step.
            step: The step, from 0, over all epochs.
        """
        left = self._left(step)
        for number, batch in enumerate(batches):
            size = len(batch["labels"])
            first = (number * self._layout.world_size + self._rank) * self._layout.batch_size
            used = min(max(left - first, 0), size)
            if used == size:
                yield batch
            else:
                labels = batch["labels"].clone()
                labels[used:] = IGNORE_INDEX
                yield {**batch, "labels": labels}

    def weigh(self, batches: list[Batch], step: int, gather: Callable[[torch.Tensor], torch.Tensor]) -> list[Batch]:
        """Give each batch of a step the ``weights`` of its samples, float32 ``[B]``.

        Nothing is added if the loss of this layout's batches is the same.

        Args:
            batches: This process's batches, as ``without_surplus`` returns them; equally many on all processes.
            step: The step, from 0, over all epochs.
            gather: Concatenates a tensor of all processes along its first axis.
        """
        world, size, unit = self._layout.world_size, self._layout.batch_size, self._origin.batch_size
        units = -(-min(self._left(step), self._layout.global_batch) // unit)
        if size == unit and units == world * len(batches):
            return batches
        counts = torch.zeros(1, len(batches), size, device=batches[0]["labels"].device)
        for number, batch in enumerate(batches):
            tokens = (batch["labels"] != IGNORE_INDEX).sum(1)
            counts[0, number, : len(tokens)] = tokens
        # [processes, batches, B] to the order of the epoch, then to batches of the first layout.
        tokens = gather(counts).transpose(0, 1).flatten()
        padded = torch.nn.functional.pad(tokens, (0, -len(tokens) % unit))
        per_unit = padded.view(-1, unit).sum(1).clamp(min=1)
        # Trainer takes the mean over batches and processes.
        weights = (world * len(batches) / units / per_unit).repeat_interleave(unit)[: len(tokens)]
        own = weights.view(len(batches), world, size)[:, self._rank]
        return [{**batch, "weights": own[number, : len(batch["labels"])]} for number, batch in enumerate(batches)]

    def _left(self, step: int) -> int:
        # Samples of the epoch that are left at the start of a step.
        return self._samples - step % self._steps * self._layout.global_batch
