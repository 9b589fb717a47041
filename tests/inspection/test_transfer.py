"""`push` and `pull`: the copy has the bytes of the cache, an interrupted copy is resumed, a wrong one is reported."""

import errno
import json
import os
from types import SimpleNamespace

import pytest

from cache.make import flip_bit, make_cache
from llava_twophase import FeatureCache
from llava_twophase.cache import remote, repetition
from llava_twophase.cache.check.verify import verify
from llava_twophase.cache.quarantine import Quarantined, write_quarantine
from llava_twophase.inspection import transfer
from llava_twophase.inspection.card import dataset_card
from llava_twophase.inspection.cli import main


@pytest.fixture(autouse=True)
def short_patience(monkeypatch):
    monkeypatch.setattr(remote, "OPENING", 1.0)
    monkeypatch.setattr(remote, "READING", 5.0)
    monkeypatch.setattr(repetition, "FIRST_DELAY", 0.02)


@pytest.fixture
def cache(tmp_path):
    path, _, _ = make_cache(tmp_path / "cache", (3, 3, 2))
    write_quarantine(path, [Quarantined("a.jpg", "empty")])
    return path


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def values_of(capsys):
    return json.loads(capsys.readouterr().out)


def test_push_and_pull_give_the_same_bytes(cache, s3, tmp_path, capsys):
    s3.upload(cache / "shards", "s3://bucket/other/shards")  # makes the bucket
    assert main(["push", str(cache), "s3://bucket/pushed"]) == 0
    assert "pushed 3 shards" in capsys.readouterr().out
    assert main(["pull", "s3://bucket/pushed", str(tmp_path / "copy"), "--json"]) == 0
    assert values_of(capsys)["copied"] == 3
    assert contents(tmp_path / "copy") == contents(cache)
    assert verify(tmp_path / "copy") == []


def test_push_copies_only_what_is_missing_and_the_manifest_last(cache, s3, capsys):
    s3.upload(cache, "s3://bucket/half")
    from fsspec.core import url_to_fs

    files, path = url_to_fs("s3://bucket/half", skip_instance_cache=True)
    files.rm(f"{path}/manifest.json")
    files.rm(f"{path}/shards/shard-000001.h5")
    files.pipe_file(f"{path}/shards/shard-000002.h5", b"an interrupted copy")
    assert main(["push", str(cache), "s3://bucket/half", "--json"]) == 0
    assert values_of(capsys) | {"bytes": 0} == {
        "from": str(cache), "to": "s3://bucket/half", "shards": 3, "copied": 2, "bytes": 0, "ok": True, "problems": [],
    }  # fmt: skip


def test_push_of_a_damaged_cache_reports_the_damage(cache, s3, capsys):
    s3.upload(cache / "shards", "s3://bucket/other/shards")
    flip_bit(cache, 1, 1)
    assert main(["push", str(cache), "s3://bucket/damaged"]) == 1
    printed = capsys.readouterr().out
    assert "the copy is not intact" in printed
    assert "shards/shard-000001.h5: the features of" in printed


def test_push_over_another_cache_is_refused(cache, s3, tmp_path, capsys):
    other, _, _ = make_cache(tmp_path / "other", (4,))
    s3.upload(other, "s3://bucket/taken")
    assert main(["push", str(cache), "s3://bucket/taken"]) == 1
    assert "s3://bucket/taken holds another cache; give another URL" in capsys.readouterr().err


def test_pull_resumes_after_an_outage(cache, web, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(remote, "READING", 0.2)
    (cache / "shards/shard-000001.h5").rename(tmp_path / "aside")
    assert main(["pull", f"{web.url}/cache", str(tmp_path / "copy")]) == 1
    assert "shard-000001.h5 does not exist" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "copy/shards").iterdir()) == ["shard-000000.h5"]
    assert not (tmp_path / "copy/manifest.json").exists()
    (tmp_path / "aside").rename(cache / "shards/shard-000001.h5")
    assert main(["pull", f"{web.url}/cache", str(tmp_path / "copy"), "--json"]) == 0
    assert values_of(capsys)["copied"] == 2
    assert contents(tmp_path / "copy") == contents(cache)
    assert main(["pull", f"{web.url}/cache", str(tmp_path / "copy"), "--json"]) == 0
    assert values_of(capsys)["copied"] == 0


