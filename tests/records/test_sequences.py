"""A selection of records behaves like the list of them."""

import hashlib
import pickle
import unicodedata

import numpy as np
import pytest

from llava_twophase.records import Record, records_of, sequences

CAPTIONS = ["a dog", "", "ein grüner ﷺ Streifen", "tab\tand\0nul", "緑の線 🟩 \u2003 x"]
RECORDS = [
    Record(
        f"{number % 7}/ü{number}.jpg" if number % 3 == 0 else f"{number}.jpg",
        CAPTIONS[number % 5],
        f"{number % 2} <image>",
    )
    for number in range(50)
]


@pytest.fixture(params=["all", "selected", "renamed"])
def pair(request, monkeypatch):
    """Records, and the list that they are equal to."""
    monkeypatch.setattr(sequences, "_CHUNK", 8)
    records, expected = records_of(RECORDS), list(RECORDS)
    if request.param == "all":
        return records, expected
    positions = [49, 3, 3, 0, *range(10, 30)]
    records, expected = records.select(np.array(positions)), [expected[position] for position in positions]
    if request.param == "renamed":
        records, expected = records[2:], expected[2:]
        records = records.rename({1: "new/ö.jpg"})
        expected[1] = Record("new/ö.jpg", expected[1].caption, expected[1].prompt)
    return records, expected


def test_records_equal_their_list(pair):
    records, expected = pair
    assert list(records) == expected == records and len(records) == len(expected)
    assert [records[position] for position in range(-3, 5)] == [expected[position] for position in range(-3, 5)]
    assert records[3:9:2] == expected[3:9:2] and records[:0] == []
    assert list(records.images) == [record.image for record in expected]
    assert records.images[1:4] == [record.image for record in expected[1:4]]
    assert records.images.not_ascii() == {at: r.image for at, r in enumerate(expected) if not r.image.isascii()}
    with pytest.raises(IndexError):
        records[len(records)]
    assert records != expected[:-1] and records != 7


def test_records_have_the_lengths_of_their_texts(pair):
    records, expected = pair
    words = [len(record.prompt.split()) + len(record.caption.split()) for record in expected]
    assert records.word_counts.tolist() == words
    forms = [(record.caption, unicodedata.normalize("NFKD", record.caption)) for record in expected]
    assert records.caption_bytes.tolist() == [max(len(form.encode()) for form in both) for both in forms]
    assert [caption.decode() for part in records.caption_chunks() for caption in part] == [r.caption for r in expected]


def test_records_digest_is_that_of_earlier_versions(pair):
    records, expected = pair
    digest = hashlib.sha256()
    for record in expected:
        caption = record.caption.replace("\0", "\0\0")
        digest.update(f"{record.image}\0{caption}\0".encode())
    assert records.digest() == digest.hexdigest()


def test_records_with_nul_in_captions_have_a_digest_of_their_own():
    texts = [
        [("a", "x\0b\0y"), ("c", "z")],
        [("a", "x"), ("b", "y\0c\0z")],
        [("a", "x\0\0"), ("b", "")],
        [("a", "x\0"), ("b", "\0")],
    ]
    found = [records_of(Record(image, caption, "<image>") for image, caption in pairs) for pairs in texts]
    assert len({records.digest() for records in found}) == len({r.images.identity() for r in found}) == len(texts)
    everything = [records.select(np.arange(len(records))) for records in found]
    assert [records.digest() for records in everything] == [records.digest() for records in found]


def test_records_without_some_images(pair):
    records, expected = pair
    dropped = {expected[1].image, expected[5].image, "absent.jpg", "\udc80.jpg"}
    assert records.without(dropped) == [record for record in expected if record.image not in dropped]
    assert records.without({"absent.jpg"}) is records


def test_records_of_memory_are_pickled(pair):
    records, expected = pair
    assert pickle.loads(pickle.dumps(records)) == expected


def test_image_keys_of_another_selection_have_another_identity(pair):
    records, _ = pair
    others = [records[1:], records.select(np.arange(len(records))[::-1]), records.rename({0: "x.jpg"})]
    found = {part.images.identity() for part in (records, *others)}
    assert len(found) == 4 and records.images.identity() in found
    assert pickle.loads(pickle.dumps(records)).images.identity() == records.images.identity()
