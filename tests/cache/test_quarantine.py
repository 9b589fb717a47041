"""quarantine.jsonl: what is written is read; damage is one line with its position."""

import pytest

from llava_twophase.cache.quarantine import Quarantined, read_quarantine, write_quarantine
from llava_twophase.errors import UserError

GOOD = '{"key": "a.jpg", "reason": "empty"}\n'


def test_read_quarantine_returns_what_was_written(tmp_path):
    entries = [Quarantined("a.jpg", "empty", 0, "e3b0"), Quarantined("ü.jpg", "cannot be read")]
    write_quarantine(tmp_path, entries)
    assert list(read_quarantine(tmp_path).values()) == entries
    write_quarantine(tmp_path, [])
    assert read_quarantine(tmp_path) == {} and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line",
    [
        '{"key": "b.jpg", "rea',
        "\0\0\0",
        "[1]",
        "null",
        "7",
        "[" * 100_000,
        '{"key": "b.jpg"}',
        '{"key": 5, "reason": "x"}',
        '{"key": [], "reason": "x"}',
        '{"key": "b.jpg", "reason": 5}',
        '{"key": "b.jpg", "reason": "x", "source_size": "7"}',
        '{"key": "b.jpg", "reason": "x", "source_sha256": 7}',
        '{"key": "b.jpg", "reason": "x", "source_size": ' + "1" * 5000 + "}",
        '{"key": "b.jpg", "reason": "x", "more": 1}',
    ],
    ids=lambda line: line[:50],
)
def test_read_quarantine_reports_damage_in_one_line(line, tmp_path):
    (tmp_path / "quarantine.jsonl").write_text(GOOD + line, encoding="utf-8")
    with pytest.raises(UserError, match=r"quarantine\.jsonl line 2 is damaged .*; delete the file to try") as caught:
        read_quarantine(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_read_quarantine_refuses_what_is_not_a_text_file(tmp_path):
    (tmp_path / "quarantine.jsonl").mkdir()
    with pytest.raises(UserError, match=r"quarantine\.jsonl cannot be read"):
        read_quarantine(tmp_path)
    (tmp_path / "quarantine.jsonl").rmdir()
    (tmp_path / "quarantine.jsonl").write_bytes(GOOD.encode("utf-16"))
    with pytest.raises(UserError, match=r"quarantine\.jsonl cannot be read"):
        read_quarantine(tmp_path)
