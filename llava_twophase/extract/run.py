"""Phase one's run, from checked flags to a complete cache; reads as the order of its steps.

Rank 0 leads: it makes the plan, writes the manifest and says when all is done. Each rank seals whole shards of its own,
and knows of the others only how far they are (``peers.py``).
"""

from __future__ import annotations

import argparse
import logging
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llava_twophase.cache.check.duplicates import describe_duplicate_images
from llava_twophase.cache.format import QUANTISED, QUARANTINE
from llava_twophase.cache.manifest import Manifest, read_manifest, write_manifest
from llava_twophase.cache.quarantine import Quarantined, merge_parts, read_parts, read_quarantine
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.cache.shard_writer import ShardSpec
from llava_twophase.distributed import Ranks
from llava_twophase.errors import UserError, combined_error
from llava_twophase.extract.break_even import compute_break_even, llm_config, measure_step
from llava_twophase.extract.calibrate import measure_channels, measure_rates
from llava_twophase.extract.decode import find_bad, still_bad
from llava_twophase.extract.pipeline import Options, extract
from llava_twophase.extract.plan import Plan, make_plan, sealed_shards, shard_path
from llava_twophase.extract.progress import Progress
from llava_twophase.extract.ranks import Peers
from llava_twophase.extract.report import report_plan
from llava_twophase.extract.target import existing_manifest, explain_disk_errors, locked, remove_work_files
from llava_twophase.extract.timings import Timings
from llava_twophase.extract.tower import fingerprint_of, load_tower, plain_codec, provenance, require_same, shard_spec
from llava_twophase.files import require_free_space, require_writable
from llava_twophase.records import Record
from llava_twophase.vision.images import Images, open_images
from llava_twophase.vision.tower import VisionTower

logger = logging.getLogger(__name__)

# How long a shard that another rank sealed may take to show itself on a network filesystem.
_VISIBLE_SECONDS = 120.0


@dataclass(frozen=True)
class Job:
    """What the flags came to, before the tower is loaded."""

    args: argparse.Namespace
    peers: Peers
    records: list[str]
    images: Images
    cache: Path

    @property
    def keys(self) -> list[str]:
        """Image keys, each once, in the order of their first record."""
        return list(dict.fromkeys(self.records))

    @property
    def options(self) -> Options:
        """How this rank works."""
        return Options(self.args.batch_size, self.args.num_workers, self.args.on_bad_image == "skip")


def run(args: argparse.Namespace, records: Sequence[Record], ranks: Ranks) -> int:
    """Extract what is missing, or with ``--plan`` say what that is.

    Args:
        args: The command's flags; ``compute`` and ``storage`` hold the long names of the dtypes.
        records: Records of the data file.
        ranks: This process among the run's.

    Returns:
        0 done; 1 with ``--plan`` where the work cannot be done as it is.

    Raises:
        UserError: Something that the user can mend.
    """
    if args.plan:
        return _show_plan(_job(args, records, Peers(Ranks()))) if ranks.is_main else 0
    with Peers(ranks) as peers:
        job = _job(args, records, peers)
        with explain_disk_errors(job.cache), ExitStack() as stack:
            return _lead(job, stack) if ranks.is_main else _follow(job)


def _job(args: argparse.Namespace, records: Sequence[Record], peers: Peers) -> Job:
    return Job(
        args, peers, [record.image for record in records], open_images(args.image_folder), Path(args.feature_cache)
    )


def _show_plan(job: Job) -> int:
    args = job.args
    llm = llm_config(args.llm) if args.llm else None
    manifest = existing_manifest(job.cache)
    plan = _make_plan(job, manifest)
    missing = job.images.missing(plan.keys)
    bad = _find_bad(job, plan.keys, missing)
    tower = load_tower(args, job.peers.ranks)
    if manifest is not None:
        require_same(job.cache, manifest, fingerprint_of(tower, args))
    codec = plain_codec(tower, args.storage)
    # Measured on images to encode; without any, the break-even is measured on the images of the records.
    tried = plan.keys if plan.work else job.keys if llm else []
    rates = measure_rates(job.images, tower, codec, tried, args.batch_size, args.num_workers) if tried else None
    break_even = None
    if llm is not None and rates is not None:
        break_even = compute_break_even(
            llm=args.llm,
            runs=args.runs or 3,
            samples=len(job.records),
            to_encode=len(plan.keys),
            step_seconds=measure_step(llm, tower.feature_shape[0], tower.device),
            rates=rates,
            row_bytes=codec.row_bytes,
        )
    elif llm is not None:
        logger.warning("--llm: none of the first %d images can be used, so nothing was measured", args.batch_size)
    rate = rates.extraction if rates else None
    report = report_plan(job.records, plan, bad, len(missing), codec.row_bytes, job.cache, rate, break_even)
    print(report.json() if args.json else report.text())
    return 0 if report.fits and (args.on_bad_image == "skip" or not bad) else 1


