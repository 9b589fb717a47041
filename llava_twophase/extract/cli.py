"""Command 1, phase one: images to a feature cache. Flags and their order of checks; the loop is in ``pipeline.py``."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llava_twophase import __version__
from llava_twophase.cache.fingerprint import differences, normalize
from llava_twophase.cache.format import MANIFEST, QUANTISED, SHARDS, layout
from llava_twophase.cache.manifest import Manifest, read_manifest, write_manifest
from llava_twophase.distributed import Ranks, ranks_from_environment
from llava_twophase.errors import UserError, run_command
from llava_twophase.extract.plan import Plan, make_plan, require_space, sealed_shards
from llava_twophase.records import image_keys, load_records

logger = logging.getLogger(__name__)

COMPUTE_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
STORAGE_DTYPES = {**COMPUTE_DTYPES, "int8": "int8", "int4": "int4"}
_WAIT_SECONDS = 600

_EXAMPLE = """\
example:
  llava-extract-features \\
      --data_path playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json \\
      --image_folder playground/data/LLaVA-Pretrain/images \\
      --vision_tower openai/clip-vit-large-patch14-336 --feature_cache caches/clip-l-336
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; ``sys.argv`` by default.

    Returns:
        0 done, 1 a problem was found, 2 wrong usage (raised by argparse), 130 interrupted.
    """
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return run_command(lambda: _run(args))


def build_parser() -> argparse.ArgumentParser:
    """Return the command's argument parser."""
    parser = argparse.ArgumentParser(
        prog="llava-extract-features",
        description="Phase one: run the vision tower once over the images and keep its patch features on disk. "
        "Run it again to go on after a kill, or to add the images of new records.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data_path", required=True, help="records, LLaVA's JSON list or JSON lines")
    add("--image_folder", required=True, help="folder that the records' image paths are relative to")
    add("--vision_tower", required=True, help="CLIP, SigLIP or DINOv2 tower: hub id or local folder")
    add("--feature_cache", required=True, help="folder of the cache, made where absent, continued where present")
    add("--mm_vision_select_layer", type=int, default=-2, help="hidden state to keep (default: -2, the last but one)")
    add("--mm_vision_select_feature", choices=("patch", "cls_patch"), default="patch", help="patch drops the CLS token")
    add("--image_aspect_ratio", choices=("square", "pad"), default="square", help="as in LLaVA (default: square)")
    add("--compute_dtype", choices=tuple(COMPUTE_DTYPES), default="bf16", help="of the tower (default: bf16)")
    add(
        "--storage_dtype",
        choices=("auto", *STORAGE_DTYPES),
        default="auto",
        help="of the cache: the compute dtype, exactly (auto), or int8 or int4, half and 28 %% of bf16's size",
    )
    add("--batch_size", type=_positive, default=32, help="images of one forward pass (default: 32)")
    add("--num_workers", type=int, default=min(8, os.cpu_count() or 1), help="decoding processes (default: one a core)")
    add("--images_per_shard", type=_positive, default=1024, help="rows of one HDF5 file (default: 1024)")
    add("--device", default="auto", help="auto (default: this rank's GPU, else the CPU), cpu, cuda, cuda:1, ...")
    return parser


def storage_dtype(compute: str, storage: str) -> str:
    """Choose the storage dtype.

    Args:
        compute: ``--compute_dtype``.
        storage: ``--storage_dtype``.

    Returns:
        Its long name.

    Raises:
        UserError: It would round what the tower computed, without int8's and int4's scales.
    """
    if storage in ("auto", compute) or storage in QUANTISED or storage == "fp32":
        return STORAGE_DTYPES[compute if storage == "auto" else storage]
    raise UserError(
        f"--storage_dtype {storage} cannot hold {compute} features exactly; use --compute_dtype {storage}, or "
        f"--storage_dtype {compute}, or int8 for half the size"
    )


def _run(args: argparse.Namespace) -> int:
    ranks = ranks_from_environment()
    storage = storage_dtype(args.compute_dtype, args.storage_dtype)
    keys = image_keys(load_records(args.data_path))

    # torch is imported only now, so that --help and bad records answer at once.
    from llava_twophase.vision.images import ImageFolder
    from llava_twophase.vision.preprocess import Preprocessor

    images = ImageFolder(args.image_folder)
    images.require(keys)
    preprocessor = Preprocessor(args.vision_tower, args.image_aspect_ratio)
    tower = _load_tower(args, preprocessor, ranks)
    cache = Path(args.feature_cache)
    fingerprint = normalize({**tower.fingerprint(), "storage_dtype": storage})
    manifest = _open_cache(cache, args, fingerprint, ranks)
    layout(storage, 1, tower.feature_shape, 1)  # refuses a width that int4 cannot keep
    if storage in QUANTISED and not manifest.channels:
        from llava_twophase.extract.channels import measure_channels

        # Once for a cache: other ranks and later runs take them from the manifest.
        channels, named = measure_channels(images, tower, keys, args.batch_size, args.num_workers)
        manifest.channels, manifest.fingerprint = channels.to_json(), {**fingerprint, "channels": named}
    plan = make_plan(cache, manifest, keys, args.images_per_shard)
    if not plan.work and manifest.complete:
        logger.info("%s: all %d images are cached, nothing to do", cache, len(keys))
        return 0
    _work(cache, manifest, plan, images, tower, args, ranks)
    return 0


