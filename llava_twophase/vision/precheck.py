"""Checks of all image files before any expensive work, without decoding them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch.utils.data import DataLoader, Dataset

from llava_twophase.errors import combined_error
from llava_twophase.text import agree, counted
from llava_twophase.vision.images import BadImage, check_header
from llava_twophase.vision.sources import ImageSource

_FILES_PER_BATCH = 256


class _HeaderDataset(Dataset[list[tuple[str, str]]]):
    # Batches of keys -> keys and reasons of the images that cannot be used.
    def __init__(self, source: ImageSource, keys: Sequence[str]) -> None:
        self._source = source
        self._keys = keys

    def __len__(self) -> int:
        return -(-len(self._keys) // _FILES_PER_BATCH)

    def __getitem__(self, index: int) -> list[tuple[str, str]]:
        bad = []
        for key in self._keys[index * _FILES_PER_BATCH : (index + 1) * _FILES_PER_BATCH]:
            try:
                with self._source.open(key) as file:
                    check_header(file)
            except BadImage as error:
                bad.append((key, str(error)))
        return bad


def find_bad_headers(source: ImageSource, keys: Sequence[str], num_workers: int) -> dict[str, str]:
    """Find images that cannot be used, from the first bytes of each file.

    Args:
        source: The source of image files.
        keys: Image keys.
        num_workers: Worker processes; 0 uses this process.

    Returns:
        Key and reason of each empty or unreadable file, file that is not an image, and image too large to decode, in
        the order of ``keys``. A file that is truncated or damaged further on is found only when it is decoded.
    """
    workers = min(num_workers, len(keys) // (4 * _FILES_PER_BATCH))  # few files are checked before workers start
    if workers:
        source.prepare()
    loader = DataLoader(_HeaderDataset(source, keys), batch_size=None, num_workers=workers)
    return {key: reason for batch in loader for key, reason in batch}


def require_images(source: ImageSource, keys: Iterable[str], where: str | Path, num_workers: int = 0) -> None:
    """Check that every image has a usable file.

    Args:
        source: The source of image files.
        keys: Image keys.
        where: The value of ``--image_folder``.
        num_workers: Worker processes; 0 uses this process.

    Raises:
        UserError: Some images are missing or cannot be used: all of them are counted, the first ones are listed.
    """
    keys = list(dict.fromkeys(keys))
    missing = source.missing(keys)
    bad = find_bad_headers(source, [key for key in keys if key not in missing], num_workers)
    if missing or bad:
        images, verb = counted(len(keys), "image"), agree(len(missing), "is", "are")
        count = f"{len(missing)} of {images} {verb} missing in --image_folder {where}"
        if bad:
            count += f", {len(bad)} cannot be used; fix them or remove their records"
        raise combined_error([f"{key}: {reason}" for key, reason in {**missing, **bad}.items()], count)
