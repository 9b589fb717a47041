"""URLs that no installed package reads: what to install, or what was meant."""

import sys

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

from cache.make import make_cache
from llava_twophase import FeatureCache
from llava_twophase.cache.file_systems import connect
from llava_twophase.errors import UserError
from llava_twophase.inspection.cli import main


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("htps://host/c", r"htps:// is not a protocol that fsspec reads; did you mean https://host/c\?$"),
        ("S3://bucket/c", r"S3:// is not a protocol that fsspec reads; did you mean s3://bucket/c\?$"),
        ("nothing://b/c", r"nothing:// is not a protocol that fsspec reads; expected https://, s3://, gs://, hf://$"),
        ("http:/host/c", r"http:/host/c is not a feature cache: it does not exist; did you mean http://host/c\?$"),
        ("s3:/bucket/c", r"s3:/bucket/c is not a feature cache: it does not exist; did you mean s3://bucket/c\?$"),
    ],
)
def test_a_mistyped_url_is_one_error_with_what_was_meant(url, message):
    with pytest.raises(UserError, match=message):
        FeatureCache(url)


@pytest.mark.parametrize(
    ("url", "module", "message"),
    [
        ("gs://bucket/c", "gcsfs", r"gs://bucket/c needs a package that is not installed \(.*\); pip install gcsfs$"),
        ("abfs://box/c", "adlfs", r"abfs://box/c needs a package that is not installed \(.*\); pip install adlfs$"),
        ("root://host/c", "fsspec_xrootd", r"\); pip install fsspec-xrootd$"),
        ("sftp://host/c", "paramiko", r'SFTPFileSystem requires "paramiko" to be installed\)$'),
    ],
)
def test_a_missing_package_is_one_error_that_says_what_to_install(url, module, message, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=message):
        FeatureCache(url)


def test_a_missing_package_of_the_extra_is_one_error_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)  # s3a is s3; fsspec keeps classes that it has imported once
    with pytest.raises(UserError, match=r"Install s3fs to access S3\); pip install 'llava-twophase\[remote\]'$"):
        FeatureCache("s3a://bucket/c")


def test_a_protocol_that_was_registered_at_run_time_is_read(tmp_path):
    class Mine(LocalFileSystem):
        protocol = "minefs"

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(str(path).removeprefix("minefs://"))

    _, keys, stored = make_cache(tmp_path / "cache")
    fsspec.register_implementation("minefs", Mine)
    try:
        np.testing.assert_array_equal(FeatureCache(f"minefs://{tmp_path}/cache").read_raw(keys), stored)
    finally:
        del _registry["minefs"]


def test_an_unknown_protocol_is_an_error_without_a_cause():
    with pytest.raises(UserError, match="not a protocol") as caught:
        connect("nothing://b/c", 1)
    assert caught.value.__cause__ is None


def test_a_mistyped_url_ends_a_command_with_one_line(capsys):
    assert main(["summary", "htps://host/c"]) == 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "did you mean https://host/c?" in printed