def _lead(job: Job, stack: ExitStack) -> int:
    args, cache = job.args, job.cache
    manifest = existing_manifest(cache)
    plan = _make_plan(job, manifest)
    nothing_to_do = manifest is not None and manifest.complete and not plan.work and plan.sealed == manifest.shards
    if not nothing_to_do:
        require_writable(cache, "--feature_cache")
    _refuse_bad(job, plan)
    tower = load_tower(args, job.peers.ranks)
    fingerprint = fingerprint_of(tower, args)
    if manifest is not None:
        require_same(cache, manifest, fingerprint)
    if nothing_to_do:
        assert manifest is not None
        job.peers.tell("plan", None)
        logger.info("%s: all %d images are cached, nothing to do", cache, plan.cached)
        _log_left_out(plan.left_out)
        return 0
    stack.enter_context(locked(cache))
    if manifest is None:
        manifest = Manifest(fingerprint, provenance(args), args.images_per_shard)
    if args.storage in QUANTISED and not manifest.channels:
        # Once for a cache: other ranks and later runs take them from the manifest.
        channels, named = measure_channels(job.images, tower, job.keys, args.batch_size, args.num_workers)
        manifest.channels, manifest.fingerprint = channels.to_json(), {**fingerprint, "channels": named}
    spec = shard_spec(tower, manifest)
    require_free_space(
        cache,
        len(plan.keys) * spec.row_bytes,
        what="the features to extract",
        advice="free some space, give another --feature_cache, or halve the features with --storage_dtype int8",
    )
    _begin(cache, manifest, plan)
    job.peers.tell("plan", {"digest": plan.digest, "numbers": [shard.number for shard in plan.work]})
    logger.info(
        "%s: %d images cached, %d to encode into %d shards of %s, %.3f GB",
        cache, plan.cached, len(plan.keys), len(plan.work), spec.storage_dtype, len(plan.keys) * spec.row_bytes / 1e9,
    )  # fmt: skip
    _work(job, manifest, plan, tower, spec)
    return 0


def _follow(job: Job) -> int:
    args, cache = job.args, job.cache
    tower = load_tower(args, job.peers.ranks)
    told = job.peers.hear("plan")
    if told is None:
        return 0
    manifest = read_manifest(cache)
    require_same(cache, manifest, fingerprint_of(tower, args))
    plan = _make_plan(job, manifest)
    if plan.digest != told["digest"]:
        raise UserError(
            f"rank {job.peers.ranks.rank} plans other work than rank 0: give all ranks the same flags, and the same "
            f"{args.data_path}, {args.image_folder} and {cache}"
        )
    position = {number: position for position, number in enumerate(told["numbers"])}
    mine = [shard for shard in plan.work if job.peers.ranks.owns(position.get(shard.number, -1))]
    done: Counter[str] = Counter()
    for step in extract(cache, mine, job.images, tower, shard_spec(tower, manifest), job.options, Timings()):
        done.update(images=step.images, quarantined=step.bad, high_bit_depth=step.high_bit_depth)
        job.peers.publish(done.copy())
        job.peers.check()
    job.peers.tell(f"done/{job.peers.ranks.rank}", done)
    job.peers.hear("finished")
    return 0


