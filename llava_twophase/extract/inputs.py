"""Load the records of an extraction, and find all problems of the inputs that can be found before torch is needed."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import TypeVar

from llava_twophase.cache.session import existing_manifest
from llava_twophase.cache.storage import is_url
from llava_twophase.errors import UserError, combined_error
from llava_twophase.files import require_writable
from llava_twophase.model_names import require_tower_folder
from llava_twophase.records import Records, image_keys, load_records, records_of
from llava_twophase.vision.sources import open_images

_Result = TypeVar("_Result")


def load_inputs(
    data_path: str | None,
    image_folder: str | None,
    vision_tower: str | None,
    feature_cache: str | None,
    plan: bool,
    other_problems: bool,
) -> tuple[Records, list[str]]:
    """Load the records and check the other inputs. An input that is None is not known and is skipped.

    Args:
        data_path: The records.
        image_folder: The images. An archive is opened, and its images are looked up, only if there are problems:
            the run does both in any case.
        vision_tower: Hub id or folder of the tower.
        feature_cache: The cache's directory.
        plan: Whether the cache will not be written.
        other_problems: Whether the command line has problems already.

    Returns:
        The records, and the problems.
    """
    problems: list[str] = []

    def attempt(check: Callable[[], _Result]) -> _Result | None:
        try:
            return check()
        except UserError as error:
            problems.append(str(error))
            return None

    records = None if data_path is None else attempt(partial(load_records, data_path, image_folder=image_folder))
    if vision_tower is not None:
        attempt(partial(require_tower_folder, vision_tower))
    if feature_cache is not None:
        attempt(partial(_check_cache, feature_cache, plan))
    if image_folder is not None and (problems or other_problems or not Path(image_folder).exists()):
        attempt(partial(_check_images, image_folder, [] if records is None else image_keys(records)))
    return records_of([]) if records is None else records, problems


def refuse_if_all_missing(missing: Collection[str], keys: Collection[str], image_folder: str) -> None:
    """Refuse an image folder that has none of the records' images.

    Args:
        missing: The images that have no file.
        keys: All images of the records.
        image_folder: ``--image_folder``.

    Raises:
        UserError: All images are missing.
    """
    if missing and len(missing) == len(keys):
        count = (
            f"none of the records' {len(keys)} images is" if len(keys) > 1 else "the only image of the records is not"
        )
        raise combined_error(
            missing, f"{count} in --image_folder {image_folder}; give the folder that their paths start from"
        )


def _check_cache(cache: str, plan: bool) -> None:
    if is_url(cache):
        raise UserError(
            f"--feature_cache {cache}: extraction writes to a folder; extract to one on this machine, then run: "
            f"llava-inspect-cache push FOLDER {cache}"
        )
    if existing_manifest(Path(cache)) is None and not plan:
        require_writable(Path(cache), "--feature_cache")


def _check_images(image_folder: str, keys: list[str]) -> None:
    refuse_if_all_missing(open_images(image_folder, keys).missing(keys), keys, image_folder)
