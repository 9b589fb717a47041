"""Training runs side by side: the arguments in which they differ and where their losses ended, as a table and a plot.

python pipelines/compare_runs.py checkpoints/ablation/*/ --plot losses.png
"""

import argparse
import json
import os
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from llava_twophase.errors import UserError, run_command

_NOT_COMPARED = ("output_dir", "logging_dir", "run_name")


def main(argv=None):
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of train_projector.py")
    parser.add_argument(
        "--last", type=int, default=10, help="logged losses at the end to take the mean of (default: 10)"
    )
    parser.add_argument("--plot", type=Path, help="draw the losses over the steps into this file (extra: plots)")
    args = parser.parse_args(argv)
    return run_command(lambda: compare(args))


def compare(args):
    """Print the table and draw the plot."""
    folders = [Path(os.path.abspath(folder)) for folder in args.runs]
    # By their own names where those tell them apart.
    named = len({folder.name for folder in folders}) == len(set(folders))
    runs = {folder.name if named else str(folder): (_arguments(folder), _history(folder)) for folder in folders}
    different = _differences([arguments for arguments, _ in runs.values()])
    evaluated = any("eval_loss" in entry for _, history in runs.values() for entry in history)
    names = ["run", *different, f"loss, last {args.last}", *["eval loss"] * evaluated, "samples/s"]
    table = Table(*(Column(name, overflow="fold") for name in names), box=box.SIMPLE)
    for name, (arguments, history) in runs.items():
        losses = _values(history, "loss")[-args.last :]
        rates = _values(history, "samples_per_second")
        cells = [str(arguments.get(key)) for key in different]
        cells += [_mean(losses, ".4f"), *[_mean(_values(history, "eval_loss")[-1:], ".4f")] * evaluated]
        table.add_row(*map(Text, [name, *cells, _mean(rates, ".2f")]))
    Console().print(table)
    if args.plot is not None:
        _draw({name: history for name, (_, history) in runs.items()}, args.plot)
    return 0


def _read(folder, file):
    try:
        return json.loads((folder / file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no finished run: {file} cannot be read ({error})") from None


def _arguments(folder):
    # Those of the model, the data and the training, in one.
    parts = _read(folder, "arguments.json")
    return {key: value for part in ("model", "data", "training") for key, value in parts[part].items()}


def _history(folder):
    return _read(folder, "trainer_state.json")["log_history"]


def _differences(arguments):
    keys = {key for one in arguments for key in one} - set(_NOT_COMPARED)
    return sorted(key for key in keys if len({json.dumps(one.get(key), sort_keys=True) for one in arguments}) > 1)


def _values(history, name):
    return [entry[name] for entry in history if name in entry]


def _mean(values, form):
    return format(sum(values) / len(values), form) if values else "-"


def _draw(histories, picture):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'llava-twophase[plots]'") from None
    axes = (figure := Figure(figsize=(8, 4.5), layout="constrained")).subplots()
    styles = ("-", "--", "-.", ":")
    for number, (name, history) in enumerate(histories.items()):
        points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
        axes.plot(
            [step for step, _ in points],
            [loss for _, loss in points],
            styles[number % len(styles)],
            label=name,
            linewidth=1.2,
        )
    axes.set(xlabel="step", ylabel="loss (nats a caption token)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    try:
        figure.savefig(picture, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {picture} cannot be written: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