def _work(job: Job, manifest: Manifest, plan: Plan, tower: VisionTower, spec: ShardSpec) -> None:
    cache, peers, timings = job.cache, job.peers, Timings()
    mine = [shard for position, shard in enumerate(plan.work) if peers.ranks.owns(position)]
    done: Counter[str] = Counter()
    started = time.perf_counter()
    with Progress(len(plan.keys), spec.row_bytes) as progress:
        for step in extract(cache, mine, job.images, tower, spec, job.options, timings):
            done.update(images=step.images, quarantined=step.bad, high_bit_depth=step.high_bit_depth)
            peers.publish(done.copy())
            peers.check()
            progress.show(peers.total())
            if step.sealed:
                manifest.shards = sealed_shards(cache, manifest, manifest.shards)
                write_manifest(cache, manifest)
        for rank in range(1, peers.ranks.world_size):
            done.update(peers.hear(f"done/{rank}", lambda: progress.show(peers.total())))
        progress.show(done)
    _finish(job, manifest, plan)
    seconds = time.perf_counter() - started
    peers.tell("finished", True)
    rate = len(plan.keys) / max(seconds, 1e-9)
    logger.info(
        "%s: complete, %d images in %d shards (%.1f images/s)", cache, manifest.rows, len(manifest.shards), rate
    )
    logger.info("%s%s", "" if peers.ranks.world_size == 1 else "rank 0: ", timings.describe())
    if done["high_bit_depth"]:
        logger.warning(
            "%d images have more than 8 bits per channel; their values are clipped, as in LLaVA", done["high_bit_depth"]
        )
    _log_left_out(list(read_quarantine(cache).values()))
    duplicates = describe_duplicate_images(FeatureCache(cache))
    if duplicates is not None:
        logger.warning("%s", duplicates)


def _begin(cache: Path, manifest: Manifest, plan: Plan) -> None:
    remove_work_files(cache)
    if not plan.goes_on:
        merge_parts(cache, plan.keys)
    manifest.complete = False
    if plan.work or not manifest.plan:  # else a run was cut when all but the last lines of it were written
        manifest.plan = {"first_shard": plan.first_shard, "digest": plan.digest}
    manifest.shards = plan.sealed
    write_manifest(cache, manifest)


def _finish(job: Job, manifest: Manifest, plan: Plan) -> None:
    cache = job.cache
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while True:
        parts = read_parts(cache)
        lost = [
            shard for shard in plan.work
            if not shard_path(cache, shard.number).is_file()
            and not parts.get(shard_path(cache, shard.number).name, {}).keys() >= set(shard.keys)
        ]  # fmt: skip
        if not lost:
            break
        if time.monotonic() > deadline:
            raise UserError(f"shard {lost[0].number} was sealed but is not in {cache}: is it one folder for all ranks?")
        time.sleep(0.5)
    manifest.shards = sealed_shards(cache, manifest, manifest.shards)
    merge_parts(cache, plan.keys)
    if not manifest.rows:
        raise UserError(f"not one image could be used: {cache / QUARANTINE} says why")
    manifest.complete = True
    write_manifest(cache, manifest)


def _make_plan(job: Job, manifest: Manifest | None) -> Plan:
    return make_plan(job.cache, manifest, job.keys, job.args.images_per_shard, partial(still_bad, job.images))


def _refuse_bad(job: Job, plan: Plan) -> None:
    missing = job.images.missing(plan.keys)
    where = f"--image_folder {job.args.image_folder}"
    if missing and len(missing) == len(job.keys):
        raise combined_error(missing, f"none of the records' {len(missing)} images is in {where}; is it the right one?")
    if job.options.skip_bad:
        return
    bad = [*plan.left_out, *_find_bad(job, plan.keys, missing)]
    if bad:
        raise combined_error(
            [f"{entry.key}: {entry.reason}" for entry in bad],
            f"{len(bad)} of {len(job.keys)} images in {where} cannot be used ({len(missing)} are missing); mend them, "
            "remove their records, or leave them out with --on_bad_image skip",
        )


def _find_bad(job: Job, keys: Sequence[str], missing: Sequence[str]) -> list[Quarantined]:
    gone = set(missing)
    there = [key for key in keys if key not in gone]
    return [
        *(Quarantined(key, "the file is missing") for key in missing),
        *find_bad(job.images, there, job.args.num_workers),
    ]


def _log_left_out(entries: Sequence[Quarantined]) -> None:
    if entries:
        logger.warning(
            "%d images are quarantined, see %s; the first: %s: %s",
            len(entries),
            QUARANTINE,
            entries[0].key,
            entries[0].reason,
        )
