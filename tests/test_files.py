"""Files are replaced completely or not at all, and disk errors say what to do."""

import errno
import os
import re
from collections import namedtuple

import pytest

from llava_twophase import files
from llava_twophase.errors import UserError
from llava_twophase.files import (
    explain_os_errors,
    free_bytes,
    replace_file,
    require_free_space,
    require_writable,
    sync_folder,
)


def test_replace_file_writes_bytes_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with replace_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_replace_file_writes_text_that_utf_8_cannot_encode_as_escapes(tmp_path):
    with replace_file(tmp_path / "a.json", "w") as file:
        file.write('"é \udcff"')
    assert (tmp_path / "a.json").read_bytes() == '"é \\udcff"'.encode()


def test_replace_file_keeps_the_old_content_after_an_exception(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), replace_file(path) as file:
        file.write(b"new")
        raise KeyError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_replace_file_syncs_the_file_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace

    def traced_fsync(descriptor):
        steps.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def traced_replace(source, target):
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "replace", traced_replace)
    with replace_file(tmp_path / "a.bin") as file:
        file.write(b"new")
    assert steps == ["a.bin.tmp", "rename", tmp_path.name]


def fail_fsync(monkeypatch, number, folders):
    """Let fsync fail for folders or for files only."""

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}") == folders:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_replace_file_accepts_a_file_system_that_cannot_sync_folders(tmp_path, monkeypatch, number):
    fail_fsync(monkeypatch, number, folders=True)
    with replace_file(tmp_path / "a.bin") as file:
        file.write(b"new")
    assert (tmp_path / "a.bin").read_bytes() == b"new"


def test_sync_folder_raises_other_errors(tmp_path, monkeypatch):
    fail_fsync(monkeypatch, errno.EIO, folders=True)
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_replace_file_raises_when_the_file_cannot_be_synced(tmp_path, monkeypatch, number):
    fail_fsync(monkeypatch, number, folders=False)
    with pytest.raises(OSError), replace_file(tmp_path / "a.bin") as file:
        file.write(b"new")
    assert list(tmp_path.iterdir()) == []


def test_replace_file_of_several_processes_names_machine_and_process(tmp_path):
    with replace_file(tmp_path / "a.bin", unique=True) as file:
        assert os.path.basename(file.name) == f".a.bin.{os.uname().nodename}.{os.getpid()}.tmp"
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_free_bytes_asks_the_nearest_parent_that_exists(tmp_path):
    assert free_bytes(tmp_path / "not" / "yet") > 0


def test_require_free_space_names_both_sizes(tmp_path):
    require_free_space(tmp_path, 1, what="the features", advice="none")
    with pytest.raises(UserError, match=r"658\.000 TB are needed for the features, but the disk of .*B free; use int8"):
        require_free_space(tmp_path / "not" / "yet", 658 * 10**12, what="the features", advice="use int8")


def test_require_writable_refuses_a_file_as_folder(tmp_path):
    require_writable(tmp_path / "not" / "yet", "--feature_cache")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is not a folder; give another --feature_cache"):
        require_writable(tmp_path / "file" / "cache", "--feature_cache")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left"), "disk of --output_dir out is full: free some space, then run again"),
        (OSError(errno.EDQUOT, "Quota"), "is full: free some space"),
        (OSError(errno.EROFS, "Read-only", "out/a"), "cannot be written: make it writable or give another"),
        (OSError(errno.EIO, "I/O error"), "cannot be written: fix the cause, then run again"),
        (FileNotFoundError(errno.ENOENT, "No such file", "out/a"), "was deleted or moved during the run"),
        (FileNotFoundError(errno.ENOENT, "Unable to create file (name = 'out/a')"), "deleted or moved during the run"),
        (OSError(errno.EROFS, "Read-only", "elsewhere/a"), None),
        (ConnectionResetError(errno.ECONNRESET, "reset"), None),
        (RuntimeError("a bug"), None),
    ],
)
def test_explain_os_errors_explains_errors_of_the_folder_only(tmp_path, monkeypatch, error, expected):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "out"
    folder.mkdir()
    with (
        pytest.raises(Exception) as caught,
        explain_os_errors(folder.relative_to(tmp_path), "--output_dir", lambda: "run again", also=(RuntimeError,)),
    ):
        raise error
    if expected is None:
        assert caught.value is error
    else:
        assert isinstance(caught.value, UserError)
        assert re.search(expected, str(caught.value))


def test_explain_os_errors_compares_paths_not_spellings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="make it writable"), explain_os_errors(tmp_path, "-o", lambda: "run again"):
        raise OSError(errno.EACCES, "Permission denied", "./a")


def test_explain_os_errors_recognises_a_full_disk_in_a_library_error(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: usage(1000))
    with (
        pytest.raises(UserError, match="is full"),
        explain_os_errors(tmp_path, "--output_dir", lambda: "run again", also=(RuntimeError,)),
    ):
        raise RuntimeError("unexpected pos 64 vs 0")
