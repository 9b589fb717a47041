"""Runs of time_to_loss.py: one file for each finished run, so that another call continues with what is missing."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from loss_data import Split, load_data
from loss_ways import SampleFlops, Stepper, Way, patch_positions, pool, random_subset, ridge_start

from llava_twophase.files import replace_file
from llava_twophase.projectors.build import build_projector
from llava_twophase.train.data.collator import collate
from llava_twophase.train.data.sampler import EpochSampler
from llava_twophase.train.model.frozen_llm import FrozenLLM
from llava_twophase.train.model.llava import LlavaProjectorModel
from llava_twophase.train.model.load_llm import LoadedLLM, read_causal_lm

logger = logging.getLogger(__name__)

EVALUATED_BATCH = 16
EVALUATIONS = (0.25, 0.5, 0.8, 1.0)  # parts of a run's steps


@dataclass(frozen=True)
class Recipe:
    """The baseline's settings on one data set; ways change them by factors.

    Attributes:
        steps: Optimizer steps.
        batch: Samples of a step.
        learning_rate: Learning rate.
        bos: Whether rows begin with the LLM's BOS.
    """

    steps: int
    batch: int
    learning_rate: float
    bos: bool = True


@dataclass(frozen=True)
class Run:
    """One run of the matrix."""

    data: str
    way: str
    seed: int
    recipe: Recipe
    changes: Way

    def settings(self) -> dict[str, Any]:
        """Return everything that changes the run's result."""
        return {**asdict(self.recipe), "way": self.changes.settings()}

    def path(self, folder: Path) -> Path:
        """Return the file of its result."""
        digest = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:8]
        return folder / f"{self.data}-{self.way}-{self.seed}-{digest}.json"


class Bench:
    """The LLM and the data of all runs of this process.

    Args:
        llm: Folder of the LLM.
        folder: Folder of features and results.
        dtype: Of the LLM.
    """

    def __init__(self, llm: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        self._name, self._folder = llm, folder
        self._llm = read_causal_lm(llm, {"dtype": dtype})
        self._data: dict[tuple[str, bool], tuple[Split, Split]] = {}

    def data(self, name: str, bos: bool) -> tuple[Split, Split]:
        """Return both splits of a data set."""
        if (name, bos) not in self._data:
            self._data[name, bos] = load_data(name, self._folder, self._name, bos)
        return self._data[name, bos]

    def run(self, run: Run) -> dict[str, Any]:
        """Train one projector and return its record."""
        train, held_out = self.data(run.data, run.recipe.bos)
        return train_projector(run, self._llm, train, held_out)


def train_projector(run: Run, llm: Any, train: Split, held_out: Split) -> dict[str, Any]:
    """Train one projector and return its record: settings, curve, final loss, training losses.

    The step is the project's own (``LlavaProjectorModel``), with HF Trainer's clipping, schedule and sample order.
    """
    started, way = time.perf_counter(), run.changes
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    tokens, width = train.features.shape[1:]
    projector = build_projector("mlp2x_gelu", width, llm.config.hidden_size)
    image_position = int((train.input_ids[0] < 0).nonzero()[0])
    frozen = FrozenLLM(LoadedLLM(llm), image_position, micro_batch_size=run.recipe.batch, checkpoint_every=0)
    model = LlavaProjectorModel(frozen, projector)
    flops, spent = SampleFlops(llm, width), 0.0
    if way.start == "ridge":
        ridge_start(projector, train.features, mean_embeddings(llm, train, image_position))
        spent += flops.ridge(len(train), tokens)
    steps = math.ceil(way.duration * run.recipe.steps)
    stepper = Stepper(way, projector, run.recipe.learning_rate, steps)
    order = endless(len(train), run.seed)
    due = {math.ceil(part * steps) for part in EVALUATIONS}
    curve: list[tuple[int, float, float]] = []
    losses = []
    for step in range(1, steps + 1):
        batch = collate(train.samples([next(order) for _ in range(run.recipe.batch)]))
        patches = None
        if way.tokens != "all" and step <= way.share * steps:
            if way.tokens == "pooled":
                batch["features"] = pool(batch["features"].float())
            else:
                patches = random_subset(tokens, tokens // 4, generator)
                batch["features"] = batch["features"][:, patches]
        with patch_positions(llm, image_position, patches, tokens):
            loss = model(**batch)["loss"]
        loss.backward()
        stepper.step()
        losses.append(round(loss.item(), 5))
        spent += sum(flops.step(batch["features"].shape[1], length, image_position) for length in batch["lengths"])
        spent += stepper.flops
        if step in due:
            with stepper.evaluating():
                curve.append((step * run.recipe.batch, spent / 1e12, held_out_loss(model, held_out)))
            logger.info("%s %s %d: step %d, held-out loss %.4f", run.data, run.way, run.seed, step, curve[-1][2])
    return {
        **{"data": run.data, "way": run.way, "seed": run.seed, "settings": run.settings()},
        **{"curve": curve, "final": curve[-1][2], "tflop": spent / 1e12, "train_losses": losses},
        "seconds": round(time.perf_counter() - started, 1),
    }


def endless(size: int, seed: int) -> Iterator[int]:
    """Yield rows in LLaVA's order, epoch after epoch."""
    sampler, epoch = EpochSampler(size, seed), 0
    while True:
        sampler.set_epoch(epoch)
        yield from sampler
        epoch += 1


def mean_embeddings(llm: Any, split: Split, image_position: int) -> torch.Tensor:
    """Return the mean input embedding of each caption, float32 ``[N, H]``."""
    table = llm.get_input_embeddings()
    with torch.no_grad():
        return torch.stack([table(ids[image_position + 1 :]).float().mean(0) for ids in split.input_ids])


@torch.no_grad()
def held_out_loss(model: LlavaProjectorModel, split: Split, shift: int = 0) -> float:
    """Return the mean loss per caption token with all patches; `shift` gives each caption another image."""
    total, count = 0.0, 0
    for start in range(0, len(split), EVALUATED_BATCH):
        rows = list(range(start, min(start + EVALUATED_BATCH, len(split))))
        batch = collate(split.samples(rows))
        if shift:
            batch["features"] = split.features[[(row + shift) % len(split) for row in rows]]
        tokens = int((batch["labels"] >= 0).sum())
        total += float(model(**batch)["loss"]) * tokens
        count += tokens
    return total / count


def finish(runs: list[Run], bench: Bench, folder: Path) -> Iterator[dict[str, Any]]:
    """Run what has no result yet and no other process runs, in order, and yield each record."""
    for run in runs:
        path = run.path(folder)
        with claimed(path) as mine:
            if not mine or path.exists():
                continue
            record = bench.run(run)
            with replace_file(path, "w") as file:
                file.write(json.dumps(record) + "\n")
        yield record


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Claim a run for this process; False if another one has it. A process that ends releases its claim."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Return all finished runs of a folder."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def with_changes(run: Run, changes: dict[str, float]) -> Run:
    """Return a run with other settings, by name: ``steps``, ``batch``, ``learning_rate``, or a factor of its way."""
    for name, value in changes.items():
        if name in asdict(run.recipe):
            kind = type(getattr(run.recipe, name))
            run = replace(run, recipe=replace(run.recipe, **{name: kind(value)}))
        else:
            run = replace(run, changes=replace(run.changes, **{name: value}))
    return run
