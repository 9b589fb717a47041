"""Loads the tower of an extraction, and describes what its features are made from: fingerprint and provenance."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from llava_twophase import __version__
from llava_twophase.cache.codec import Channels, Codec
from llava_twophase.cache.fingerprint import differences, normalize
from llava_twophase.cache.format import layout
from llava_twophase.cache.manifest import Manifest
from llava_twophase.cache.shard_writer import ShardSpec
from llava_twophase.devices import choose_device
from llava_twophase.errors import combined_error
from llava_twophase.extract.config import ExtractConfig
from llava_twophase.vision.preprocess import Preprocessor
from llava_twophase.vision.tower import VisionTower


def load_tower(config: ExtractConfig, local_rank: int) -> VisionTower:
    """Load the tower on this rank's device.

    Args:
        config: The extraction's settings.
        local_rank: This rank's number on its node, which chooses the GPU under ``--device auto``.

    Raises:
        UserError: The tower cannot be loaded, or the device cannot be used.
    """
    device = choose_device(config.device, local_rank)
    return VisionTower(
        config.vision_tower,
        Preprocessor(config.vision_tower, config.image_aspect_ratio, config.s2_scales),
        select_layer=config.select_layer,
        select_feature=config.select_feature,
        dtype=getattr(torch, config.compute_dtype),
        device=device,
    )


def fingerprint_of(tower: VisionTower, storage_dtype: str) -> dict[str, Any]:
    """Return everything that changes a stored value, except the channels of int8 and int4."""
    layout(storage_dtype, 1, tower.feature_shape, 1)  # refuses a width that int4 cannot store
    return normalize({**tower.fingerprint(), "storage_dtype": storage_dtype})


def require_same(config: ExtractConfig, manifest: Manifest, tower: VisionTower) -> None:
    """Compare a cache with this run's settings. The tower's weights are compared, not the name that it was given by.

    Raises:
        UserError: They differ; field by field.
    """
    different = differences(manifest.fingerprint, fingerprint_of(tower, config.storage_dtype))
    if any(line.startswith(("select_layer: ", "compute_dtype: ")) for line in different):
        # The hash covers the layers up to select_layer in the compute dtype: it differs for the same tower.
        different = [line for line in different if not line.startswith("tower.weights_sha256: ")]
    if different:
        raise combined_error(
            different,
            f"{config.feature_cache} was made with different settings; use its settings or another --feature_cache",
        )


def shard_spec(tower: VisionTower, manifest: Manifest) -> ShardSpec:
    """Return what all shards of a plan share.

    The software is the manifest's, not this run's, so that a plan's shards are equal byte for byte whichever rank or
    resumed run writes them.
    """
    return ShardSpec(
        tower.feature_shape,
        manifest.fingerprint["storage_dtype"],
        fingerprint=manifest.fingerprint,
        provenance=manifest.software,
        channels=Channels.from_json(manifest.channels) if manifest.channels else None,
    )


def provenance(config: ExtractConfig) -> dict[str, Any]:
    """Return what a new cache records about its making."""
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    return {
        "created": datetime.fromtimestamp(seconds, UTC).isoformat(),
        "command": shlex.join(["llava-extract-features", *sys.argv[1:]]),
        "vision_tower": config.vision_tower,
        "software": software(config.vision_tower),
    }


def software(vision_tower: str) -> dict[str, Any]:
    """Return the versions, the tower's name and the device that shards record.

    Args:
        vision_tower: The name of the tower.
    """
    libraries = ("torch", "transformers", "pillow", "numpy", "h5py")
    return {
        "llava-twophase": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in libraries},
        "vision_tower": vision_tower,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    }


def plain_codec(tower: VisionTower, storage: str) -> Codec:
    """Return a codec for measuring sizes and times; its channels change no value."""
    width = tower.feature_shape[1]
    return Codec(storage, tower.feature_shape, Channels(np.zeros(width, "<f4"), np.ones(width, "<f4")))
