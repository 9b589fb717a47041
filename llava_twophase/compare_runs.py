"""Compare finished training runs: the arguments that differ, the losses at the end, and a plot."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from llava_twophase.command_line import CommandParser, Integer
from llava_twophase.errors import UserError, run_command
from llava_twophase.files import replace_file
from llava_twophase.plots import loss_figure, missing_matplotlib
from llava_twophase.text import printable

_ANY_WIDTH = 100_000
_PARTS = ("model", "data", "training")
# Arguments that change neither a loss nor the speed: where a run writes and logs, and how it loads data.
_NOISE = (
    "dataloader_", "disable_tqdm", "do_", "eval_on_start", "full_determinism", "hub_", "include_", "log_", "logging_",
    "local_rank", "output_dir", "overwrite_", "push_to_hub", "report_to", "resume_from", "run_name", "save_",
    "trackio_",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A finished training run.

    Attributes:
        arguments: All arguments with their values.
        history: ``log_history`` of ``trainer_state.json``.
    """

    arguments: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]

    def values(self, name: str) -> list[float]:
        """Return the logged values of one name, in order."""
        return [entry[name] for entry in self.history if name in entry]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    return run_command(lambda: _run(argv), interrupted="interrupted")


def _run(argv: Sequence[str] | None) -> int:
    parser = CommandParser(
        prog="llava-compare-runs",
        description=__doc__,
        epilog="example:\n  llava-compare-runs checkpoints/ablation/*/ --plot losses.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="--output_dir of a training run")
    parser.add_argument("--last", type=Integer(1), default=10, metavar="N", help="losses to average (default: 10)")
    parser.add_argument(
        "--plot", metavar="FILE", help="plot the losses into this file (.png, .svg, .pdf; extra: plots)"
    )
    args = parser.parse_args(argv)
    return compare(args.runs, args.last, args.plot)


def compare(folders: Sequence[str], last: int, plot: str | None) -> int:
    """Print the table, and the plot into a file.

    Args:
        folders: Output folders of runs.
        last: Number of logged losses at the end to average.
        plot: File for the plot.
    """
    reason = missing_matplotlib() if plot else None
    if reason:
        raise UserError(f"--plot: {reason}")
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    unique = len({path.name for path in paths}) == len(set(paths))
    runs = {printable(path.name if unique else str(path)): read_run(path) for path in paths}
    console = Console(markup=False, highlight=False, emoji=False)
    different = differences([run.arguments for run in runs.values()])
    wide = _table(runs, different, last)
    if console.measure(wide, options=console.options.update(max_width=_ANY_WIDTH)).maximum <= console.width:
        console.print(wide)
    else:
        # Columns narrower than their words would break words: the arguments get lines of their own.
        console.print(_table(runs, [], last))
        _print_differences(runs, different, console)
    fewer = any(len(run.values("loss")) < last for run in runs.values())
    console.print(f"\nloss: mean of the last {last} logged values{', or of all if a run has fewer' if fewer else ''}")
    if plot:
        _draw(runs, plot)
    return 0


def read_run(folder: Path) -> Run:
    """Read what a finished run wrote.

    Raises:
        UserError: It is not a finished run.
    """
    parts = _read(folder, "arguments.json")
    arguments: dict[str, Any] = dict(parts.get("projector", {}))  # runs of earlier versions do not have it
    for name in _PARTS:
        part = parts.get(name)
        if not isinstance(part, dict):
            raise UserError(f"{folder} is not a finished run: arguments.json has no {name}")
        arguments |= part
    history = _read(folder, "trainer_state.json").get("log_history")
    if not isinstance(history, list):
        raise UserError(f"{folder} is not a finished run: trainer_state.json has no log_history")
    return Run(arguments, history)


def differences(arguments: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of arguments that differ between runs and can change a loss or the speed."""
    names = {name for one in arguments for name in one if not name.startswith(_NOISE)}
    return sorted(name for name in names if len({json.dumps(one.get(name), sort_keys=True) for one in arguments}) > 1)


def _read(folder: Path, file: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is not a finished run: {file} cannot be read ({error}); give the --output_dir of a finished run"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{folder} is not a finished run: {file} is not a JSON object")
    return content


def _table(runs: Mapping[str, Run], arguments: Sequence[str], last: int) -> Table:
    evaluated = any(run.values("eval_loss") for run in runs.values())
    numbers = ["loss", *["eval loss"] * evaluated, "samples/s"]
    columns = [Column(name, overflow="fold") for name in ("run", *arguments)]
    columns += [Column(name, no_wrap=True, justify="right") for name in numbers]
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, run in runs.items():
        cells = [_value(run.arguments.get(argument)) for argument in arguments]
        cells.append(_mean(run.values("loss")[-last:], ".4f"))
        if evaluated:
            cells.append(_mean(run.values("eval_loss")[-1:], ".4f"))
        table.add_row(*map(Text, [name, *cells, _mean(run.values("samples_per_second"), ".2f")]))
    return table


def _print_differences(runs: Mapping[str, Run], arguments: Sequence[str], console: Console) -> None:
    for argument in arguments:
        console.print()
        console.print(argument, style="bold")
        for name, run in runs.items():
            console.print(f"  {name}: {_value(run.arguments.get(argument))}", soft_wrap=True)


def _value(value: Any) -> str:
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _mean(values: Sequence[float], form: str) -> str:
    return format(sum(values) / len(values), form) if values else "-"


def _draw(runs: Mapping[str, Run], plot: str) -> None:
    path = Path(plot)
    figure = loss_figure({name: run.history for name, run in runs.items()})
    try:
        with replace_file(path, unique=True) as file:
            figure.savefig(file, format=path.suffix[1:] or "png", dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {plot} cannot be written: {error}") from None
