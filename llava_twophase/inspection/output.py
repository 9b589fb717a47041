"""Print results as text or JSON, for pipes, narrow terminals and any encoding, and write result files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llava_twophase.errors import UserError
from llava_twophase.files import replace_file
from llava_twophase.json_file import finite
from llava_twophase.text import printable

_BAR = 40
NOT_RECORDED = "not recorded"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # the command decides; rich would exit with 1, which means that a problem was found


def console() -> Console:
    """Return the console for results; characters that its encoding does not have are escaped."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    return _Console(file=sys.stdout, markup=False, highlight=False, emoji=False)


def print_result(values: Mapping[str, Any], as_json: bool, print_text: Callable[[Console], None]) -> None:
    """Print a result as one JSON object or as text.

    Args:
        values: JSON values. Numbers that are not finite become null, because JSON has no spelling for them.
        as_json: ``--json``.
        print_text: Prints the text.
    """
    out = console()
    if as_json:
        out.out(json.dumps(finite(values), allow_nan=False), highlight=False)
    else:
        print_text(out)


def print_line(text: str, out: Console, style: str = "") -> None:
    """Print one line without breaking it: in a pipe one line is one item, and a terminal breaks lines itself."""
    out.print(Text(printable(text), style), soft_wrap=True)


def print_section(title: str, rows: Mapping[str, str], out: Console) -> None:
    """Print a title and, below it, names and values."""
    out.print()
    print_line(title, out, "bold")
    print_names(rows, out)


def print_names(rows: Mapping[str, str], out: Console) -> None:
    """Print names and values, indented."""
    print_table(([f"  {name}", value] for name, value in rows.items()), out)


def print_table(rows: Iterable[Sequence[str]], out: Console, header: Sequence[str] = ()) -> None:
    """Print columns that are as wide as their content, or wrapped if the terminal is narrower.

    Args:
        rows: Cells. The first column has names; other columns that have only numbers are aligned to the right.
        out: Where to print.
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


def histogram_rows(counts: Mapping[str, int]) -> list[list[str]]:
    """Return a histogram as rows for ``print_table``: name, count, and a bar of ASCII characters."""
    largest = max(counts.values(), default=0) or 1
    return [[f"  {name}", f"{count:,}", "#" * -(-_BAR * count // largest)] for name, count in counts.items()]


def flatten(value: Any, name: str = "") -> dict[str, str]:
    """Flatten nested dicts to dotted names and texts."""
    if isinstance(value, dict) and value:
        inner = (flatten(part, f"{name}.{key}" if name else str(key)) for key, part in value.items())
        return {key: text for rows in inner for key, text in rows.items()}
    return {name: value if isinstance(value, str) else repr(value)}


def number(value: float | None) -> str:
    """Format a measured number with four digits."""
    return "-" if value is None else f"{value:.4g}"


def check_output(path: str) -> None:
    """Check before the work that a result file can be written.

    Raises:
        UserError: Its folder is missing or read-only, or it is a folder itself.
    """
    target = Path(path)
    if target.is_dir():
        raise UserError(f"-o {path} is a folder; give a file")
    if target.exists() and not target.is_file():  # a device
        return
    if not target.parent.is_dir():
        raise UserError(f"-o {path} cannot be written: {target.parent} is not a folder; create it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise UserError(f"-o {path} cannot be written: the folder {target.parent} is read-only")


def write_file(path: str, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a result file, which replaces an older one when it is complete.

    Args:
        path: ``-o`` of the command; a device such as ``/dev/stdout`` is written in place.
        write: Writes to the open file.

    Raises:
        UserError: It cannot be written.
    """
    target = Path(path)
    try:
        if target.exists() and not target.is_file():
            with target.open("wb") as file:
                write(file)
            return
        with replace_file(target, unique=True) as file:
            write(file)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when a disk is full
        reason = error.strerror if isinstance(error, OSError) else None
        raise UserError(f"-o {path} cannot be written: {reason or str(error).partition(chr(10))[0]}") from None


def print_written(path: str, text: str) -> None:
    """Print what a result file holds; on stderr if the file is a device, which may be stdout itself."""
    if Path(path).is_file():
        print_line(f"wrote {path}: {text}", console())
    else:
        print(printable(f"wrote {path}: {text}"), file=sys.stderr)
