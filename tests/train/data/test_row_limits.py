"""The longest row and ids without an embedding, found without tokenizing all captions."""

import random

import pytest
from transformers import AutoTokenizer

from llava_twophase import records
from llava_twophase.records import Record
from llava_twophase.train.data import row_limits
from llava_twophase.train.data.conversation import PlainTemplate
from llava_twophase.train.data.row_limits import IdOutOfRange, RowLengths, find_id_out_of_range, measure_rows
from llava_twophase.train.data.tokenizer import load_caption_tokenizer

WORDS = ["a", "red", "circle", "blue", "square", "緑", "🟩", "ﷺ", "left of", "</s>", "of", "x" * 30]


def records_of(captions):
    """In two parts, as records to train on and to evaluate on are."""
    found = records.records_of(Record(f"{number}.jpg", caption, "<image>") for number, caption in enumerate(captions))
    return found[:1], found[1:]


@pytest.fixture
def template_of(tiny_llama):
    """Makes a template of this length; `count` of its captions tokenized so far."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens(["<extra>", "<other>"])
    captions = load_caption_tokenizer(str(tiny_llama), tokenizer)
    return lambda model_max_length=2048: PlainTemplate(captions, model_max_length, 16)


@pytest.mark.parametrize("max_length", [40, 2048])
@pytest.mark.parametrize("seed", range(5))
def test_measure_rows_equals_tokenizing_everything(template_of, seed, max_length):
    draw = random.Random(seed)
    captions = [" ".join(draw.choices(WORDS, k=draw.randint(0, 30))) for _ in range(200)]
    template = template_of(max_length)
    found = measure_rows(records_of(captions), template)
    lengths = [len(template(caption)[0]) for caption in captions]
    assert found.longest == max(lengths) == lengths[found.record] and found.exact
    assert found.truncated == sum(template.truncates(caption) for caption in captions)
    assert (found.truncated > 0) is (max_length == 40)


def test_measure_rows_tokenizes_only_captions_that_may_be_the_longest(template_of, monkeypatch):
    template, tokenized = template_of(), []
    count = PlainTemplate.count_ids
    monkeypatch.setattr(PlainTemplate, "count_ids", lambda self, text: tokenized.append(text) or count(self, text))
    captions = [*["a red circle"] * 1000, "x y z " * 50, *["a blue square"] * 1000]
    assert measure_rows(records_of(captions), template).record == 1000
    assert tokenized == ["x y z " * 50]


def test_measure_rows_stops_after_enough_captions(template_of, monkeypatch):
    monkeypatch.setattr(row_limits, "_MOST_TOKENIZED", 3)
    captions = ["red " * 20, *["circle " * 12] * 50]
    found = measure_rows(records_of(captions), template_of())
    assert not found.exact and found.record == 1  # the longest in bytes
    # Truncated rows are counted, however many they are.
    assert measure_rows(records_of(captions), template_of(22)).truncated == 51


def test_measure_rows_of_empty_captions(template_of):
    template = template_of()
    assert measure_rows(records_of(["", ""]), template) == RowLengths(len(template("")[0]), 0, True, 0)


@pytest.mark.parametrize("hidden", [0, 1])
def test_find_id_out_of_range_reports_record_and_token(template_of, tiny_llama, hidden):
    template = template_of()
    embeddings = len(AutoTokenizer.from_pretrained(tiny_llama)) + hidden
    captions = ["a red circle", "a <other> circle", "an <extra>"]
    found = find_id_out_of_range(records_of(captions), template, embeddings)
    assert found == IdOutOfRange(1, "<other>", template.tokenizer.vocabulary["<other>"])
    assert find_id_out_of_range(records_of(captions[:1]), template, embeddings) is None
    assert find_id_out_of_range(records_of(captions), template, embeddings + 2) is None


def test_find_id_out_of_range_with_ordinary_tokens_outside(template_of):
    template = template_of()
    captions = ["", "a red circle"]
    largest = [max(template(caption)[0]) for caption in captions]
    assert largest[0] < largest[1]
    found = find_id_out_of_range(records_of(captions), template, largest[0] + 1)
    assert found is not None and found.record == 1 and found.id > largest[0]
    assert find_id_out_of_range(records_of(captions), template, largest[1] + 1) is None
