"""Results to stdout as text that survives a pipe, a narrow terminal and any encoding; knows nothing of caches."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llava_twophase.errors import UserError
from llava_twophase.files import replace_file
from llava_twophase.text import printable

_BAR = 40


def console() -> Console:
    """Return where results go; text that the output's encoding lacks is escaped, never an error."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    return Console(file=sys.stdout, markup=False, highlight=False, emoji=False)


def print_json(values: Any, out: Console) -> None:
    """Print one JSON object on one line."""
    out.out(json.dumps(values, allow_nan=False), highlight=False)


def print_line(text: str, out: Console, style: str = "") -> None:
    """Print one line, never broken by us: a pipe gets a line for each thing, a terminal breaks it itself."""
    out.print(Text(printable(text), style), soft_wrap=True)


def print_section(title: str, rows: dict[str, str], out: Console) -> None:
    """Print a title and, below it, names beside values."""
    out.print()
    print_line(title, out, "bold")
    print_table(([f"  {name}", value] for name, value in rows.items()), out)


def print_table(rows: Iterable[Sequence[str]], out: Console, header: Sequence[str] = ()) -> None:
    """Print columns as wide as their content, folded where the terminal is narrower.

    Args:
        rows: Cells; those of the first column are names, right of them numbers are aligned to the right.
        out: Where to.
        header: Names of the columns.
    """
    table = Table(box=None, show_header=bool(header), pad_edge=False, header_style="bold")
    cells = [[printable(cell) for cell in row] for row in rows]
    for column in range(len(cells[0]) if cells else 0):
        numeric = bool(header) and all(row[column][:1] in "-0123456789" for row in cells)
        name = header[column] if header else ""
        table.add_column(Text(name), overflow="fold", justify="right" if numeric else "left")
    for row in cells:
        table.add_row(*map(Text, row))
    with out.capture() as capture:
        out.print(table)
    out.out("\n".join(line.rstrip() for line in capture.get().splitlines()), highlight=False)


def bars(counts: dict[str, int]) -> list[list[str]]:
    """Turn a histogram into rows for ``print_table``: name, count, and a bar that any encoding has."""
    largest = max(counts.values(), default=0) or 1
    return [[f"  {name}", f"{count:,}", "#" * -(-_BAR * count // largest)] for name, count in counts.items()]


def flat(value: Any, name: str = "") -> dict[str, str]:
    """Flatten nested dicts to dotted names and texts."""
    if isinstance(value, dict) and value:
        inner = (flat(part, f"{name}.{key}" if name else str(key)) for key, part in value.items())
        return {key: text for rows in inner for key, text in rows.items()}
    return {name: value if isinstance(value, str) else repr(value)}


def number(value: float | None) -> str:
    """Write a measured number for people."""
    return "-" if value is None else f"{value:.4g}"


def write_file(path: str | Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a result beside its place, then rename it: a cut run leaves no half of it.

    Args:
        path: What the user gave as ``-o``; a device such as ``/dev/stdout`` is written to as it is.
        write: Writes to the open file.

    Raises:
        UserError: It cannot be written.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            with path.open("wb") as file:
                write(file)
            return
        with replace_file(path) as file:
            write(file)
    except OSError as error:
        raise UserError(f"-o {path} cannot be written: {error.strerror or error}") from None
