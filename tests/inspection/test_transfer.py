"""`push` and `pull`: the copy has the bytes of the cache, an interrupted copy is resumed, a wrong one is reported."""

import errno
import json
import os
import subprocess
import sys
import time

import pytest

from cache.make import flip_bit, make_cache
from helpers import ROOT, process_environment
from llava_twophase import FeatureCache
from llava_twophase.cache import remote, repetition
from llava_twophase.cache.check.verify import verify
from llava_twophase.cache.quarantine import Quarantined, write_quarantine
from llava_twophase.inspection import transfer
from llava_twophase.inspection.card import dataset_card
from llava_twophase.inspection.cli import main

# huggingface_hub 2.4 uploads in a way that httpx warns of.
hub_uploads = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


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


def start(*arguments):
    command = [sys.executable, "pipelines/inspect_cache.py", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=process_environment(), stderr=subprocess.DEVNULL)


def kill_once(process, condition):
    """Kill a process when the condition holds for the first time."""
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.kill()
    process.wait()


def test_pull_resumes_after_a_kill(cache, web, tmp_path, capsys):
    shards, copied = cache / "shards", tmp_path / "copy/shards"
    web.faults.latency = 0.5
    process = start("pull", f"{web.url}/cache", tmp_path / "copy")
    kill_once(process, lambda: (copied / "shard-000000.h5").exists())
    assert contents(copied)["shard-000000.h5"] == (shards / "shard-000000.h5").read_bytes()
    assert not (tmp_path / "copy/manifest.json").exists()
    web.faults.latency = 0.0
    assert main(["pull", f"{web.url}/cache", str(tmp_path / "copy"), "--json"]) == 0
    assert values_of(capsys)["copied"] == 2
    assert contents(tmp_path / "copy") == contents(cache)


def test_push_resumes_after_a_kill(cache, moto, s3, tmp_path, capsys):
    s3.upload(cache / "shards", "s3://bucket/other/shards")
    from fsspec.core import url_to_fs

    # Without the proxy, whose latency is for the upload.
    options = {"skip_instance_cache": True, "use_listings_cache": False, "endpoint_url": moto}
    files, path = url_to_fs("s3://bucket/killed", **options)
    s3.faults.latency = 0.3
    process = start("push", cache, "s3://bucket/killed")
    kill_once(process, lambda: files.exists(f"{path}/shards/shard-000000.h5"))
    s3.faults.latency = 0.0
    assert not files.exists(f"{path}/manifest.json")
    assert main(["push", str(cache), "s3://bucket/killed", "--json"]) == 0
    assert values_of(capsys)["copied"] in (1, 2)
    assert main(["pull", "s3://bucket/killed", str(tmp_path / "copy")]) == 0
    assert contents(tmp_path / "copy") == contents(cache)


def test_push_that_cannot_write_says_so(cache, s3, capsys, monkeypatch):
    monkeypatch.setattr(remote, "READING", 0.2)
    assert main(["push", str(cache), "s3://nobucket/cache"]) == 1
    assert "s3://nobucket/cache" in capsys.readouterr().err


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
    assert " kB are needed for 3 shards, but the disk" in capsys.readouterr().err


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


@hub_uploads
def test_push_to_the_hub_commits_shards_then_card_then_manifest(cache, hub, tmp_path, monkeypatch, capsys):
    """A server of this machine replaces the Hub: see `hub_server`."""
    monkeypatch.setattr(transfer, "_FILES_IN_A_COMMIT", 3)
    assert main(["push", str(cache), "hf://datasets/user/features/clip"]) == 0
    assert "every checksum matches" in capsys.readouterr().out
    assert hub.commits == [
        [f"clip/shards/shard-00000{number}.h5" for number in range(3)],
        ["clip/quarantine.jsonl"],
        ["clip/README.md"],
        ["clip/manifest.json"],
    ]
    pushed = contents(tmp_path / "hub/clip")
    assert "--feature_cache hf://datasets/user/features/clip" in pushed.pop("README.md").decode()
    assert pushed == contents(cache)
    assert main(["pull", "hf://datasets/user/features/clip", str(tmp_path / "copy")]) == 0
    assert contents(tmp_path / "copy") == contents(cache)


@hub_uploads
def test_push_to_the_hub_resumes_and_keeps_an_edited_card(cache, hub, tmp_path, capsys):
    assert main(["push", str(cache), "hf://datasets/user/features"]) == 0
    (tmp_path / "hub/shards/shard-000001.h5").unlink()
    (tmp_path / "hub/README.md").write_text("mine")
    capsys.readouterr()
    assert main(["push", str(cache), "hf://datasets/user/features", "--json"]) == 0
    assert values_of(capsys)["copied"] == 1
    assert (tmp_path / "hub/README.md").read_text() == "mine"
    assert verify(tmp_path / "hub") == []


def test_push_to_an_unknown_dataset_says_how_to_create_it(cache, hub, capsys):
    assert main(["push", str(cache), "hf://datasets/user/other"]) == 1
    assert "create the dataset first: hf repos create NAME --type dataset" in capsys.readouterr().err


def test_push_to_a_folder_url_creates_its_folders(cache, tmp_path):
    assert main(["push", str(cache), f"file://{tmp_path}/new/folder"]) == 0
    assert contents(tmp_path / "new/folder") == contents(cache)


def test_dataset_card_has_metadata_and_the_fingerprint(cache):
    card = dataset_card(FeatureCache(cache), "hf://datasets/user/features")
    front = card.split("---\n")[1]
    assert "size_categories:\n- n<1K\n" in front
    assert "| images | 8 |" in card
    assert "| select_layer | -2 |" in card
