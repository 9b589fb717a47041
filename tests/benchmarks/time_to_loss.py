"""Measure held-out loss against TFLOP spent: the published recipe, and ways that may need fewer.

    python tests/benchmarks/time_to_loss.py                        # what is missing: seeds of each way and data set
    python tests/benchmarks/time_to_loss.py --ways muon --seeds 0 --change own_rate=0.02  # another setting, kept apart
    python tests/benchmarks/time_to_loss.py --report --figure curves.svg

Each way trains `mlp2x_gelu` between DINOv2-small and SmolLM2-135M, the demo's models, on drawn scenes and on Debian's
stamps. The step is this project's own, with HF Trainer's clipping and schedule and LLaVA's sample order; HF Trainer
itself is not used, so that one process does many runs. The held-out loss is always that of complete images. TFLOP are
counted from shapes, with Muon's own products, without padding and evaluations: a busy machine changes the time only.

A finished run is one file in `--results`; another call, or several at once, continue with the runs that are missing.
Seeds change initialisation and sample order. The report shows runs with the settings below; runs with other settings
are listed after it. The last line of the report is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from loss_report import draw, predictions, show, show_others, summarize  # noqa: E402
from loss_runs import Bench, Recipe, Run, finish, read_records, with_changes  # noqa: E402
from loss_ways import WAYS  # noqa: E402

from pipelines.demo.fetch import SMOLLM2_135M, fetch  # noqa: E402
from pipelines.demo.weights import smollm2_folder  # noqa: E402

RECIPES = {
    "scenes": Recipe(steps=1200, batch=2, learning_rate=1e-3),
    "stamps": Recipe(steps=688, batch=2, learning_rate=1e-3),
}
SEEDS = (0, 1, 2)


def planned(data: list[str], ways: list[str], seeds: list[int], changes: dict[str, float]) -> list[Run]:
    """Return runs in the order in which they are worth most: complete comparisons of one seed first."""
    return [
        with_changes(Run(name, way, seed, RECIPES[name], WAYS[way]), changes)
        for name in data
        for seed in seeds
        for way in ways
    ]


def report(records: list[dict[str, Any]], figure: Path | None) -> dict[str, Any]:
    """Print the tables, draw the curves, and return all figures."""
    settings = {(run.data, run.way): run.settings() for run in planned(list(RECIPES), list(WAYS), [0], {})}
    default = [record for record in records if record["settings"] == settings[record["data"], record["way"]]]
    others = [record for record in records if record not in default]
    labels = {name: way.label for name, way in WAYS.items()}
    line: dict[str, Any] = {}
    for name, recipe in RECIPES.items():
        found = [record for record in default if record["data"] == name]
        summary = summarize(found)
        if summary:
            title = f"{name}: {recipe.steps} steps of {recipe.batch}, learning rate {recipe.learning_rate}"
            show(title, summary, labels)
            line[name] = {"ways": summary, "prediction_errors": predictions(found)}
            print(f"{name}: errors of the predicted final training loss: {line[name]['prediction_errors']}\n")
    line["others"] = [
        {name: record[name] for name in ("data", "way", "seed", "settings", "tflop", "final")} for record in others
    ]
    if others:
        show_others(line["others"], {name: asdict(way) for name, way in WAYS.items()})
    if figure is not None and default:
        draw(default, labels, figure)
    return line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "time-to-loss-results", help="folder of finished runs")
    parser.add_argument("--data", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--change", nargs="+", default=[], metavar="NAME=VALUE", help="other settings of these runs")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--report", action="store_true", help="run nothing; show what is finished")
    parser.add_argument("--figure", type=Path, help="with --report, an SVG or PNG file of the curves")
    args = parser.parse_args(argv)
    if args.report:
        print(json.dumps(report(read_records(args.results), args.figure)))
        return 0
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    torch.set_num_threads(args.threads)
    changes = {name: float(value) for name, _, value in (text.partition("=") for text in args.change)}
    bench = Bench(str(smollm2_folder(fetch(SMOLLM2_135M))), args.results)
    for record in finish(planned(args.data, args.ways, args.seeds, changes), bench, args.results):
        logging.info("%s %s seed %d: %.4f", record["data"], record["way"], record["seed"], record["final"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
