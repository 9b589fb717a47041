"""URLs that no installed package reads: what to install, or what was meant."""

import sys

import pytest

from llava_twophase import FeatureCache
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


def test_a_mistyped_url_ends_a_command_with_one_line(capsys):
    assert main(["summary", "htps://host/c"]) == 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "did you mean https://host/c?" in printed
