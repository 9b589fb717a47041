"""JSON and JSON Lines: every form that is read, and one line with the position for everything else."""

import gzip
import json
import os
import re

import pytest

import drawn
from helpers import run
from llava_twophase.errors import UserError
from llava_twophase.json_file import read_json_records

RECORD = drawn.make_record("7", "a/b.jpg", "ein grüner Streifen — 緑の線 🟩")
LINE = json.dumps(RECORD, ensure_ascii=False)


def write(path, content, encoding="utf-8"):
    path.write_text(content, encoding=encoding)
    return path


def read(path):
    return list(read_json_records(path, "--data_path"))


def refusal(path, content):
    """The message with which a content is refused; one line."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message.replace(str(path), "FILE")


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_byte_order_mark_is_accepted(tmp_path, suffix, encoding):
    text = f"[{LINE}]" if suffix == "json" else LINE
    assert read(write(tmp_path / f"r.{suffix}", text, encoding)) == [RECORD]


def test_byte_order_mark_of_a_joined_file_is_accepted(tmp_path):
    assert read(write(tmp_path / "r.jsonl", f"{LINE}\n\ufeff{LINE}\n", "utf-8-sig")) == [RECORD, RECORD]


@pytest.mark.parametrize("end", ["\ufeff", "\ufeff\n", "\ufeff \r\n\ufeff"])
def test_line_that_is_only_a_byte_order_mark_is_skipped(tmp_path, end):
    assert read(write(tmp_path / "r.jsonl", f"{LINE}\n{end}")) == [RECORD]


def test_form_is_recognised_by_content(tmp_path):
    assert read(write(tmp_path / "lines.json", f"{LINE}\n\n{LINE}\n")) == [RECORD, RECORD]
    assert read(write(tmp_path / "list.jsonl", f"\n [{LINE}]")) == [RECORD]
    assert read(write(tmp_path / "one.json", LINE)) == [RECORD]
    assert read(write(tmp_path / "pretty.json", json.dumps([RECORD], indent=2))) == [RECORD]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_only_a_newline_ends_a_json_line(tmp_path, separator):
    line = json.dumps({"caption": f"one{separator}two"}, ensure_ascii=False)
    assert read(write(tmp_path / "r.jsonl", f"{line}\r\n{line}\n")) == [{"caption": f"one{separator}two"}] * 2


def test_utf8_is_read_in_any_locale(tmp_path):
    path = write(tmp_path / "r.json", f"[{LINE}]")
    code = f"""