def _work(cache: Path, manifest: Manifest, plan: Plan, images: Any, tower: Any, args: Any, ranks: Ranks) -> None:
    from llava_twophase.cache.codec import Channels
    from llava_twophase.cache.writer import ShardSpec
    from llava_twophase.extract.pipeline import extract

    storage = manifest.fingerprint["storage_dtype"]
    channels = Channels.from_json(manifest.channels) if manifest.channels else None
    # The manifest's provenance, not this run's: shards of one cache are equal byte for byte whoever writes them.
    spec = ShardSpec(tower.feature_shape, storage, manifest.fingerprint, manifest.provenance["software"], channels)
    require_space(cache, plan.images * spec.row_bytes)
    if ranks.is_main:
        manifest.complete, manifest.plan = False, {"first_shard": plan.first_shard, "digest": plan.digest}
        manifest.shards = sealed_shards(cache, manifest)
        write_manifest(cache, manifest)
    else:
        _wait_for(lambda: _has_plan(cache, plan), f"rank 0's plan in {cache / MANIFEST}")
    logger.info("%s: %d images cached, %d to encode into %d shards", cache, plan.cached, plan.images, len(plan.work))
    mine = [shard for position, shard in enumerate(plan.work) if ranks.owns(position)]
    started = time.perf_counter()
    for _ in extract(cache, mine, images, tower, spec, args.batch_size, args.num_workers):
        if ranks.is_main:
            manifest.shards = sealed_shards(cache, manifest)
            write_manifest(cache, manifest)
    if ranks.is_main:
        _finish(cache, manifest, plan)
        seconds = time.perf_counter() - started
        logger.info("%s: complete, %d images (%.1f images/s)", cache, manifest.rows, plan.images / max(seconds, 1e-9))


def _finish(cache: Path, manifest: Manifest, plan: Plan) -> None:
    wanted = [cache / SHARDS / f"shard-{shard.number:06d}.h5" for shard in plan.work]
    _wait_for(lambda: all(path.is_file() for path in wanted), "the other ranks' shards")
    manifest.shards, manifest.plan, manifest.complete = sealed_shards(cache, manifest), {}, True
    write_manifest(cache, manifest)


def _load_tower(args: argparse.Namespace, preprocessor: Any, ranks: Ranks) -> Any:
    import torch

    from llava_twophase.vision.tower import VisionTower

    device = args.device
    if device == "auto":
        device = f"cuda:{ranks.local_rank}" if torch.cuda.is_available() else "cpu"
    return VisionTower(
        args.vision_tower,
        preprocessor,
        args.mm_vision_select_layer,
        args.mm_vision_select_feature,
        getattr(torch, COMPUTE_DTYPES[args.compute_dtype]),
        device,
    )


def _open_cache(cache: Path, args: argparse.Namespace, fingerprint: dict[str, Any], ranks: Ranks) -> Manifest:
    if not ranks.is_main:
        _wait_for(lambda: (cache / MANIFEST).is_file(), f"rank 0 to make {cache / MANIFEST}")
    if (cache / MANIFEST).is_file():
        manifest = read_manifest(cache)
        different = differences(manifest.fingerprint, fingerprint)
        if different:
            raise UserError(
                "\n  ".join([f"{cache} was made otherwise; use its settings or another --feature_cache:", *different])
            )
        return manifest
    if cache.exists() and (not cache.is_dir() or any(path.name != SHARDS for path in cache.iterdir())):
        raise UserError(f"--feature_cache {cache} exists and is no feature cache; give a new or empty folder")
    (cache / SHARDS).mkdir(parents=True, exist_ok=True)
    return Manifest(fingerprint, _provenance(args), args.images_per_shard)


def _provenance(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    libraries = ("torch", "transformers", "pillow", "numpy", "h5py")
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    return {
        "created": datetime.fromtimestamp(seconds, timezone.utc).isoformat(),
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


def _has_plan(cache: Path, plan: Plan) -> bool:
    return (cache / MANIFEST).is_file() and read_manifest(cache).plan.get("digest") == plan.digest


def _wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + _WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise UserError(f"waited {_WAIT_SECONDS} s in vain for {what}; did another rank fail?")
        time.sleep(0.2)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value
