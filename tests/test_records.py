"""Records: what is read, what is refused, and that all that is wrong is said at once."""

import json

import pytest

import drawn
from helpers import run
from llava_twophase.errors import UserError
from llava_twophase.records import image_keys, load_records, normalize_key

CAPTION = "ein grüner Streifen — 緑の線 🟩"


def write(path, content, encoding="utf-8"):
    path.write_text(content, encoding=encoding)
    return path


def good(**changes):
    return {**drawn.make_record("7", "a/b.jpg", CAPTION), **changes}


def test_json_and_jsonl_give_the_same_records(image_set):
    records = load_records(image_set.json)
    assert records == load_records(image_set.jsonl)
    assert [(record.image, record.caption) for record in records] == list(
        zip([record["image"] for record in image_set.records], image_set.captions, strict=True)
    )


def test_an_image_with_two_records_is_one_key(image_set):
    records = load_records(image_set.json)
    assert len(records) == len(image_keys(records)) + 1
    assert image_keys(records) == image_set.keys


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_byte_order_mark(tmp_path, suffix, encoding):
    text = json.dumps([good()] if suffix == "json" else good(), ensure_ascii=False)
    assert load_records(write(tmp_path / f"r.{suffix}", text, encoding))[0].caption == CAPTION


def test_the_form_is_told_by_content_not_by_name(tmp_path):
    assert len(load_records(write(tmp_path / "lines.json", f"{json.dumps(good())}\n\n{json.dumps(good())}\n"))) == 2
    assert len(load_records(write(tmp_path / "list.jsonl", f"\n {json.dumps([good()])}"))) == 1


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_only_a_newline_ends_a_json_line(tmp_path, separator):
    caption = f"one{separator}two"
    line = json.dumps(good(conversations=drawn.make_record("", "", caption)["conversations"]), ensure_ascii=False)
    path = write(tmp_path / "r.jsonl", f"{line}\r\n{line}\n")
    assert [record.caption for record in load_records(path)] == [caption, caption]


def test_utf8_whatever_the_locale(image_set):
    code = f"""
from llava_twophase.records import load_records
print(ascii([r.caption for r in load_records({str(image_set.json)!r})]))
"""
    done = run(["python", "-c", code], LC_ALL="C", LANG="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.stdout.strip() == ascii(image_set.captions)


BAD = {
    "no object": (["text"], "is list, expected an object"),
    "null": (None, "is NoneType"),
    "no image": ({"conversations": good()["conversations"]}, "has no image"),
    "image is a list": (good(image=["a.jpg", "b.jpg"]), "has no image"),
    "image is null": (good(image=None), "has no image"),
    "no turns": (good(conversations=None), "no list of turns"),
    "one turn": (good(conversations=good()["conversations"][:1]), "has 1 turns"),
    "four turns": (good(conversations=good()["conversations"] * 2), "has 4 turns"),
    "a turn without text": (good(conversations=[{"from": "human"}, {"from": "gpt", "value": "x"}]), "has no text"),
    "a turn that is text": (good(conversations=["<image>", "x"]), "has no text"),
    "no image token": (good(conversations=[{"value": "hello"}, {"value": "x"}]), "no <image>"),
    "image token in the caption": (good(conversations=[{"value": "<image>"}, {"value": "x <image>"}]), "caption holds"),
    "absolute path": (good(image="/etc/passwd.jpg"), "must stay inside"),
    "path that leaves": (good(image="../secret.jpg"), "must stay inside"),
    "path that leaves later": (good(image="a/../../secret.jpg"), "must stay inside"),
    "the folder itself": (good(image="."), "must stay inside"),
    "empty path": (good(image=""), "is empty"),
    "blank path": (good(image="  "), "is empty"),
    "NUL in the path": (good(image="a\0.jpg"), "NUL"),
    "lone surrogate": (good(image="\ud800.jpg"), "not valid Unicode"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_record(tmp_path, kind):
    raw, message = BAD[kind]
    path = write(tmp_path / "r.json", json.dumps([good(), raw]))
    with pytest.raises(UserError, match="record 1") as caught:
        load_records(path)
    assert message in str(caught.value)


def test_all_bad_records_are_reported_together_by_position_and_id(tmp_path):
    raws = [raw for raw, _ in BAD.values()]
    with pytest.raises(UserError) as caught:
        load_records(write(tmp_path / "r.json", json.dumps([good(), *raws])))
    text = str(caught.value)
    assert f"{len(raws)} bad records" in text
    assert all(f"record {position}" in text for position in range(1, 1 + min(20, len(raws))))
    assert "(id '7')" in text


def test_more_than_a_screenful_is_counted(tmp_path):
    with pytest.raises(UserError, match="100 bad records") as caught:
        load_records(write(tmp_path / "r.json", json.dumps([{"id": i} for i in range(100)])))
    assert str(caught.value).endswith("... and 80 more")


@pytest.mark.parametrize("content", ["[]", "", "\n\n"])
def test_no_records(tmp_path, content):
    with pytest.raises(UserError, match="holds no records"):
        load_records(write(tmp_path / "r.json", content))


def test_not_json(tmp_path):
    with pytest.raises(UserError, match="not valid JSON"):
        load_records(write(tmp_path / "r.json", '[{"id": 1},'))
    with pytest.raises(UserError, match="line 2 is not valid JSON"):
        load_records(write(tmp_path / "r.jsonl", f"{json.dumps(good())}\n{{\n"))


def test_not_utf8(tmp_path):
    path = tmp_path / "r.json"
    path.write_bytes(json.dumps([good()], ensure_ascii=False).encode("utf-16"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_records(path)


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_records(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match="not a file"):
        load_records(tmp_path)


@pytest.mark.parametrize(
    ("image", "key"),
    [
        ("a/b.jpg", "a/b.jpg"),
        ("./a//b.jpg", "a/b.jpg"),
        ("a/./c/../b.jpg", "a/b.jpg"),
        ("..a/b.jpg", "..a/b.jpg"),
        ("a b/ü 雪.png", "a b/ü 雪.png"),
    ],
)
def test_keys(image, key):
    assert normalize_key(image) == key
