"""Parquet with the columns of LLaVA's JSON gives the records and the problems of the JSON."""

import json
import sys

import pytest

import drawn
from llava_twophase.errors import UserError
from llava_twophase.records import load_records, parquet

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")
TURN = pyarrow.struct({"from": pyarrow.string(), "value": pyarrow.string()})
SCHEMA = {"id": pyarrow.string(), "image": pyarrow.string(), "conversations": pyarrow.list_(TURN)}


def write(path, raws, **changes):
    schema = pyarrow.schema({**SCHEMA, **changes})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(raws, schema=schema), path, row_group_size=7)
    return path


def raws(count=30):
    return [drawn.make_record(str(number), f"ü/{number}.jpg", f"ein grüner {number} 🟩") for number in range(count)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"image": pyarrow.large_string(), "conversations": pyarrow.large_list(TURN)},
        {"image": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), "id": pyarrow.int64()},
    ],
)
def test_parquet_has_the_records_of_json(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(parquet, "_ROWS", 4)
    entries = [{**raw, "id": int(raw["id"])} if "id" in changes else raw for raw in raws()]
    # Its form is recognised by content, not by its name.
    found = load_records(write(tmp_path / "records.json", entries, **changes))
    assert found == load_records(drawn.write_records(raws(), tmp_path / "expected.json"))


def test_parquet_reads_a_list_of_one_image_and_ignores_other_columns(tmp_path):
    entries = [{**raw, "image": [raw["image"]], "score": 1.0} for raw in raws(3)]
    path = write(tmp_path / "r.parquet", entries, image=pyarrow.list_(pyarrow.string()), score=pyarrow.float64())
    assert [record.image for record in load_records(path)] == [raw["image"] for raw in raws(3)]


def test_parquet_reports_the_problems_of_json_with_row_numbers(tmp_path):
    entries = raws()
    entries[3]["image"] = None
    entries[9]["conversations"] = entries[9]["conversations"][:1]
    entries[11]["conversations"][0]["value"] = "no token"
    entries[12]["image"] = "../a.jpg"
    found = []
    for path in (write(tmp_path / "r", entries), tmp_path / "r.json"):
        (tmp_path / "r.json").write_text(json.dumps(entries), encoding="utf-8")
        with pytest.raises(UserError) as caught:
            load_records(path)
        found.append(str(caught.value).replace(str(path), "FILE"))
    assert found[0] == found[1] and "4 bad records" in found[0] and "record 9 (id '9'): has 1 turn in" in found[0]


IMAGE = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
OTHER = {
    "no image": ({"url": pyarrow.string()}, ["image"], "has the columns id, conversations, url, not image; expected"),
    "neither": ({"text": pyarrow.string()}, ["image", "conversations"], "not image and conversations; expected image"),
    "embedded": ({"image": IMAGE}, [], "an image column of struct<.*write embedded images to files first"),
    "text turns": ({"conversations": pyarrow.string()}, [], "has a conversations column of string; expected image"),
}


@pytest.mark.parametrize("kind", OTHER)
def test_parquet_with_other_columns_is_refused(tmp_path, kind):
    added, removed, expected = OTHER[kind]
    schema = {name: kind for name, kind in {**SCHEMA, **added}.items() if name not in removed}
    table = pyarrow.Table.from_pylist([], schema=pyarrow.schema(schema))
    pyarrow.parquet.write_table(table, tmp_path / "r.parquet")
    with pytest.raises(UserError, match=expected):
        load_records(tmp_path / "r.parquet")


@pytest.mark.parametrize("damage", ["truncated", "bytes"])
def test_damaged_parquet_is_refused(tmp_path, damage):
    path = write(tmp_path / "r.parquet", raws())
    content = path.read_bytes()
    path.write_bytes(content[:-20] if damage == "truncated" else content[:4] + bytes(300) + content[304:])
    with pytest.raises(UserError, match=rf"{path} is a Parquet file that cannot be read: .*; copy or write it again"):
        load_records(path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "r.parquet", raws())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"which needs pyarrow: pip install 'llava-twophase\[parquet\]'"):
        load_records(path)
