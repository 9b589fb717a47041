"""Training from a cache at a URL: the same run bit for bit, or one error before the LLM is loaded."""

import json
import os
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from commands import assert_same_outcome, outcome
from llava_twophase import FeatureCache
from llava_twophase.cache import remote, repetition, time_limits
from llava_twophase.cache.shard_files import read_header


@pytest.fixture(autouse=True)
def short_patience(monkeypatch):
    monkeypatch.setattr(remote, "OPENING", 1.0)
    monkeypatch.setattr(repetition, "FIRST_DELAY", 0.02)
    monkeypatch.setattr(time_limits, "FIRST", 0.5)
    monkeypatch.setattr(time_limits, "SHORTEST", 0.5)
    monkeypatch.setattr("llava_twophase.cache.rows._PAUSE", 0.05)


def test_training_from_s3_under_faults_equals_a_local_run(train_in_process, s3, plain_cache, tmp_path):
    assert train_in_process("local") == (0, True)
    s3.upload(plain_cache, "s3://bucket/plain")
    for name in s3.faults.injected:
        setattr(s3.faults, name, 0.15)
    assert train_in_process("remote", feature_cache="s3://bucket/plain") == (0, True)
    assert sum(s3.faults.injected.values()) > 2
    assert_same_outcome(outcome(tmp_path / "local"), outcome(tmp_path / "remote"))
    recorded = json.loads((tmp_path / "remote/feature_cache.json").read_text())
    assert recorded["path"] in ("s3://bucket/plain", ["s3://bucket/plain"])


def test_training_with_a_stage_equals_a_local_run(train_in_process, s3, plain_cache, tmp_path):
    assert train_in_process("local") == (0, True)
    s3.upload(plain_cache, "s3://bucket/staged")
    stage = {"stage_dir": tmp_path / "stage", "stage_gb": 1}
    assert train_in_process("remote", feature_cache="s3://bucket/staged", **stage) == (0, True)
    assert_same_outcome(outcome(tmp_path / "local"), outcome(tmp_path / "remote"))
    copies = list((tmp_path / "stage").glob("*.h5"))
    assert len(copies) == len(list((plain_cache / "shards").glob("*.h5")))


def test_training_from_the_hub_equals_a_local_run(train_in_process, hub, plain_cache, tmp_path):
    """A server of this machine replaces the Hub: see `hub_server`."""
    assert train_in_process("local") == (0, True)
    shutil.copytree(plain_cache, tmp_path / "hub/plain")
    assert train_in_process("remote", feature_cache="hf://datasets/user/features/plain") == (0, True)
    assert hub.faults.sent > 0
    assert_same_outcome(outcome(tmp_path / "local"), outcome(tmp_path / "remote"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"feature_cache": "http://127.0.0.1:9/cache"}, "http://127.0.0.1:9/cache/manifest.json cannot be read"),
        ({"feature_cache": "s3://bucket/nothing"}, "s3://bucket/nothing is not a feature cache"),
        ({"feature_cache": "htps://host/cache"}, "did you mean https://host/cache?"),
        ({"feature_cache": "http:/host/cache"}, "did you mean http://host/cache?"),
        ({"feature_cache": "webdav://host/cache"}, "pip install webdav4"),
        ({"stage_dir": "stage", "stage_gb": 1}, "--stage_dir copies shards of a cache at a URL"),
        ({"feature_cache": "s3://b/c", "stage_dir": "stage"}, "--stage_gb 0: give --stage_dir and --stage_gb together"),
        ({"feature_cache": "s3://b/c", "stage_gb": 1}, "--stage_gb 1: give --stage_dir and --stage_gb together"),
    ],
)
def test_bad_remote_flags_are_reported_before_the_llm_is_loaded(train_in_process, s3, capsys, flags, message):
    code, loaded = train_in_process(**flags)
    assert code in (1, 2)
    assert not loaded
    assert message in capsys.readouterr().err


def test_missing_credentials_are_reported_before_the_llm_is_loaded(train_in_process, s3, capsys, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert train_in_process(feature_cache="s3://bucket/plain") == (1, False)
    assert "credentials are missing or were refused" in capsys.readouterr().err


def test_a_server_without_ranges_is_reported_before_the_llm_is_loaded(train_in_process, plain_cache, capsys):
    handler = partial(SimpleHTTPRequestHandler, directory=str(plain_cache))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert train_in_process(feature_cache=f"http://127.0.0.1:{server.server_port}") == (1, False)
    finally:
        server.shutdown()
        server.server_close()
    assert "cannot be read by ranges: the server sent" in capsys.readouterr().err


def test_a_cache_that_changed_after_it_was_opened_ends_training_with_one_error(
    train_in_process, web, plain_cache, tmp_path, capsys, monkeypatch
):
    path = shutil.copytree(plain_cache, tmp_path / "changing")
    begin = FeatureCache.read_raw_rows_into

    def change_and_read(self, rows, buffer):
        for shard in (path / "shards").glob("*.h5"):
            header = read_header(shard)
            with shard.open("r+b") as file:
                file.seek(header.datasets["features"].offset)
                file.write(bytes(header.datasets["features"].nbytes))
        begin(self, rows, buffer)

    monkeypatch.setattr(FeatureCache, "read_raw_rows_into", change_and_read)
    assert train_in_process(feature_cache=f"{web.url}/changing") == (1, True)
    printed = capsys.readouterr().err
    assert "changed on the server while it was in use (version" in printed
    assert printed.count("error: ") == 1
    assert "Traceback" not in printed


def test_a_stage_that_is_too_small_is_reported_before_the_llm_is_loaded(
    train_in_process, s3, plain_cache, tmp_path, capsys
):
    s3.upload(plain_cache, "s3://bucket/small")
    flags = {"feature_cache": "s3://bucket/small", "stage_dir": tmp_path / "stage", "stage_gb": 0.000001}
    assert train_in_process(**flags) == (1, False)
    assert "--stage_gb 1e-06 is too small: a shard of s3://bucket/small has" in capsys.readouterr().err


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_a_stage_that_cannot_be_written_is_reported_before_the_llm_is_loaded(
    train_in_process, s3, plain_cache, tmp_path, capsys
):
    s3.upload(plain_cache, "s3://bucket/small")
    (tmp_path / "stage").mkdir(mode=0o500)
    flags = {"feature_cache": "s3://bucket/small", "stage_dir": tmp_path / "stage", "stage_gb": 1}
    assert train_in_process(**flags) == (1, False)
    assert "--stage_dir" in capsys.readouterr().err
