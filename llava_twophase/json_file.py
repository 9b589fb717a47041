"""Read a data file that is a JSON list or JSON Lines, with errors by file, line and column; prepare values for JSON.

The form of a data file is recognised by content, not by its name.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from llava_twophase.errors import UserError, short_repr
from llava_twophase.json_list import JsonList, parse

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
_CHUNK = 1 << 22


def read_json_records(path: Path, flag: str) -> Iterator[Any]:
    """Read the entries of a JSON list, or the lines of JSON Lines.

    Args:
        path: The file, in UTF-8 with or without a byte order mark.
        flag: The command-line flag that gave it.

    Raises:
        UserError: The file cannot be read, or is something else; the message says what was found.
    """
    if not path.is_file():
        raise UserError(f"{flag} {path} does not exist or is not a file")
    try:
        _require_text(path)
        yield from _read_entries(path)
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read: {error.strerror or error}") from None


def _read_entries(path: Path) -> Iterator[Any]:
    text = next((chunk for chunk in _read_chunks(path) if chunk.strip()), "")
    start = text.lstrip()[:1]
    if start == "[":
        yield from JsonList(_read_chunks(path), path)
    elif start in ("{", ""):
        yield from _read_lines(path)
    else:
        first = text.lstrip().partition("\n")[0].rstrip()
        guess = "; it may be CSV or TSV" if re.search(r"\w[,;\t]\w", first) else ""
        raise UserError(f"{path} is not JSON: it starts with {short_repr(first)}{guess}; {_EXPECTED}")


def _read_lines(path: Path) -> Iterator[Any]:
    lines = _numbered_lines(path)
    number, line = next(lines, (0, ""))
    if not number:
        return
    entry = None
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        text = path.read_bytes().decode("utf-8-sig")
        _refuse_objects_over_lines(text, path, line)
    following = next(lines, None)
    if following is None:
        _refuse_wrapped_records(entry, path)
    yield parse(line, path, number)
    decode = json.JSONDecoder().raw_decode
    for number, line in chain([] if following is None else [following], lines):
        try:
            value, end = decode(line)
        except (ValueError, RecursionError):
            end = -1
        yield value if end == len(line) else parse(line, path, number)


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    # Lines that are not blank. Only "\n" ends a line: text files in Python also end them at "\r".
    with path.open("rb", buffering=_CHUNK) as file:
        for number, content in enumerate(file, 1):
            line = content.removesuffix(b"\n").decode("utf-8-sig" if number == 1 else "utf-8")
            line = line.removeprefix("\ufeff")  # files that were joined have a byte order mark in the middle
            if line.strip():
                yield number, line


def _refuse_objects_over_lines(text: str, path: Path, first: str) -> None:
    # The first line is not a JSON value of its own.
    try:
        entry, end = json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError):
        if first.strip() == "{":
            parse(text, path)
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


def _require_text(path: Path) -> None:
    """Check that a file is UTF-8 without NUL bytes."""
    with path.open("rb") as file:
        content = file.read(64)
        if content.startswith(_UTF_16_32):
            raise UserError(
                f"{path} is not UTF-8 but UTF-16 or UTF-32: iconv -f UTF-16 -t UTF-8 {path} > records.json converts it"
            )
        head = content.lstrip()
        for start, name in _OTHER_FORMATS.items():
            if head.startswith(start):
                raise UserError(f"{path} is {name}; {_EXPECTED}")
        file.seek(0)
        _require_utf8(iter(lambda: file.read(_CHUNK), b""), path)


def _require_utf8(chunks: Iterator[bytes], path: Path) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    problem, read, line = "", 0, 1
    for chunk in chain(chunks, [b""]):
        zero = chunk.find(b"\0")
        if zero >= 0:
            line += chunk.count(b"\n", 0, zero)
            raise UserError(
                f"{path} line {line} has a NUL byte (byte {read + zero}): the file is damaged; copy or write it again"
            )
        pending, _ = decoder.getstate()
        if not problem and (pending or not chunk.isascii() or not chunk):
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                at = line + (pending + chunk).count(b"\n", 0, error.start)
                place = read - len(pending) + error.start
                problem = f"{path} line {at} is not UTF-8 (byte {place}: {error.reason}); convert the file first"
        read += len(chunk)
        line += chunk.count(b"\n")
    if problem:
        raise UserError(problem)


def _read_chunks(path: Path) -> Iterator[str]:
    # The text in parts. Newlines are not translated, because positions are those of the file.
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with path.open("rb") as file:
        while content := file.read(_CHUNK):
            if text := decoder.decode(content):
                yield text


def finite(value: Any) -> Any:
    """Return a JSON value with None for each NaN and infinity, which JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return value
