"""Files that are saved under an image's name but are something else."""

import io
import tarfile
import zipfile

import pytest

from llava_twophase.vision.file_kinds import HEAD_BYTES, describe
from llava_twophase.vision.images import BadImage, check_header, decode


def archive(kind):
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as made:
            made.writestr("a", "x")
    else:
        with tarfile.open(fileobj=file, mode="w") as made:
            made.addfile(tarfile.TarInfo("a"))
    return file.getvalue()


KINDS = {
    "an HTML page": b"\n<!DOCTYPE html><html><body>404 not found</body></html>",
    "an HTML page ": b"<html><head><title>Access denied</title>" + b" " * 9000,
    "an HTML page  ": b"<!-- served by a cache -->\n<!doctype html><html>",
    "an AVIF image that is damaged": b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miaf",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n",
    "a HEIC image": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(range(200)),
    "an SVG drawing": b'<?xml version="1.0" encoding="UTF-8"?>\n<!-- made by hand -->\n<svg width="4" height="4"/>',
    "an SVG drawing ": b'<svg xmlns="http://www.w3.org/2000/svg"></svg>',
    "an XML file": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "a PDF document": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3",
    "a PostScript or EPS file": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "a zip archive": archive("zip"),
    "a tar archive": archive("tar"),
    "a gzip file": b"\x1f\x8b\x08\0\0\0",
    "a JSON file": b'{"error": "rate limit exceeded"}',
    "a text file": "Nicht gefunden: Überlastung\n".encode(),
    "an MP4 video": b"\0\0\0\x20ftypisom\0\0\2\0",
    "a Photoshop (PSD) file": b"8BPS\0\1" + bytes(20),
    "nothing but zero bytes": bytes(5000),
}


@pytest.mark.parametrize("kind", KINDS)
def test_reason_says_what_the_file_is(kind):
    assert describe(KINDS[kind][:HEAD_BYTES]).startswith(kind.strip())
    for call in (decode, lambda data: check_header(io.BytesIO(data))):
        with pytest.raises(BadImage) as caught:
            call(KINDS[kind])
        assert str(caught.value).startswith(f"cannot be decoded: it is {kind.strip()}")


def test_describe_of_unknown_bytes_is_none():
    assert describe(bytes(range(1, 256)) * 9) is None
    assert describe(b"\xe9" * 100) is None


def test_describe_accepts_a_character_that_the_head_truncates():
    assert describe(("x" * (HEAD_BYTES - 1) + "é").encode()[:HEAD_BYTES]) == "a text file"
