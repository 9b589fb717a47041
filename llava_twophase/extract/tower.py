"""What an extraction is made of: the tower, its fingerprint, and what shards record; knows nothing of plans."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava_twophase import __version__
from llava_twophase.cache.codec import Channels, Codec
from llava_twophase.cache.fingerprint import differences, normalize
from llava_twophase.cache.format import layout
from llava_twophase.cache.manifest import Manifest
from llava_twophase.cache.shard_writer import ShardSpec
from llava_twophase.distributed import Ranks
from llava_twophase.errors import UserError, combined_error
from llava_twophase.vision.preprocess import Preprocessor
from llava_twophase.vision.tower import VisionTower


def load_tower(args: argparse.Namespace, ranks: Ranks) -> VisionTower:
    """Load the tower that the flags name, on this rank's device."""
    device = args.device
    if device == "auto":
        device = f"cuda:{ranks.local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        raise UserError(f"--device {device} cannot be used: {str(error).partition(chr(10))[0]}") from None
    return VisionTower(
        args.vision_tower,
        Preprocessor(args.vision_tower, args.image_aspect_ratio),
        args.mm_vision_select_layer,
        args.mm_vision_select_feature,
        getattr(torch, args.compute),
        device,
    )


def fingerprint_of(tower: VisionTower, args: argparse.Namespace) -> dict[str, Any]:
    """Return everything that changes a stored value, but the channels of int8 and int4."""
    layout(args.storage, 1, tower.feature_shape, 1)  # refuses a width that int4 cannot keep
    return normalize({**tower.fingerprint(), "storage_dtype": args.storage})


def require_same(cache: Path, manifest: Manifest, fingerprint: dict[str, Any]) -> None:
    """Hold a cache against this run's settings.

    Raises:
        UserError: They differ; field by field.
    """
    different = differences(manifest.fingerprint, fingerprint)
    if different:
        raise combined_error(different, f"{cache} was made otherwise; use its settings or another --feature_cache")


def shard_spec(tower: VisionTower, manifest: Manifest) -> ShardSpec:
    """Return what all shards of a cache share."""
    channels = Channels.from_json(manifest.channels) if manifest.channels else None
    storage = manifest.fingerprint["storage_dtype"]
    # The manifest's provenance, not this run's: shards of one cache are equal byte for byte whoever writes them.
    return ShardSpec(tower.feature_shape, storage, manifest.fingerprint, manifest.provenance["software"], channels)


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    """Return what a new cache records of its making."""
    libraries = ("torch", "transformers", "pillow", "numpy", "h5py")
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    return {
        "created": datetime.fromtimestamp(seconds, UTC).isoformat(),
        "command": shlex.join(["llava-extract-features", *sys.argv[1:]]),
        "vision_tower": args.vision_tower,
        "software": {
            "llava-twophase": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in libraries},
            "vision_tower": args.vision_tower,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        },
    }


def plain_codec(tower: VisionTower, storage: str) -> Codec:
    """Return a codec for sizes and times alone: with channels that change nothing."""
    width = tower.feature_shape[1]
    return Codec(storage, tower.feature_shape, Channels(np.zeros(width, "<f4"), np.ones(width, "<f4")))
