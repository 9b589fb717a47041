"""What an extraction checks before it loads the tower: its plan, and which images cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial

from llava_twophase.cache.manifest import Manifest
from llava_twophase.cache.quarantine import Quarantined
from llava_twophase.errors import combined_error
from llava_twophase.extract.config import ExtractConfig
from llava_twophase.extract.decode import find_bad, still_bad
from llava_twophase.extract.inputs import refuse_if_all_missing
from llava_twophase.extract.plan import Plan, make_plan
from llava_twophase.records import Records
from llava_twophase.text import counted
from llava_twophase.vision.sources import ImageSource, open_images


@dataclass(frozen=True)
class Inputs:
    """An extraction's settings, records and images.

    Attributes:
        config: The settings.
        records: The image key of each record.
        images: The source of image files.
    """

    config: ExtractConfig
    records: list[str]
    images: ImageSource

    @cached_property
    def keys(self) -> list[str]:
        """Image keys, each once, in the order of their first record."""
        return list(dict.fromkeys(self.records))


def open_inputs(config: ExtractConfig, records: Records) -> Inputs:
    """Open the images of the records.

    Raises:
        UserError: ``--image_folder`` is neither a folder nor an archive.
    """
    keys = list(records.images)
    return Inputs(config, keys, open_images(config.image_folder, keys))


def plan_extraction(inputs: Inputs, manifest: Manifest | None) -> Plan:
    """Plan which images to encode; nothing is written.

    Args:
        inputs: The extraction's inputs.
        manifest: The manifest of the cache; None for a new one.
    """
    config = inputs.config
    return make_plan(
        config.feature_cache, manifest, inputs.keys, config.images_per_shard, partial(still_bad, inputs.images)
    )


def find_unusable(inputs: Inputs, plan: Plan, missing: Mapping[str, str]) -> list[Quarantined]:
    """Find the images of a plan that cannot be used, judged by the first bytes of each file.

    Args:
        inputs: The extraction's inputs.
        plan: The plan.
        missing: Its images without a file, with a reason for each.

    Returns:
        The missing images, then the others.
    """
    present = [key for key in plan.keys if key not in missing]
    return [
        *(Quarantined(key, reason) for key, reason in missing.items()),
        *find_bad(inputs.images, present, inputs.config.num_workers),
    ]


def require_usable(inputs: Inputs, plan: Plan) -> None:
    """Check the images of a plan.

    Raises:
        UserError: No image of the records exists; or images cannot be used, and they are not to be skipped.
    """
    missing = inputs.images.missing(plan.keys)
    refuse_if_all_missing(missing, inputs.keys, inputs.config.image_folder)
    if inputs.config.skip_bad:
        return
    bad = [*plan.quarantined, *find_unusable(inputs, plan, missing)]
    if bad:
        raise combined_error(
            [f"{entry.key}: {entry.reason}" for entry in bad],
            f"{len(bad)} of {counted(len(inputs.keys), 'image')} in --image_folder {inputs.config.image_folder} cannot "
            f"be used ({len(missing)} missing); fix them, remove their records, or skip them with --on_bad_image skip; "
            "the same command with --plan --json lists all of them",
        )
