"""``coverage``: counts by hand, truncation compared with training's template, exit codes."""

import json

import pytest

from cache.make import SHAPE, fingerprint_of, make_cache, rows, write
from drawn import make_record, write_records
from inspection.command import inspect
from llava_twophase.cache.format import SHARDS
from llava_twophase.cache.quarantine import Quarantined, write_quarantine
from llava_twophase.cache.shard_writer import ShardSpec, ShardWriter, sha256
from llava_twophase.inspection.coverage import truncated
from llava_twophase.records import load_records


def coverage(cache, path, *flags, expect=0):
    result = inspect("coverage", cache, "--data_path", path, *flags, expect=expect)
    return json.loads(result.stdout) if "--json" in flags else result.stdout


@pytest.fixture
def cache(tmp_path):
    """Six images; the last two are duplicates, and the fourth has no record."""
    path, keys = tmp_path / "cache", [f"{letter}.jpg" for letter in "abcdef"]
    (path / SHARDS).mkdir(parents=True)
    writer = ShardWriter(
        path / SHARDS / "shard-000000.h5", keys, ShardSpec(SHAPE, "bfloat16", fingerprint_of("bfloat16"), {})
    )
    writer.append(rows(6), [(1, sha256(key.replace("f", "e").encode())) for key in keys])
    write(path, [writer.seal()])
    write_quarantine(path, [Quarantined("bad.jpg", "the file is empty")])
    return path


@pytest.fixture
def records(tmp_path):
    captions = {
        "a.jpg": "",
        "b.jpg": "one two three",
        "c.jpg": " ".join(["word"] * 7),
        "e.jpg": "x " * 150,
        "f.jpg": "x",
    }
    made = [make_record(key, key, caption) for key, caption in captions.items()]
    return write_records([*made, make_record("again", "b.jpg", "one two")], tmp_path / "records.json")


def test_coverage_counts_by_kind(cache, records):
    values = coverage(cache, records, "--json")
    expected = {
        "records": 6, "records_with_features": 6, "images": 5, "images_with_features": 5, "images_without_features": 0,
        "images_quarantined": 0, "features_unused": 1, "images_in_several_records": 1, "pictures_under_several_keys": 1,
        "keys_of_such_pictures": 2, "truncated": None,
    }  # fmt: skip
    assert {name: values[name] for name in expected} == expected
    assert values["examples"] == {
        "without_features": [], "quarantined": [], "unused": ["d.jpg"], "in_several_records": ["b.jpg (2 records)"],
        "under_several_keys": ["e.jpg = f.jpg"],
    }  # fmt: skip
    counts = values["caption_words"]
    assert (counts["0"], counts["1-5"], counts["6-10"], counts["over 100"]) == (1, 3, 1, 1)
    assert sum(counts.values()) == 6


def test_records_without_features_exit_with_1(cache, records, tmp_path):
    more = [*json.loads(records.read_text(encoding="utf-8"))]
    more += [make_record("x", "new.jpg", "a"), make_record("y", "bad.jpg", "b")]
    path = write_records(more, tmp_path / "more.json")
    values = coverage(cache, path, "--json", expect=1)
    assert (values["images_without_features"], values["images_quarantined"]) == (1, 1)
    assert values["examples"]["without_features"] == ["new.jpg"] and values["examples"]["quarantined"] == ["bad.jpg"]
    text = coverage(cache, path, expect=1)
    assert text.startswith(f"5 of 7 images of {path} have features\n") and "run the extraction command" in text


def test_quarantined_image_is_not_a_problem(cache, records, tmp_path):
    more = [*json.loads(records.read_text(encoding="utf-8")), make_record("y", "bad.jpg", "b")]
    words = coverage(cache, write_records(more, tmp_path / "more.json")).split()
    assert "images quarantined 1" in " ".join(words)


def test_truncated_counts_what_training_truncates(image_set, tiny_llama, tmp_path):
    from transformers import AutoTokenizer

    from llava_twophase.train.data.conversation import PlainTemplate
    from llava_twophase.train.data.tokenizer import load_caption_tokenizer

    records = load_records(image_set.json)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    captions = load_caption_tokenizer(str(tiny_llama), tokenizer)
    for room in (1, 5, 8, 12, 30, 400):
        template = PlainTemplate(captions, 16 + 1 + room, 16)
        unlimited = PlainTemplate(captions, 4096, 16)
        shortened = [record.image for record in records if template(record.caption) != unlimited(record.caption)]
        found = truncated(records, str(tiny_llama), 16 + 1 + room, 16)
        assert (found["captions"], found["room"], found["examples"]) == (len(shortened), room, shortened[:5])


def test_coverage_counts_truncated_captions(tmp_path, tiny_llama, image_set):
    keys = list(dict.fromkeys(record["image"] for record in image_set.records))
    cache, made, _ = make_cache(tmp_path / "cache", counts=(len(keys),))
    records = [make_record(key, key, "a red circle on a pale ground") for key in made]
    path = write_records(records, tmp_path / "records.jsonl")
    flags = ("--model_name_or_path", tiny_llama, "--model_max_length", "12")
    assert f"{len(keys):,} of more than 2 tokens (12 in all)" in coverage(cache, path, *flags)
    fewer = coverage(cache, path, *flags, "--image_tokens", "4")
    assert "of more than 7 tokens (12 in all)" in fewer


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_path", "no/such/model"], "no tokenizer could be loaded"),
        (["--model_name_or_path", "{llama}", "--model_max_length", "9"], "leaves no room for a caption"),
    ],
)
def test_tokenizer_or_room_that_is_missing_is_one_error(flags, message, cache, records, tiny_llama):
    flags = [flag.format(llama=tiny_llama) for flag in flags]
    result = inspect("coverage", cache, "--data_path", records, *flags, expect=1)
    assert result.stderr.startswith("error: ") and message in result.stderr and result.stdout == ""


def test_coverage_makes_absolute_image_paths_relative(tmp_path):
    path, keys, _ = make_cache(tmp_path / "cache")
    records = write_records([make_record(key, f"/data/{key}", "x") for key in keys], tmp_path / "records.json")
    assert coverage(path, records, "--image_folder", "/data", "--json")["images_with_features"] == len(keys)
