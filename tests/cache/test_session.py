"""The writer's lock and manifest of a cache, and which shards it lists."""

import pytest

from cache.make import keys_of, make_cache, make_shard, rows
from llava_twophase.cache.manifest import Manifest, read_manifest
from llava_twophase.cache.session import CacheSession, existing_manifest, report_software, sealed_shards, software_plan
from llava_twophase.errors import UserError

SOFTWARE = {"torch": "2.6.0", "pillow": "10.1"}


def test_update_lists_shards_sealed_since_the_manifest_was_written(tmp_path):
    cache, _, _ = make_cache(tmp_path / "cache")
    with CacheSession(cache) as session:
        session.begin(session.manifest, session.manifest.shards, {})
        make_shard(cache / "shards" / "shard-000002.h5", keys_of(2, 4), rows(4, seed=2))
        assert session.update().rows == 12
        session.complete()
    assert [entry.rows for entry in read_manifest(cache).shards] == [5, 3, 4]


def test_update_lists_no_shard_whose_file_or_link_leads_nowhere(tmp_path, caplog):
    cache, _, _ = make_cache(tmp_path / "cache", (5, 3, 2))
    (cache / "shards" / "shard-000000.h5").unlink()
    link = cache / "shards" / "shard-000001.h5"
    link.rename(cache / "shards" / "moved")
    link.symlink_to("nowhere")
    with CacheSession(cache) as session:
        assert [entry.rows for entry in session.update().shards] == [2]
    assert caplog.text.count("its images will be extracted again") == 2
    link.unlink()
    link.symlink_to("moved")
    with CacheSession(cache) as session:
        assert [entry.rows for entry in session.update().shards] == [3, 2]


def test_update_sometimes_writes_after_every_shard_while_that_is_fast(tmp_path):
    cache, _, _ = make_cache(tmp_path / "cache", (5,))
    with CacheSession(cache) as session:
        for number in (1, 2):
            make_shard(cache / "shards" / f"shard-00000{number}.h5", keys_of(number, 4), rows(4))
            session.update_sometimes()
            assert len(read_manifest(cache).shards) == number + 1


def test_update_sometimes_waits_fifty_times_as_long_as_a_slow_update_took(tmp_path, monkeypatch):
    cache, _, _ = make_cache(tmp_path / "cache", (5,))
    clock = iter([10.0, 10.0, 10.2, 10.2, 20.1, 20.3, 20.3, 20.5, 20.5])
    monkeypatch.setattr("llava_twophase.cache.session.time.monotonic", lambda: next(clock))
    with CacheSession(cache) as session:
        session.update_sometimes()  # from 10.0 to 10.2
        make_shard(cache / "shards" / "shard-000001.h5", keys_of(1, 4), rows(4))
        session.update_sometimes()  # at 20.1
        assert len(read_manifest(cache).shards) == 1
        session.update_sometimes()  # at 20.3
        assert len(read_manifest(cache).shards) == 2


def test_begin_removes_work_files_and_marks_the_cache_incomplete(tmp_path):
    cache, _, _ = make_cache(tmp_path / "cache")
    for name in ("manifest.json.tmp", "shards/shard-000002.h5.0a1b.tmp"):
        (cache / name).touch()
    with CacheSession(cache) as session:
        session.begin(session.manifest, session.manifest.shards, {"digest": "d", "first_shard": 2})
    assert not list(cache.rglob("*.tmp"))
    manifest = read_manifest(cache)
    assert not manifest.complete and manifest.plan == {"digest": "d", "first_shard": 2} and manifest.rows == 8


def test_complete_refuses_a_cache_without_rows(tmp_path):
    with CacheSession(tmp_path / "cache") as session:
        assert session.found is None
        with pytest.raises(ValueError, match="call begin first"):
            session.update()
        session.begin(Manifest({}, {}, 8), [], {})
        with pytest.raises(UserError, match="holds no features"):
            session.complete()


def test_sealed_shards_refuses_a_shard_of_another_cache(tmp_path):
    cache, _, _ = make_cache(tmp_path / "cache")
    make_shard(cache / "shards" / "shard-000002.h5", keys_of(2, 4), rows(4), fingerprint={"other": 1})
    with pytest.raises(UserError, match=r"shard-000002\.h5"):
        sealed_shards(cache, read_manifest(cache))


def test_existing_manifest_is_none_for_new_and_empty_folders(tmp_path):
    assert existing_manifest(tmp_path / "new") is None
    assert existing_manifest(tmp_path) is None
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a feature cache"):
        existing_manifest(tmp_path)


def test_software_plan_records_only_other_software():
    manifest = Manifest({}, {"software": SOFTWARE}, 8)
    assert software_plan(manifest, SOFTWARE) == {}
    newer = {**SOFTWARE, "torch": "2.7.0"}
    assert software_plan(manifest, newer) == {"software": newer}
    assert manifest.software == SOFTWARE
    assert Manifest({}, {"software": SOFTWARE}, 8, plan={"software": newer}).software == newer


@pytest.mark.parametrize(
    ("resumed", "expected"),
    [
        (False, "the cache was made with other software: torch 2.6.0 -> 2.7.0; new shards record the latter"),
        (True, "the interrupted run had other software: torch 2.6.0 -> 2.7.0; its remaining shards record the former"),
    ],
)
def test_report_software_names_both_versions(caplog, resumed, expected):
    manifest = Manifest({}, {"software": SOFTWARE}, 8)
    report_software(manifest, SOFTWARE, resumed)
    assert caplog.messages == []
    report_software(manifest, {**SOFTWARE, "torch": "2.7.0"}, resumed)
    assert caplog.messages == [expected]
