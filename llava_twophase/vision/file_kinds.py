"""What a file that is not a usable image really is, from its first bytes."""

from __future__ import annotations

import re

HEAD_BYTES = 4096

# Start of the file -> description. Formats that Pillow could open are here if they are not among the accepted ones.
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the image itself (run: git lfs pull)"),
    (b"%PDF-", "a PDF document"),
    (b"%!PS", "a PostScript or EPS file"),
    (b"\xc5\xd0\xd3\xc6", "an EPS file"),
    (b"8BPS", "a Photoshop (PSD) file"),
    (b"PK\x03\x04", "a zip archive"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x1f\x8b", "a gzip file"),
    (b"Rar!", "a RAR archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (b"\xfd7zXZ\x00", "an xz file"),
    (b"\x28\xb5\x2f\xfd", "a zstd file"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1aE\xdf\xa3", "a WebM or Matroska video"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL image"),
    (b"icns", "an Apple icon (ICNS)"),
    (b"DDS ", "a DirectDraw (DDS) texture"),
    (b"\xd7\xcd\xc6\x9a", "a Windows metafile"),
    (b"SIMPLE  =", "a FITS file"),
    (b"\x7fELF", "a program"),
)
_BRANDS = {  # of ISO media files, after "ftyp"
    **dict.fromkeys(
        (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"), "a HEIC image (convert it to JPEG)"
    ),
    **dict.fromkeys((b"avif", b"avis"), "an AVIF image that is damaged, or this Pillow cannot read AVIF"),
    b"qt  ": "a QuickTime video",
}


def describe(head: bytes) -> str | None:
    """Return what a file is, as a phrase like "an HTML page"; None if its first bytes do not tell.

    Args:
        head: The first ``HEAD_BYTES`` bytes of the file.
    """
    if not head:
        return "empty"
    if not head.strip(b"\0"):
        return "nothing but zero bytes"
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], "an MP4 video")
    if head[257:262] == b"ustar":
        return "a tar archive"
    return _describe_text(head)


def _describe_text(head: bytes) -> str | None:
    text = head.decode("utf-8-sig", "replace")
    if re.search(r"[\x00-\x08\x0e-\x1f]", text):
        return None
    start = text.lstrip()[:1000].lower()
    if re.match(r"(<!--.*?-->\s*)*<(!doctype html|html|head|body)", start, re.DOTALL):
        return "an HTML page"
    if re.match(r"(<\?xml[^>]*>\s*|<!--.*?-->\s*|<!doctype svg[^>]*>\s*)*<svg\b", start, re.DOTALL):
        return "an SVG drawing"
    if start.startswith("<?xml"):
        return "an XML file"
    if re.match(r'[{\[]\s*("|\{|\[|\]|\})', start):
        return "a JSON file"
    # Other encodings are not told from binary data; the last character may be incomplete.
    return None if "\ufffd" in text[:-3] else "a text file"
