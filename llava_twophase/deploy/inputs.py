"""Images for captions and reports: files, folders, archives and records of a command line, and their thumbnails."""

from __future__ import annotations

import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from llava_twophase.deploy.image_features import read_image_file
from llava_twophase.errors import UserError
from llava_twophase.records import image_keys, load_records
from llava_twophase.vision.images import BadImage, decode
from llava_twophase.vision.sources import ImageSource, open_images

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".jp2")
_ARCHIVES = (".zip", ".tar")
_RECORDS = (".json", ".jsonl", ".parquet")
_THUMBNAIL = 224


@dataclass(frozen=True)
class NamedImage:
    """One image to caption.

    Attributes:
        name: What to print: the path as given, or the image key.
        read: Returns the bytes of the file; raises ``UserError`` if it cannot be read.
        exists: Whether there is a file; otherwise the name can only be an image key of the feature cache.
    """

    name: str
    read: Callable[[], bytes]
    exists: bool = True


def is_records(path: str) -> bool:
    """Return whether an argument of ``caption`` is a file of records, by its name."""
    return Path(path).suffix.lower() in _RECORDS


def list_images(paths: Sequence[str], image_folder: str | None = None) -> list[NamedImage]:
    """Expand the arguments of ``caption``.

    Args:
        paths: Image files, folders, ``.zip`` or ``.tar`` archives, or ``.json``, ``.jsonl`` or ``.parquet`` records.
        image_folder: Folder or archive of the records' images.

    Returns:
        The images, files of a folder or archive in the order of their names.

    Raises:
        UserError: A folder or archive has no images, or cannot be read.
    """
    return [image for path in paths for image in _expand(path, image_folder)]


def thumbnail(read: Callable[[], bytes]) -> list[tuple[str, Image.Image]]:
    """Return the panels of a page's card: a small picture, or none if the image cannot be used.

    Args:
        read: Returns the bytes of the image file.
    """
    try:
        picture = decode(read())
    except (UserError, BadImage):
        return []
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return [("image", picture)]


def _expand(path: str, image_folder: str | None) -> Iterator[NamedImage]:
    given = Path(path)
    if is_records(path):
        images = open_images(image_folder) if image_folder else None
        for key in image_keys(load_records(given, image_folder=image_folder)):
            yield NamedImage(key, _reader(images, key), exists=images is not None)
    elif given.is_dir() or (given.suffix.lower() in _ARCHIVES and given.exists()):
        images = open_images(given)
        names = [name for name in _names(given) if name.lower().endswith(IMAGE_SUFFIXES)]
        if not names:
            raise UserError(f"{path} has no images; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
        for name in sorted(names):
            yield NamedImage(f"{path}/{name}", _reader(images, name))
    else:
        yield NamedImage(path, lambda: _read_file(given), os.path.lexists(path))


def _names(path: Path) -> list[str]:
    if path.is_dir():
        return [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    if zipfile.is_zipfile(path) and path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    with tarfile.open(path, "r:") as archive:
        return archive.getnames()


def _reader(images: ImageSource | None, key: str) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            if images is None:
                raise BadImage("there is no --image_folder")
            return images.read(key)
        except BadImage as error:
            raise UserError(f"image {key}: {error}") from None

    return read


def _read_file(path: Path) -> bytes:
    try:
        return read_image_file(path)
    except BadImage as error:
        raise UserError(f"{path}: {error}") from None
