"""Read a data file that is a JSON list or JSON Lines, with errors by file, line and column; prepare values for JSON.

The form of a data file is recognised by content, not by its name.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_twophase.errors import UserError, short_repr

_EXPECTED = "expected a JSON list of records, or JSON Lines with one record per line"
# First bytes of files that are given by mistake.
_OTHER_FORMATS = {
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\x1f\x8b": "compressed with gzip (gunzip decompresses it)",
    b"\x28\xb5\x2f\xfd": "compressed with zstd (unzstd decompresses it)",
    b"PK\x03\x04": "a zip archive (unzip unpacks it)",
    b"version https://git-lfs": "a Git LFS pointer (git lfs pull downloads the file)",
    b"<": "an HTML or XML page",
}
_UTF_16_32 = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")
_STRING = r'"(?:[^"\\]|\\.)*"'
_DEPTH = 100


def read_json_records(path: Path, flag: str) -> Iterator[Any]:
    """Read the entries of a JSON list, or the lines of JSON Lines.

    Args:
        path: The file, in UTF-8 with or without a byte order mark.
        flag: The command-line flag that gave it.

    Raises:
        UserError: The file cannot be read, or is something else; the message says what was found.
    """
    text = _read_text(path, flag)
    start = text.lstrip()[:1]
    if start == "[":
        yield from _parse(text, path)
    elif start in ("{", ""):
        yield from _read_lines(text, path)
    else:
        first = text.lstrip().partition("\n")[0].rstrip()
        guess = "; it may be CSV or TSV" if re.search(r"\w[,;\t]\w", first) else ""
        raise UserError(f"{path} is not JSON: it starts with {short_repr(first)}{guess}; {_EXPECTED}")


def _read_lines(text: str, path: Path) -> Iterator[Any]:
    # Only "\n" ends a line: str.splitlines would also split at U+2028 within a caption.
    # Files that were joined have a byte order mark in the middle.
    lines = [line.removeprefix("\ufeff") for line in text.split("\n")]
    number, first = next(((number, line) for number, line in enumerate(lines, 1) if line.strip()), (0, ""))
    try:
        entry = json.loads(first or "{}")
    except (ValueError, RecursionError):
        entry = None
        _refuse_objects_over_lines(text, path, first)
    if not any(line.strip() for line in lines[number:]):
        _refuse_wrapped_records(entry, path)
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _parse(line, path, number)


def _refuse_objects_over_lines(text: str, path: Path, first: str) -> None:
    # The first line is not a JSON value of its own.
    try:
        entry, end = json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError):
        if first.strip() == "{":
            _parse(text, path)
        return
    _refuse_wrapped_records(entry, path)
    several = "objects" if text.lstrip()[end:].strip() else "one object"
    raise UserError(
        f"{path} has {several} written over several lines; {_EXPECTED}: "
        f"jq -c . {path} > records.jsonl writes one per line"
    )


def _refuse_wrapped_records(entry: Any, path: Path) -> None:
    # An object that has the records in a list or object of its own.
    if not isinstance(entry, dict) or entry.keys() & {"conversations", "messages", "image"}:
        return
    for name, value in entry.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            raise UserError(
                f"{path} is one object with a list of {len(value)} records under {short_repr(name)}; {_EXPECTED}: "
                f"jq '.[{json.dumps(name)}]' {path} > records.json writes that list"
            )
    values = list(entry.values())
    if values and all(isinstance(value, dict) for value in values):
        raise UserError(
            f"{path} is one object of {len(values)} records by name; {_EXPECTED}: "
            f"jq '[.[]]' {path} > records.json writes a list"
        )


def _read_text(path: Path, flag: str) -> str:
    if not path.is_file():
        raise UserError(f"{flag} {path} does not exist or is not a file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read: {error.strerror or error}") from None
    if content.startswith(_UTF_16_32):
        raise UserError(
            f"{path} is not UTF-8 but UTF-16 or UTF-32: iconv -f UTF-16 -t UTF-8 {path} > records.json converts it"
        )
    head = content[:64].lstrip()
    for start, name in _OTHER_FORMATS.items():
        if head.startswith(start):
            raise UserError(f"{path} is {name}; {_EXPECTED}")
    zero = content.find(b"\0")
    if zero >= 0:
        line = content.count(b"\n", 0, zero) + 1
        raise UserError(f"{path} line {line} has a NUL byte (byte {zero}): the file is damaged; copy or write it again")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} line {line} is not UTF-8 (byte {error.start}: {error.reason}); convert the file first"
        ) from None


def _parse(text: str, path: Path, line: int = 1) -> Any:
    # Parse one JSON value that starts at a line of the file.
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at_end = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        truncated = "; it ends too early and may be truncated" if at_end else ""
        where = _place(text, error.pos, line)
        raise UserError(f"{path} {where} is not valid JSON: {error.msg}{truncated}") from None
    except RecursionError:
        where = _place(text, _too_deep(text), line)
        raise UserError(f"{path} {where} is nested too deeply; records have three levels") from None
    except ValueError:
        limit = sys.get_int_max_str_digits()
        where = _place(text, _too_long_number(text, limit), line)
        raise UserError(f"{path} {where} has a number of more than {limit} digits") from None


def _place(text: str, position: int, line: int) -> str:
    before = text[:position]
    return f"line {line + before.count(chr(10))} column {position - before.rfind(chr(10))}"


def _too_deep(text: str) -> int:
    depth = 0
    for match in re.finditer(rf"{_STRING}|[\[{{]|[\]}}]", text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth > _DEPTH:
            return match.start()
    return 0


def _too_long_number(text: str, limit: int) -> int:
    for match in re.finditer(rf"{_STRING}|\d{{{limit + 1},}}", text):
        if match[0][0] != '"':
            return match.start()
    return 0


def finite(value: Any) -> Any:
    """Return a JSON value with None for each NaN and infinity, which JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return value
