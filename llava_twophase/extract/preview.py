"""``--plan``: reports the work, the disk space and the time of an extraction, and writes nothing."""

from __future__ import annotations

import logging
from typing import Any

from llava_twophase.cache.codec import Codec
from llava_twophase.cache.session import existing_manifest
from llava_twophase.extract.break_even import BreakEven, compute_break_even, llm_config, measure_step
from llava_twophase.extract.calibrate import Rates, measure_rates
from llava_twophase.extract.plan import Plan
from llava_twophase.extract.preflight import Inputs, find_unusable, plan_extraction
from llava_twophase.extract.report import report_plan
from llava_twophase.extract.tower import load_tower, plain_codec, require_same
from llava_twophase.vision.tower import VisionTower

logger = logging.getLogger(__name__)


def show_plan(inputs: Inputs) -> int:
    """Print what an extraction would do.

    Args:
        inputs: The extraction's inputs.

    Returns:
        0, or 1 if the extraction would fail.

    Raises:
        UserError: The cache was made with different settings, or the tower cannot be loaded.
    """
    config = inputs.config
    llm = llm_config(config.llm) if config.llm else None  # first, because a wrong name is found at once
    manifest = existing_manifest(config.feature_cache)
    plan = plan_extraction(inputs, manifest)
    missing = inputs.images.missing(plan.keys)
    bad = find_unusable(inputs, plan, missing)
    tower = load_tower(config, local_rank=0)
    if manifest is not None:
        require_same(config, manifest, tower)
    codec = plain_codec(tower, config.storage_dtype)
    rates = _measure(inputs, plan, tower, codec)
    break_even = (
        None if llm is None else _break_even(inputs, plan, tower, rates=rates, row_bytes=codec.row_bytes, llm=llm)
    )
    report = report_plan(
        inputs.records,
        plan,
        bad,
        missing=len(missing),
        codec=codec,
        cache=config.feature_cache,
        rate=rates.extraction if rates else None,
        break_even=break_even,
    )
    print(report.json() if config.json else report.text())
    return 0 if report.fits and (config.skip_bad or not report.problems) else 1


def _measure(inputs: Inputs, plan: Plan, tower: VisionTower, codec: Codec) -> Rates | None:
    # On images to encode; without any, the break-even is measured on the images of the records.
    config = inputs.config
    keys = plan.keys if plan.work else inputs.keys if config.llm else []
    if not keys:
        return None
    return measure_rates(
        inputs.images, tower, codec, keys, batch_size=config.batch_size, num_workers=config.num_workers
    )


def _break_even(
    inputs: Inputs, plan: Plan, tower: VisionTower, rates: Rates | None, row_bytes: int, llm: Any
) -> BreakEven | None:
    config = inputs.config
    assert config.llm is not None
    if rates is None:
        logger.warning("--llm: none of the first %d images can be used, so nothing was measured", config.batch_size)
        return None
    return compute_break_even(
        llm=config.llm,
        runs=config.runs,
        samples=len(inputs.records),
        to_encode=len(plan.keys),
        step_seconds=measure_step(llm, tower.feature_shape[0], tower.device),
        rates=rates,
        row_bytes=row_bytes,
    )