from pathlib import Path
from llava_twophase.json_file import read_json_records
print(ascii(list(read_json_records(Path({str(path)!r}), ""))))
"""
    done = run(["python", "-c", code], LC_ALL="C", LANG="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.stdout.strip() == ascii([RECORD])


@pytest.mark.parametrize("content", ["[]", "", "\n\n"])
def test_empty_file_has_no_records(tmp_path, content):
    assert read(write(tmp_path / "r.json", content)) == []


DAMAGED = {
    "list truncated": (f"[{LINE},", "FILE line 1 column {end} is not valid JSON: .*; it ends too early and may be"),
    "list over lines truncated": (f"[\n{LINE},\n", r"FILE line 3 column 1 is not valid JSON: .*may be truncated"),
    "line truncated": (f"{LINE}\n{LINE[:-9]}\n", r"FILE line 2 column \d+ is not valid JSON: .*may be truncated"),
    "only a brace": ("{", r"FILE line 1 column 2 is not valid JSON: .*may be truncated"),
    "list with garbage": (f"[\n{LINE},\n x]", r"FILE line 3 column 2 is not valid JSON: Expecting value$"),
    "line with garbage": (f"{LINE}\nx\n", r"FILE line 2 column 1 is not valid JSON: Expecting value$"),
    "pretty object damaged": ('{\n "a": 1\n "b": 2\n}', r"FILE line 3 column 2 is not valid JSON: Expecting ',' del"),
    "long number": ('[\n {"id": ' + "1" * 5000 + "}]", r"FILE line 2 column 9 has a number of more than 4300 digits"),
    "long number in a line": (
        LINE + '\n{"a": "' + "2" * 5000 + '", "id": ' + "1" * 5000 + "}",
        r"FILE line 2 column 5017 has a number of more than 4300 digits",
    ),
    "deep lists": ("[" * 100_000, r"FILE line 1 column 101 is nested too deeply"),
    "deep objects": (LINE + "\n" + '{"a":' * 100_000, r"FILE line 2 column 501 is nested too deeply"),
    "NUL in a line": (f"{LINE}\n\0{LINE}", r"FILE line 2 has a NUL byte \(byte \d+\): the file is damaged"),
    "only NUL": (b"\0" * 5000, r"FILE line 1 has a NUL byte \(byte 0\)"),
    "control character": ('[{"id": "a\x01b"}]', r"FILE line 1 column 11 is not valid JSON: Invalid control character"),
    "UTF-16": (f"[{LINE}]".encode("utf-16"), r"FILE is not UTF-8 but UTF-16 or UTF-32: iconv"),
    "UTF-16 big endian": (b"\xfe\xff" + LINE.encode("utf-16-be"), r"FILE is not UTF-8 but UTF-16"),
    "UTF-32": (LINE.encode("utf-32"), r"FILE is not UTF-8 but UTF-16 or UTF-32"),
    "Latin-1": (f"{LINE}\n".encode() + '{"a": "é"}'.encode("latin-1"), r"FILE line 2 is not UTF-8 \(byte \d+: "),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_file_is_reported_with_its_position(tmp_path, kind):
    content, expected = DAMAGED[kind]
    found = refusal(tmp_path / "r.json", content)
    assert re.match(expected.replace("{end}", r"\d+"), found), found


OTHER = {
    "records under a name": (json.dumps({"version": 1, "data": [RECORD, RECORD]}), "a list of 2 records under 'data'"),
    "the same over lines": (json.dumps({"data": [RECORD]}, indent=1), "jq '.[\"data\"]' FILE > records.json"),
    "records by name": (json.dumps({"a": RECORD, "b": RECORD}), "is one object of 2 records by name"),
    "one record over lines": (json.dumps(RECORD, indent=1), "has one object written over several lines"),
    "records over lines": (json.dumps(RECORD, indent=1) * 2, "jq -c . FILE > records.jsonl writes one per line"),
    "CSV": ("image,caption\na.jpg,a dog\n", "is not JSON: it starts with 'image,caption'; it may be CSV"),
    "TSV": ("a dog\thttp://x/a.jpg\n", "it may be CSV or TSV"),
    "text": ("hello", "is not JSON: it starts with 'hello'; expected"),
    "a number": ("7", "is not JSON: it starts with '7'"),
    "Parquet": (b"PAR1\x15\x04\xff", "is a Parquet file"),
    "gzip": (gzip.compress(LINE.encode()), "is compressed with gzip"),
    "zip": (b"PK\x03\x04\x14\0\0", "is a zip archive"),
    "HTML": ("\n<!DOCTYPE html><html></html>", "is an HTML or XML page"),
    "Git LFS": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git LFS pointer"),
}


@pytest.mark.parametrize("kind", OTHER)
def test_another_layout_is_reported_as_what_it_is(tmp_path, kind):
    content, expected = OTHER[kind]
    found = refusal(tmp_path / "r.json", content)
    assert expected in found and "expected a JSON list of records, or JSON Lines" in found


def test_missing_file_is_refused(tmp_path):
    for path in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(UserError, match=rf"--data_path {path} does not exist or is not a file"):
            read(path)


def test_unreadable_file_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "r.json", LINE)

    def fail(*_, **__):
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(type(path), "open", fail)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        read(path)
