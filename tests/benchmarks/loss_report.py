"""Table, curves and predictions of time_to_loss.py, from finished runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

WITHIN = 1.003  # of the baseline's final held-out loss
STUDENT = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}  # two-sided 95 %, by the number of values
FIRST = 0.2  # part of a run that a prediction sees
LAST = 0.1  # part of a run whose mean loss is predicted


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the half width of Student's 95 % interval; None for fewer than three values."""
    mean = statistics.mean(values)
    if len(values) < 3:
        return mean, None
    return mean, STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def flops_to_loss(curve: Sequence[Sequence[float]], loss: float) -> float | None:
    """Return the TFLOP at which a curve of (samples, TFLOP, held-out loss) first reaches `loss`, by evaluations."""
    return next((tflop for _, tflop, found in curve if found <= loss), None)


def predict_final(losses: Sequence[float], first: float = FIRST) -> float:
    """Predict the mean training loss of a run's last tenth from its first part.

    The fit is ``a + b / t ** c`` with a, b >= 0, by least squares over a grid of c; t counts steps.

    Args:
        losses: Training loss of every step of the complete run; only the first part is used.
        first: That part.
    """
    seen = max(3, round(first * len(losses)))
    steps = np.arange(1, seen + 1)
    later = np.arange(math.ceil((1 - LAST) * len(losses)), len(losses)) + 1
    values, best = np.array(losses[:seen]), (math.inf, 0.0)
    for exponent in np.geomspace(0.02, 3, 60):
        slope, level = np.polyfit(steps**-exponent, values, 1)
        if level < 0:  # the best level that is allowed
            level, slope = 0.0, float(values @ steps**-exponent / (steps ** (-2 * exponent)).sum())
        error = float(np.square(level + slope * steps**-exponent - values).sum())
        best = min(best, (error, float(level + slope * (later**-exponent).mean())))
    return best[1]


def final_training_loss(losses: Sequence[float]) -> float:
    """Return the mean training loss of a run's last tenth."""
    return statistics.mean(losses[math.ceil((1 - LAST) * len(losses)) :])


def summarize(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compare the runs of one data set with its baseline's.

    Args:
        records: Records of one data set, each way with one setting.

    Returns:
        By way: ``losses`` and ``tflop`` of all seeds, their ``spread`` (largest to smallest loss, relative to the
        mean), ``difference`` of the mean loss to the baseline's, ``reached`` and, of the seeds that reach the
        baseline's mean loss within 0.3 %, the mean ``share`` of its TFLOP.
    """
    ways: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        ways.setdefault(record["way"], []).append(record)
    if "baseline" not in ways:
        return {}
    target = statistics.mean(record["final"] for record in ways["baseline"])
    cost = statistics.mean(record["tflop"] for record in ways["baseline"])
    found = {}
    for way, runs in ways.items():
        mean, interval = mean_and_interval([run["final"] for run in runs])
        shares = [flops_to_loss(run["curve"], WITHIN * target) for run in runs]
        reached = [share / cost for share in shares if share is not None]
        found[way] = {
            "seeds": len(runs),
            "losses": [round(run["final"], 5) for run in runs],
            "mean": round(mean, 5),
            "spread": round((max(run["final"] for run in runs) - min(run["final"] for run in runs)) / mean, 4),
            "interval": None if interval is None else round(interval, 5),
            "tflop": round(statistics.mean(run["tflop"] for run in runs), 2),
            "share": round(statistics.mean(run["tflop"] for run in runs) / cost, 3),
            "difference": round(mean / target - 1, 5),
            "reached": len(reached),
            "share_to_loss": round(statistics.mean(reached), 3) if reached else None,
        }
    return found


def predictions(records: Sequence[dict[str, Any]]) -> list[float]:
    """Return the relative errors of ``predict_final`` on the baseline's runs."""
    return [
        round(predict_final(record["train_losses"]) / final_training_loss(record["train_losses"]) - 1, 4)
        for record in records
        if record["way"] == "baseline"
    ]


def show(title: str, summary: dict[str, Any], labels: dict[str, str]) -> None:
    """Print one data set's table."""
    table = Table(title=title)
    headings = (
        "way",
        "seeds",
        "TFLOP",
        "of the baseline's",
        "held-out loss",
        "spread",
        "difference",
        "seeds within 0.3 %",
        "at",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for way in sorted(summary, key=list(labels).index):
        row = summary[way]
        interval = "" if row["interval"] is None else f" ± {row['interval']:.4f}"
        at = "-" if row["share_to_loss"] is None else f"{row['share_to_loss']:.2f}"
        table.add_row(
            labels[way],
            str(row["seeds"]),
            f"{row['tflop']:.1f}",
            f"{row['share']:.2f}",
            f"{row['mean']:.4f}{interval}",
            f"{100 * row['spread']:.1f} %",
            f"{100 * row['difference']:+.2f} %",
            f"{row['reached']} of {row['seeds']}",
            at,
        )
    Console(width=160).print(table)


def show_others(records: Sequence[dict[str, Any]], ways: dict[str, dict[str, Any]]) -> None:
    """Print runs with other settings than the tables'."""
    table = Table(title="runs with other settings")
    for heading in ("data", "way", "seed", "steps", "batch", "learning rate", "BOS", "changes", "TFLOP", "loss"):
        table.add_column(heading)
    for record in sorted(records, key=lambda record: (record["data"], record["way"], record["seed"])):
        settings = record["settings"]
        own = ways[record["way"]]
        changes = {name: value for name, value in settings["way"].items() if value != own[name]}
        recipe = (str(settings.get(name, False)) for name in ("steps", "batch", "learning_rate", "bos"))
        figures = (f"{record['tflop']:.1f}", f"{record['final']:.4f}")
        table.add_row(record["data"], record["way"], str(record["seed"]), *recipe, str(changes or ""), *figures)
    Console(width=160).print(table)


def draw(records: Sequence[dict[str, Any]], labels: dict[str, str], path: Path) -> None:
    """Draw mean held-out loss against mean TFLOP of each way, one plot for each data set."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = sorted({record["data"] for record in records})
    figure = Figure(figsize=(5 * len(names), 4.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for number, way in enumerate(labels):
            curves = [record["curve"] for record in records if (record["data"], record["way"]) == (name, way)]
            if not curves:
                continue
            mean = np.array(curves).mean(axis=0)
            style = {"linewidth": 2.5, "color": "black"} if way == "baseline" else {"color": f"C{number - 1}"}
            axes.plot(mean[:, 1], mean[:, 2], marker="o", markersize=3, label=f"{way} ({len(curves)})", **style)
        axes.set(title=name, xlabel="TFLOP", ylabel="held-out loss, nats per caption token", yscale="log")
        axes.yaxis.set_major_formatter("{x:.1f}")
        axes.yaxis.set_minor_formatter("{x:.1f}")
        axes.legend(fontsize=8, title="way (seeds)")
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "curves"}):
        figure.savefig(path, dpi=80, metadata={"Date": None} if path.suffix == ".svg" else None)
