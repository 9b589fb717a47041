"""A run is the same from each form of the data file, and from columns that an earlier start kept."""

import pytest

from commands import assert_same_outcome, outcome
from llava_twophase.records import load


@pytest.mark.parametrize("grouped", [False, True])
def test_run_from_kept_columns_and_from_parquet_equals_json(
    train_in_process, plain_set, monkeypatch, tmp_path, grouped
):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    flags = {"max_steps": 3, "eval_fraction": 0.25, "group_by_modality_length": grouped}
    assert train_in_process("expected", **flags) == (0, True)
    expected = outcome(tmp_path / "expected")
    parquet.write_table(pyarrow.Table.from_pylist(plain_set.records), tmp_path / "records.parquet")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(load, "_KEPT_FROM", 0)
    for name, data in {
        "first": plain_set.json,
        "jsonl": plain_set.jsonl,
        "parquet": tmp_path / "records.parquet",
    }.items():
        assert train_in_process(name, data_path=data, **flags) == (0, True)
        assert_same_outcome(outcome(tmp_path / name), expected)
    monkeypatch.setattr(load, "read_json_records", None)
    assert train_in_process("second", **flags) == (0, True)
    assert_same_outcome(outcome(tmp_path / "second"), expected)
    # The records have the digest of the first run, so it can be resumed from another form of the file.
    assert train_in_process("expected", data_path=tmp_path / "records.parquet", **{**flags, "max_steps": 4}) == (
        0,
        True,
    )
