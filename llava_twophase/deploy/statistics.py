"""Summaries of evaluation results, with bootstrap confidence intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from llava_twophase.deploy.evaluate import RecordResult
from llava_twophase.errors import UserError

RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A mean over records with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


METRICS: Mapping[str, tuple[str, Callable[[RecordResult], float]]] = {
    "loss": ("loss with the right image (nats/token)", lambda result: result.loss),
    "loss_shuffled": ("loss with another record's image", lambda result: result.loss_shuffled),
    "loss_without": ("loss without an image", lambda result: result.loss_without),
    "gain": ("loss with another image minus right one", lambda result: result.loss_shuffled - result.loss),
    "recall_at_1": ("right caption ranked first", lambda result: float(result.rank == 0)),
    "exact": (
        "generated caption equals the true one",
        lambda result: float(result.generated == result.caption.strip()),
    ),
    "chrf": ("chrF of the generated caption (0 to 100)", lambda result: chrf(result.generated, result.caption)),
}
"""Name: description, and the value of one record."""


def summarize(results: Sequence[RecordResult], seed: int = 0) -> dict[str, Estimate]:
    """Return the mean of each metric over the records, with its interval."""
    values = _table(results)  # [metrics, records]
    return _estimates(values, seed)


def compare(results: Sequence[RecordResult], reference: Sequence[RecordResult], seed: int = 0) -> dict[str, Estimate]:
    """Return the mean difference of each metric between two runs on the same records (paired bootstrap).

    Raises:
        UserError: The results are of different records.
    """
    if [result.image for result in results] != [result.image for result in reference]:
        raise UserError("the runs were evaluated on different records, so they cannot be compared")
    return _estimates(_table(results) - _table(reference), seed)


def by_length(results: Sequence[RecordResult], bins: int = 4) -> list[dict[str, float]]:
    """Split the records at quantiles of caption length.

    Returns:
        For each group: ``tokens_from``, ``tokens_to``, ``records``, mean ``loss`` and ``length_ratio``, the words of
        the generated captions over those of the true ones.
    """
    ordered = sorted(results, key=lambda result: result.tokens)
    groups = [group for group in np.array_split(np.arange(len(ordered)), bins) if len(group)]
    rows = []
    for group in groups:
        part = [ordered[i] for i in group]
        words = sum(len(result.caption.split()) for result in part)
        rows.append(
            {
                "tokens_from": part[0].tokens,
                "tokens_to": part[-1].tokens,
                "records": len(part),
                "loss": float(np.mean([result.loss for result in part])),
                "length_ratio": sum(len(result.generated.split()) for result in part) / max(words, 1),
            }
        )
    return rows


def chrf(hypothesis: str, reference: str) -> float:
    """Return chrF (character n-gram F-score, Popović 2015) of one caption, 0 to 100, by sacrebleu.

    chrF needs no tokenizer and no reference corpus, and is defined for a single short caption; CIDEr needs several
    references for each image and a Java tokenizer.
    """
    from sacrebleu import sentence_chrf

    return float(sentence_chrf(hypothesis, [reference.strip()]).score)


def require_chrf() -> None:
    """Check that sacrebleu is installed, before any model is loaded.

    Raises:
        UserError: It is not.
    """
    if find_spec("sacrebleu") is None:
        raise UserError("evaluate needs the package sacrebleu: pip install 'llava-twophase[evaluate]'")


def _table(results: Sequence[RecordResult]) -> np.ndarray:
    return np.array([[value(result) for result in results] for _, value in METRICS.values()])


def _estimates(values: np.ndarray, seed: int) -> dict[str, Estimate]:
    generator = np.random.default_rng(seed)
    records = values.shape[1]
    picks = generator.integers(0, records, (RESAMPLES, records))
    means = np.stack([row[picks].mean(1) for row in values])  # [metrics, resamples]
    low, high = np.percentile(means, [2.5, 97.5], axis=1)
    return {name: Estimate(float(values[i].mean()), float(low[i]), float(high[i])) for i, name in enumerate(METRICS)}
