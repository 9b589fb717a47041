"""A JSON list read in parts: the values and the errors of ``json.loads`` for the complete text."""

import json
import random

import pytest

from llava_twophase import json_list
from llava_twophase.errors import UserError
from llava_twophase.json_list import JsonList, parse

VALUES = [
    {"id": "7", "image": "a.jpg", "conversations": [{"value": 'a "b" ] , { \\ \u00fc\ud83d\ude00\n'}, {"value": "]["}]},
    *([], {}, "", "x" * 70, -12.5e-7, 0, 123456789, True, False, None, [[1], [2, [3]]]),
]


def outcome(read):
    try:
        return read()
    except UserError as error:
        return str(error)


def parts_of(text, draw):
    at = 0
    while at < len(text):
        size = draw.randint(1, 40)
        yield text[at : at + size]
        at += size


def damaged(text, draw):
    at = draw.randrange(len(text) + 1)
    change = draw.choice(["", ",", "]", "[", "}", '"', "\\", "x", " ", "\x01", ":", "1", "\n"])
    return draw.choice([text[:at], text[:at] + change + text[at + draw.randint(0, 2) :]])


@pytest.mark.parametrize("seed", range(6))
def test_json_list_equals_json_loads_for_intact_and_damaged_lists(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(json_list, "_MARGIN", 16)
    draw = random.Random(seed)
    kinds = set()
    for _ in range(300):
        values = draw.choices(VALUES, k=draw.randint(0, 6))
        text = json.dumps(values, indent=draw.choice([None, 1]), ensure_ascii=draw.random() < 0.5)
        text = draw.choice(["", "\n ", " " * 50]) + text + draw.choice(["", "\n", "\n" * 60])
        for content in (text, damaged(text, draw)):
            expected = outcome(lambda content=content: parse(content, tmp_path))
            if isinstance(expected, (list, str)) and content.strip(" \n\t\r").startswith("["):
                found = outcome(lambda content=content: list(JsonList(parts_of(content, draw), tmp_path)))
                assert found == expected, content
                kinds.add(type(found))
    assert kinds == {list, str}


def test_json_list_holds_only_a_part_of_the_text(tmp_path):
    held = []

    def parts():
        yield "["
        for number in range(1000):
            held.append(len(reader._text))
            yield json.dumps(["x" * 5000, number]) + ", "
        yield "0]"

    reader = JsonList(parts(), tmp_path)
    assert [value[1] for value in list(reader)[:-1]] == list(range(1000))
    assert max(held) < 20_000


def test_json_list_scans_a_long_value_a_few_times(tmp_path, monkeypatch):
    scans = []
    decode = json.JSONDecoder.raw_decode
    monkeypatch.setattr(json.JSONDecoder, "raw_decode", lambda *args, **also: scans.append(1) or decode(*args, **also))
    text = json.dumps([["x" * 1000] * 2000])
    parts = (text[at : at + 1000] for at in range(0, len(text), 1000))
    assert list(JsonList(parts, tmp_path)) == json.loads(text)
    assert len(scans) < 30 + 2  # and not 2,000
