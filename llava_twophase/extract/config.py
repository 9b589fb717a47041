"""The settings of an extraction, as ``cli.py`` makes them from the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava_twophase.layers import Layers


@dataclass(frozen=True)
class ExtractConfig:
    """Settings of one extraction.

    Attributes:
        data_path: The records.
        image_folder: What the records' image paths are relative to: a folder or an archive.
        vision_tower: Hub id or folder of the vision tower.
        feature_cache: The cache's directory.
        select_layer: Hidden state to store, or several whose channels are concatenated.
        select_feature: ``patch`` or ``cls_patch``.
        image_aspect_ratio: ``square`` or ``pad``.
        s2_scales: Scales of ``--s2 True`` in pixels, smallest first; none without it.
        compute_dtype: Dtype of the tower, such as ``bfloat16``.
        storage_dtype: Dtype of the cache, a key of ``STORAGE_DTYPES``.
        batch_size: Images of one forward pass.
        num_workers: Worker processes that decode; 0 decodes in this process.
        skip_bad: Whether images that cannot be used are skipped; otherwise they end the run.
        images_per_shard: Rows of a full shard.
        device: ``auto`` or a torch device.
        plan: Whether to report the work and write nothing.
        json: Whether the report is JSON.
        llm: LLM to compute the break-even for, if any.
        runs: Training runs of the break-even.
    """

    data_path: str
    image_folder: str
    vision_tower: str
    feature_cache: Path
    select_layer: Layers = -2
    select_feature: str = "patch"
    image_aspect_ratio: str = "square"
    s2_scales: tuple[int, ...] = ()
    compute_dtype: str = "bfloat16"
    storage_dtype: str = "bfloat16"
    batch_size: int = 32
    num_workers: int = 0
    skip_bad: bool = False
    images_per_shard: int = 1024
    device: str = "auto"
    plan: bool = False
    json: bool = False
    llm: str | None = None
    runs: int = 3
