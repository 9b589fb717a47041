"""Read the values of a long JSON list one after another, without the list in memory.

An error has the message and the position that ``json.loads`` gives for the complete text.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_twophase.errors import UserError

_SPACE = re.compile(r"[ \t\n\r]*")
_COMMA = re.compile(r"[ \t\n\r]*,[ \t\n\r]*")
_END = re.compile(r"[ \t\n\r]*\]")
_STRING = r'"(?:[^"\\]|\\.)*"'
_DEPTH = 100
# An error nearer to the end of the text that was read may be due to its end: "tru", "1.", half an escape.
_MARGIN = 1024


class JsonList:
    """The values of a JSON list.

    Args:
        chunks: The text in parts, none of them empty.
        path: The file, for errors.

    Raises:
        UserError: The text is not a JSON list; the message has line and column. It is raised when the values before it
            have been returned.
    """

    def __init__(self, chunks: Iterator[str], path: Path) -> None:
        self._chunks, self._path = chunks, path
        self._text, self._ended = next(chunks, ""), False
        self._line, self._column = 1, 0  # of the text's first character, from 1 and from 0

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the values."""
        decode = json.JSONDecoder().raw_decode
        at = self._begin()
        separator, before = _SPACE, "["
        while True:
            text, limit = self._text, len(self._text) - _MARGIN
            match = separator.match(text, at)
            try:
                value, end = decode(text, match.end()) if match else (None, len(text))
            except (ValueError, RecursionError):
                end = len(text)
                match = None
            if match and (end < limit or self._ended):
                yield value
                at, separator, before = end, _COMMA, "[0"
            elif self._ended or self._is_over(at, before):
                return self._finish(at, before)
            else:
                self._read_on(at)
                at = 0

    def _begin(self) -> int:
        while not self._ended and not self._text.strip():
            self._read_on(0)
        start = _SPACE.match(self._text)
        assert start is not None
        if self._text[start.end() : start.end() + 1] != "[":
            parse(self._text, self._path)
        return start.end() + 1

    def _is_over(self, at: int, before: str) -> bool:
        """Return whether the list ends here, or has an error that is not due to the end of the text read so far."""
        if _END.match(self._text, at):
            return True
        try:
            json.loads(before + self._text[at:])
        except json.JSONDecodeError as error:
            position = error.pos - len(before) + at
            return position < len(self._text) - _MARGIN and not error.msg.startswith("Unterminated string")
        except (RecursionError, ValueError):
            return True
        return False

    def _finish(self, at: int, before: str) -> None:
        # The end of the list, or an error.
        while (end := _END.match(self._text, at)) and not self._ended and not self._text[end.end() :].strip():
            self._read_on(at)
            at = 0
        above = self._text[:at]
        line = self._line + above.count("\n")
        column = len(above) - above.rfind("\n") - 1 if "\n" in above else self._column + len(above)
        parse(before + self._text[at:], self._path, line, column - len(before))

    def _read_on(self, at: int) -> None:
        # Forget the text before a position, and read as much as is left, so that a long value is scanned a few times.
        above = self._text[:at]
        self._line += above.count("\n")
        self._column = len(above) - above.rfind("\n") - 1 if "\n" in above else self._column + len(above)
        parts = [self._text[at:]]
        wanted = 2 * len(parts[0]) + 1
        while sum(map(len, parts)) < wanted and not self._ended:
            more = next(self._chunks, None)
            self._ended = more is None
            parts.append(more or "")
        self._text = "".join(parts)


def parse(text: str, path: Path, line: int = 1, column: int = 0) -> Any:
    """Parse one JSON value.

    Args:
        text: The value.
        path: The file that it is from, for errors.
        line: The line of its first character, from 1.
        column: The characters before it in that line.

    Raises:
        UserError: It is not JSON; the message has line and column.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at_end = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        truncated = "; it ends too early and may be truncated" if at_end else ""
        where = _place(text, error.pos, line, column)
        raise UserError(f"{path} {where} is not valid JSON: {error.msg}{truncated}") from None
    except RecursionError:
        where = _place(text, _too_deep(text), line, column)
        raise UserError(f"{path} {where} is nested too deeply; records have three levels") from None
    except ValueError:
        limit = sys.get_int_max_str_digits()
        where = _place(text, _too_long_number(text, limit), line, column)
        raise UserError(f"{path} {where} has a number of more than {limit} digits") from None


def _place(text: str, position: int, line: int, column: int) -> str:
    before = text[:position]
    newline = before.rfind("\n")
    number = position + 1 + column if newline < 0 else position - newline
    return f"line {line + before.count(chr(10))} column {number}"


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
