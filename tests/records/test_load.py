"""Records: what is read, what is refused, and that all problems are reported together."""

import json

import pytest

import drawn
from llava_twophase.errors import UserError
from llava_twophase.records import image_keys, load_records

CAPTION = "ein grüner Streifen — 緑の線 🟩"


def write(path, content, encoding="utf-8"):
    path.write_text(content, encoding=encoding)
    return path


def good(**changes):
    return {**drawn.make_record("7", "a/b.jpg", CAPTION), **changes}


def test_load_records_reads_json_and_jsonl_alike(image_set):
    records = load_records(image_set.json)
    assert records == load_records(image_set.jsonl)
    assert [(record.image, record.caption) for record in records] == list(
        zip([record["image"] for record in image_set.records], image_set.captions, strict=True)
    )


def test_image_keys_lists_an_image_of_two_records_once(image_set):
    records = load_records(image_set.json)
    assert len(records) == len(image_keys(records)) + 1
    assert image_keys(records) == image_set.keys


BAD = {
    "no object": (["text"], "is list, expected an object"),
    "null": (None, "is NoneType"),
    "no image": ({"conversations": good()["conversations"]}, "has no image"),
    "only other keys": ({"url": "x", "caption": "y"}, "has no image (its keys are ['caption', 'url'])"),
    "two images": (good(image=["a.jpg", "b.jpg"]), "has 2 images; stage 1 trains on one image per record"),
    "images": (good(image=None, images=["a.jpg"]), "has images (['a.jpg']), expected image with the path"),
    "an empty list": (good(image=[]), "has no image"),
    "a list of a number": (good(image=[7]), "has no image path: image is 7"),
    "image is null": (good(image=None), "has no image"),
    "image is NaN": (good(image=float("nan")), "has no image path: image is nan"),
    "no turns": (good(conversations=None), "no list of turns"),
    "one turn": (good(conversations=good()["conversations"][:1]), "has 1 turn in"),
    "four turns": (good(conversations=good()["conversations"] * 2), "has 4 turns"),
    "a turn without text": (good(conversations=[{"from": "human"}, {"from": "gpt", "value": "x"}]), "has no text"),
    "a turn that is text": (good(conversations=["<image>", "x"]), "has no text"),
    "no image token": (good(conversations=[{"value": "hello"}, {"value": "x"}]), "no <image>"),
    "image token in the caption": (good(conversations=[{"value": "<image>"}, {"value": "x <image>"}]), "caption holds"),
    "absolute path": (good(image="/etc/passwd.jpg"), "is absolute: give --image_folder"),
    "path that leaves": (good(image="../secret.jpg"), "must stay inside"),
    "path that leaves later": (good(image="a/../../secret.jpg"), "must stay inside"),
    "the folder itself": (good(image="."), "must stay inside"),
    "empty path": (good(image=""), "is empty"),
    "blank path": (good(image="  "), "is empty"),
    "NUL in the path": (good(image="a\0.jpg"), "NUL"),
    "lone surrogate": (good(image="\ud800.jpg"), "not valid Unicode"),
}


@pytest.mark.parametrize("kind", BAD)
def test_load_records_refuses_a_bad_record(tmp_path, kind):
    raw, message = BAD[kind]
    path = write(tmp_path / "r.json", json.dumps([good(), raw]))
    with pytest.raises(UserError, match="record 1") as caught:
        load_records(path)
    assert message in str(caught.value)


def test_load_records_reports_all_bad_records_by_position_and_id(tmp_path):
    raws = [raw for raw, _ in BAD.values()]
    with pytest.raises(UserError) as caught:
        load_records(write(tmp_path / "r.json", json.dumps([good(), *raws])))
    text = str(caught.value)
    assert f"{len(raws)} bad records" in text
    assert all(f"record {position}" in text for position in range(1, 1 + min(20, len(raws))))
    assert "(id '7')" in text


def test_load_records_counts_problems_that_it_does_not_list(tmp_path):
    with pytest.raises(UserError, match="100 bad records") as caught:
        load_records(write(tmp_path / "r.json", json.dumps([{"id": i} for i in range(100)])))
    assert str(caught.value).endswith("... and 80 more")


@pytest.mark.parametrize("content", ["[]", "", "\n\n"])
def test_load_records_refuses_an_empty_file(tmp_path, content):
    with pytest.raises(UserError, match="has no records"):
        load_records(write(tmp_path / "r.json", content))


def test_load_records_reads_a_list_of_one_image(tmp_path):
    path = write(tmp_path / "r.json", json.dumps([good(image=["a.jpg"])]))
    assert [record.image for record in load_records(path)] == ["a.jpg"]


def test_load_records_accepts_nan_in_other_fields(tmp_path):
    path = write(tmp_path / "r.json", json.dumps([good(score=float("nan"))]))
    assert len(load_records(path)) == 1


def test_load_records_reports_chat_data_once(tmp_path):
    chat = {"messages": [{"role": "user", "content": "<image>x"}], "images": ["a.jpg"]}
    with pytest.raises(UserError, match=r"records with \['images', 'messages'\], the layout of chat data") as caught:
        load_records(write(tmp_path / "r.json", json.dumps([chat, chat])))
    assert "\n" not in str(caught.value)


def test_load_records_keeps_messages_short(tmp_path):
    path = write(tmp_path / "r.json", json.dumps([good(id="x" * 10_000, conversations=["y" * 10_000, {}])]))
    with pytest.raises(UserError) as caught:
        load_records(path)
    assert len(str(caught.value)) < 500


def test_load_records_gives_one_key_to_both_spellings_of_an_image(tmp_path):
    raws = [good(image="a.jpg"), good(image=str(tmp_path / "a.jpg"))]
    records = load_records(write(tmp_path / "r.json", json.dumps(raws)), image_folder=tmp_path)
    assert image_keys(records) == ["a.jpg"]
