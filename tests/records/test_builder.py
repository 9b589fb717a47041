"""Entries that are checked together give what each gives on its own."""

import io
import random

import pytest

import drawn
from llava_twophase.errors import UserError
from llava_twophase.records import builder
from llava_twophase.records.builder import ColumnBuilder
from llava_twophase.records.columns import DTYPES
from llava_twophase.records.record import id_in_words, to_record

KEYS = [
    "a.jpg",
    "00001/b c.jpg",
    "ü/雪.png",
    "./a.jpg",
    "a//b.jpg",
    ".hidden/a.jpg",
    "..a/b.jpg",
    "a/../b.jpg",
    " a.jpg",
]
BAD_KEYS = ["", " ", "..", "../a", "/a.jpg", "a\0.jpg", "\ud800", None, 7, ["a", "b"]]
CAPTIONS = [
    "",
    "a dog",
    "ein grüner ﷺ",
    "nul \0 inside",
    "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
]
BAD_CAPTIONS = ["an <image>", "\ud800", None, 3, ["x"]]


def entry(draw, bad):
    key = draw.choice(BAD_KEYS if bad == "key" else KEYS)
    caption = draw.choice(BAD_CAPTIONS if bad == "caption" else CAPTIONS)
    prompt = draw.choice(["", "no token", None, {}] if bad == "prompt" else ["<image>", "What?\n<image>"])
    made = drawn.make_record("7", key, caption)
    made["conversations"][0]["value"] = prompt
    if bad == "turns":
        made["conversations"] = draw.choice([None, "ab", {"a": 1, "b": 2}, made["conversations"][:1], [1, 2]])
    return draw.choice([None, [1], "text", {}]) if bad == "entry" else made


def build(entries):
    files = {name: io.BytesIO() for name in DTYPES}
    made = ColumnBuilder(files)
    made.add_entries(entries)
    return made.finish(), {name: file.getvalue() for name, file in files.items()}


@pytest.mark.parametrize("bad", [None, "key", "caption", "prompt", "turns", "entry"])
def test_column_builder_checks_entries_together_as_one_by_one(monkeypatch, bad):
    draw = random.Random(bad)
    monkeypatch.setattr(builder, "_BATCH", 16)
    for _ in range(20):
        entries = [entry(draw, bad if draw.random() < 0.05 else None) for _ in range(40)]
        together = build(entries)
        with monkeypatch.context() as patch:
            patch.setattr(builder, "_check_together", lambda batch: None)
            assert build(entries) == together
        problems = []
        for position, raw in enumerate(entries):
            try:
                to_record(raw)
            except UserError as error:
                problems.append(f"record {position}{id_in_words(raw)}: {error}")
        assert together[0].problems == problems and together[0].bad == len(problems)
        assert together[0].records == len(entries) - len(problems)


def test_column_builder_checks_ordinary_entries_together(monkeypatch):
    monkeypatch.setattr(builder, "to_record", None)
    built, _ = build([drawn.make_record("7", f"{number}.jpg", "a dog") for number in range(20)])
    assert built.records == 20


def test_column_builder_stores_a_prompt_once(monkeypatch):
    monkeypatch.setattr(builder, "_KNOWN_PROMPTS", 2)
    prompts = ["a <image>", "b <image>", "a <image>", "c <image>", "c <image>"]
    entries = [drawn.make_record("7", "a.jpg", "x") for _ in prompts]
    for made, prompt in zip(entries, prompts, strict=True):
        made["conversations"][0]["value"] = prompt
    built, files = build(entries)
    assert built.records == 5 and files["prompt_text"] == b"a <image>b <image>c <image>"
