"""Phase one's run, from checked settings to a complete cache; reads as the order of its steps.

Rank 0 makes the plan, writes the manifest, and marks the cache complete. Every rank writes the shards that it owns, and
exchanges only its progress with the others.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_twophase.cache.check.duplicates import describe_duplicate_images
from llava_twophase.cache.format import QUANTISED, QUARANTINE
from llava_twophase.cache.manifest import Manifest, read_manifest
from llava_twophase.cache.quarantine import Quarantined, read_parts, read_quarantine
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.cache.session import (
    CacheSession,
    existing_manifest,
    report_software,
    shard_path,
    software_plan,
)
from llava_twophase.distributed import Ranks
from llava_twophase.errors import UserError
from llava_twophase.extract.calibrate import measure_channels
from llava_twophase.extract.config import ExtractConfig
from llava_twophase.extract.pipeline import Options, extract
from llava_twophase.extract.plan import Plan, ShardWork
from llava_twophase.extract.preflight import Inputs, open_inputs, plan_extraction, require_usable
from llava_twophase.extract.preview import show_plan
from llava_twophase.extract.progress import Progress
from llava_twophase.extract.ranks import RankMessages
from llava_twophase.extract.timings import Timings
from llava_twophase.extract.tower import (
    fingerprint_of,
    load_tower,
    plain_codec,
    provenance,
    require_same,
    shard_spec,
    software,
)
from llava_twophase.files import explain_os_errors, require_free_space, require_writable
from llava_twophase.records import Records
from llava_twophase.text import agree, counted, format_bytes
from llava_twophase.vision.tower import VisionTower

logger = logging.getLogger(__name__)

# How long a shard that another rank sealed may take to appear on a network file system.
_VISIBLE_SECONDS = 120.0


@dataclass(frozen=True)
class _Work:
    inputs: Inputs
    messages: RankMessages
    plan: Plan
    tower: VisionTower

    @property
    def cache(self) -> Path:
        return self.inputs.config.feature_cache


def run(config: ExtractConfig, records: Records, ranks: Ranks) -> int:
    """Extract the missing features, or with ``--plan`` report what is missing.

    Args:
        config: The settings.
        records: The records of the data file.
        ranks: This process among the run's.

    Returns:
        0; 1 with ``--plan`` if the extraction would fail.

    Raises:
        UserError: The input, the cache or the disk has a problem that the user can fix.
    """
    if config.plan:
        return show_plan(open_inputs(config, records)) if ranks.is_main else 0

    def advice() -> str:
        return "run the same command again: sealed shards are kept and not extracted again"

    with RankMessages(ranks) as messages, explain_os_errors(config.feature_cache, "--feature_cache", advice):
        inputs = open_inputs(config, records)
        if ranks.is_main:
            _run_rank_0(inputs, messages)
        else:
            _run_other_rank(inputs, messages)
    return 0


def _run_rank_0(inputs: Inputs, messages: RankMessages) -> None:
    config, cache = inputs.config, inputs.config.feature_cache
    manifest = existing_manifest(cache)
    plan = plan_extraction(inputs, manifest)
    finished = manifest is not None and manifest.complete and not plan.work and plan.sealed == manifest.shards
    if not finished:
        require_writable(cache, "--feature_cache")
    require_usable(inputs, plan)
    work = _Work(inputs, messages, plan, load_tower(config, messages.ranks.local_rank))
    if manifest is not None:
        require_same(config, manifest, work.tower)
    if finished:
        messages.send("plan", None)
        verb = agree(plan.cached, "is", "are")
        logger.info("%s: %s %s cached, nothing to do", cache, counted(plan.cached, "image"), verb)
        _report_quarantine(plan.quarantined)
        return
    with CacheSession(cache) as session:
        session.require_unchanged(manifest)
        _begin(session, manifest or _new_manifest(work), work)
        messages.send("plan", {"digest": plan.digest, "numbers": [shard.number for shard in plan.work]})
        started = time.perf_counter()
        timings, done = _extract_as_rank_0(session, work)
        _complete(session, work)
        messages.send("finished", True)
        _report(session.manifest, work, time.perf_counter() - started, timings, done)


def _run_other_rank(inputs: Inputs, messages: RankMessages) -> None:
    config, cache, ranks = inputs.config, inputs.config.feature_cache, messages.ranks
    tower = load_tower(config, ranks.local_rank)
    planned = messages.receive("plan")
    if planned is None:
        return
    manifest = read_manifest(cache)
    require_same(config, manifest, tower)
    plan = plan_extraction(inputs, manifest)
    if plan.digest != planned["digest"]:
        raise UserError(
            f"rank {ranks.rank} plans other work than rank 0: give all ranks the same flags, and the same "
            f"{config.data_path}, {config.image_folder} and {cache}"
        )
    # A shard that rank 0 did not list was sealed before rank 0 made its plan: nobody writes it again.
    position = {number: position for position, number in enumerate(planned["numbers"])}
    mine = [shard for shard in plan.work if shard.number in position and ranks.owns(position[shard.number])]
    done: Counter[str] = Counter()
    for step in extract(
        cache,
        mine,
        inputs.images,
        tower,
        spec=shard_spec(tower, manifest),
        options=_options(config),
        timings=Timings(),
    ):
        done.update(images=step.images, quarantined=step.bad, high_bit_depth=step.high_bit_depth)
        messages.report_progress(done.copy())
        messages.raise_if_stopped()
    messages.send(f"done/{ranks.rank}", done)
    messages.receive("finished")


def _new_manifest(work: _Work) -> Manifest:
    config = work.inputs.config
    fingerprint = fingerprint_of(work.tower, config.storage_dtype)
    channels_json: dict[str, str] = {}
    if config.storage_dtype in QUANTISED:
        # Measured once for a cache: other ranks and later runs read them from the manifest.
        channels, described = measure_channels(
            work.inputs.images, work.tower, work.inputs.keys, config.batch_size, config.num_workers
        )
        channels_json, fingerprint = channels.to_json(), {**fingerprint, "channels": described}
    return Manifest(fingerprint, provenance(config), config.images_per_shard, channels=channels_json)


def _begin(session: CacheSession, manifest: Manifest, work: _Work) -> None:
    plan, config = work.plan, work.inputs.config
    size = len(plan.keys) * plain_codec(work.tower, config.storage_dtype).row_bytes
    require_free_space(
        work.cache,
        size,
        what="the features to extract",
        advice="free some space, give another --feature_cache, or halve the features with --storage_dtype int8",
    )
    # Compared by content: the tower's weights are the same, however its name is spelt.
    recorded = manifest.software
    current = {**software(config.vision_tower), "vision_tower": recorded.get("vision_tower", config.vision_tower)}
    if plan.work:
        report_software(manifest, current, resumed=plan.resumes)
    if not plan.resumes:
        session.merge_quarantine(plan.keys)
    new_plan = manifest.plan
    if plan.work or not manifest.plan:  # without work, the interrupted run had written everything but its last lines
        used = recorded if plan.resumes else current
        new_plan = {"first_shard": plan.first_shard, "digest": plan.digest, **software_plan(manifest, used)}
    session.begin(manifest, plan.sealed, new_plan)
    logger.info(
        "%s: %s cached, %d to encode into %s of %s, %s",
        work.cache, counted(plan.cached, "image"), len(plan.keys), counted(len(plan.work), "shard"),
        config.storage_dtype, format_bytes(size),
    )  # fmt: skip


def _extract_as_rank_0(session: CacheSession, work: _Work) -> tuple[Timings, Counter[str]]:
    messages, timings, spec = work.messages, Timings(), shard_spec(work.tower, session.manifest)
    mine = [shard for position, shard in enumerate(work.plan.work) if messages.ranks.owns(position)]
    options, images = _options(work.inputs.config), work.inputs.images
    done: Counter[str] = Counter()
    with Progress(len(work.plan.keys), spec.row_bytes) as progress:
        for step in extract(work.cache, mine, images, work.tower, spec=spec, options=options, timings=timings):
            done.update(images=step.images, quarantined=step.bad, high_bit_depth=step.high_bit_depth)
            messages.report_progress(done.copy())
            messages.raise_if_stopped()
            progress.show(messages.total_progress())
            if step.sealed:
                session.update_sometimes()
        for rank in range(1, messages.ranks.world_size):
            done.update(messages.receive(f"done/{rank}", lambda: progress.show(messages.total_progress())))
        progress.show(done)
    return timings, done


def _complete(session: CacheSession, work: _Work) -> None:
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while invisible := _invisible(work.cache, work.plan.work):
        if time.monotonic() > deadline:
            raise UserError(
                f"shard {invisible[0].number} was sealed but is not in {work.cache}; all ranks must write to one folder"
            )
        time.sleep(0.5)
    session.update()
    session.merge_quarantine(work.plan.keys)
    if not session.manifest.rows:
        raise UserError(f"no image could be used; see {work.cache / QUARANTINE} for the reasons")
    session.complete()


def _invisible(cache: Path, shards: Sequence[ShardWork]) -> list[ShardWork]:
    # Shards that have neither a file nor, if none of their images can be used, a complete part of the quarantine.
    parts = read_parts(cache)
    return [
        shard
        for shard in shards
        if not (path := shard_path(cache, shard.number)).is_file()
        and not parts.get(path.name, {}).keys() >= set(shard.keys)
    ]


def _options(config: ExtractConfig) -> Options:
    return Options(config.batch_size, config.num_workers, config.skip_bad)


def _report(manifest: Manifest, work: _Work, seconds: float, timings: Timings, done: Counter[str]) -> None:
    rate = len(work.plan.keys) / max(seconds, 1e-9)
    logger.info(
        "%s: complete, %s in %s (%.1f images/s)",
        work.cache, counted(manifest.rows, "image"), counted(len(manifest.shards), "shard"), rate,
    )  # fmt: skip
    described = timings.describe("--num_workers" if work.inputs.config.num_workers else None)
    logger.info("%s%s", "" if work.messages.ranks.world_size == 1 else "rank 0: ", described)
    if done["high_bit_depth"]:
        logger.warning(
            "values of %s with more than 8 bits per channel were clipped, as in LLaVA",
            counted(done["high_bit_depth"], "image"),
        )
    _report_quarantine(list(read_quarantine(work.cache).values()))
    duplicates = describe_duplicate_images(FeatureCache(work.cache))
    if duplicates is not None:
        logger.warning("%s", duplicates)


def _report_quarantine(entries: Sequence[Quarantined]) -> None:
    if entries:
        first = entries[0]
        logger.warning(
            "%s quarantined, see %s; the first: %s: %s",
            counted(len(entries), "image"),
            QUARANTINE,
            first.key,
            first.reason,
        )