def test_pull_under_faults_gives_the_same_bytes(cache, web, tmp_path):
    for name in ("drop", "unavailable", "truncate"):
        setattr(web.faults, name, 0.2)
    assert main(["pull", f"{web.url}/cache", str(tmp_path / "copy")]) == 0
    assert contents(tmp_path / "copy") == contents(cache)


def test_pull_of_a_damaged_cache_keeps_no_damaged_shard(cache, web, tmp_path, capsys):
    flip_bit(cache, 0, 1)
    assert main(["pull", f"{web.url}/cache", str(tmp_path / "copy")]) == 1
    assert "shard-000000.h5 does not match its checksums after it was copied" in capsys.readouterr().err
    assert list((tmp_path / "copy/shards").iterdir()) == []


def test_pull_onto_a_full_disk_is_one_error(cache, web, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("llava_twophase.cache.staging.pwrite_all", full)
    assert main(["pull", f"{web.url}/cache", str(tmp_path / "copy")]) == 1
    assert "is full: free some space, then run the same command again, which resumes it" in capsys.readouterr().err
    assert list((tmp_path / "copy/shards").iterdir()) == []


def test_pull_that_does_not_fit_is_refused_before_it_begins(cache, web, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llava_twophase.files.free_bytes", lambda folder: 1)
    assert main(["pull", f"{web.url}/cache", str(tmp_path / "copy")]) == 1
    assert "3 shards need " in capsys.readouterr().err


def test_pull_into_another_cache_is_refused(cache, web, tmp_path, capsys):
    make_cache(tmp_path / "other", (4,))
    before = contents(tmp_path / "other")
    assert main(["pull", f"{web.url}/cache", str(tmp_path / "other")]) == 1
    assert f"other holds another cache than {web.url}/cache" in capsys.readouterr().err
    assert contents(tmp_path / "other") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["push", "{cache}", "{cache}2"], "push copies a folder to a URL, not"),
        (["push", "s3://a/b", "s3://a/c"], "push copies a folder to a URL, not"),
        (
            ["push", "{cache}", "https://example.org/c"],
            "https://example.org/c cannot be written: a web server",
        ),
        (["pull", "{cache}", "copy"], "pull copies a URL to a folder, not"),
        (["repair", "s3://a/b"], "repair changes files, and s3://a/b is a URL"),
    ],
)
def test_wrong_directions_are_refused(cache, capsys, arguments, message):
    assert main([part.format(cache=cache) for part in arguments]) == 1
    assert message in capsys.readouterr().err


def test_push_to_the_hub_commits_shards_then_card_then_manifest(cache, monkeypatch, capsys):
    """The Hub itself is replaced; its client's functions get what they document."""
    import huggingface_hub

    commits, repository = [], {}

    class Api:
        def create_commit(self, repo_id, operations, commit_message, repo_type, revision):
            assert (repo_id, repo_type, revision) == ("user/features", "dataset", "main")
            commits.append([operation.path_in_repo for operation in operations])
            for operation in operations:
                repository[operation.path_in_repo] = operation.path_or_fileobj

    place = SimpleNamespace(repo_id="user/features", repo_type="dataset", revision="main", path_in_repo="clip")
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub.HfFileSystem, "resolve_path", lambda self, path: place)
    monkeypatch.setattr(remote.RemoteStorage, "read_file", lambda self, name: None)
    monkeypatch.setattr(transfer, "_is_there", lambda *_: False)
    monkeypatch.setattr(transfer, "verify", lambda url: [])
    monkeypatch.setattr(transfer, "_FILES_IN_A_COMMIT", 3)
    assert main(["push", str(cache), "hf://datasets/user/features/clip"]) == 0
    assert commits == [
        [f"clip/shards/shard-00000{number}.h5" for number in range(3)],
        ["clip/quarantine.jsonl"],
        ["clip/README.md"],
        ["clip/manifest.json"],
    ]
    assert "--feature_cache hf://datasets/user/features/clip" in repository["clip/README.md"].decode()


def test_dataset_card_has_metadata_and_the_fingerprint(cache):
    card = dataset_card(FeatureCache(cache), "hf://datasets/user/features")
    front = card.split("---\n")[1]
    assert "size_categories:\n- n<1K\n" in front
    assert "| images | 8 |" in card
    assert "| select_layer | -2 |" in card
