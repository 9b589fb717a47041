"""A run is the same from JSON, from Parquet, and from columns that an earlier start kept."""

import pytest

from commands import assert_same_outcome, outcome
from llava_twophase.records import load


def test_run_from_parquet_and_from_kept_columns_equals_json(train_in_process, plain_set, monkeypatch, tmp_path):
    pyarrow, data = pytest.importorskip("pyarrow"), tmp_path / "records.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(plain_set.records), data)
    flags = {"max_steps": 2, "eval_fraction": 0.25, "group_by_modality_length": True}
    assert train_in_process("expected", **flags) == (0, True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(load, "_KEPT_FROM", 0)
    for name in ("first", "second"):
        assert train_in_process(name, data_path=data, **flags) == (0, True)
        assert_same_outcome(outcome(tmp_path / name), outcome(tmp_path / "expected"))
        monkeypatch.setattr(load, "read_parquet_records", None)
    # The digest of the records is that of JSON too, so the first run continues from here.
    flags = {**flags, "max_steps": 3}
    assert train_in_process("expected", data_path=data, **flags) == (0, True)
