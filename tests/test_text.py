"""Texts for people."""

import pytest

from llava_twophase.text import agree, counted, did_you_mean, format_bytes, printable


@pytest.mark.parametrize(("count", "text"), [(0, "0 shards"), (1, "1 shard"), (2, "2 shards"), (2528, "2,528 shards")])
def test_counted_has_the_plural_and_thousands_separators(count, text):
    assert counted(count, "shard") == text


def test_agree_is_singular_for_one_only():
    assert [f"{counted(count, 'file')} {agree(count, 'is', 'are')} missing" for count in (0, 1, 2)] == [
        "0 files are missing",
        "1 file is missing",
        "2 files are missing",
    ]


def test_did_you_mean_is_none_without_a_similar_word():
    assert did_you_mean("perciever", ["linear", "perceiver"]) == "did you mean perceiver?"
    assert did_you_mean("zzz", ["linear", "perceiver"]) is None


def test_format_bytes_takes_the_largest_decimal_unit():
    assert [format_bytes(count) for count in (999, 1000, 1.5e9)] == ["999 bytes", "1.000 kB", "1.500 GB"]


def test_printable_escapes_control_characters():
    assert printable("a\x1b[0m\n\u202eb \u00e9") == "a\\x1b[0m\\n\\u202eb \u00e9"
