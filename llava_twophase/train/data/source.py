"""Features of a training run from a feature cache, and the choice between a cache and the vision tower.

``on_the_fly.py`` holds the features from the tower. A run with ``--feature_cache`` does not import it.

Shapes: B samples, L patch tokens, D tower width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llava_twophase.cache.joined import AnyCache, caches_of, open_caches
from llava_twophase.cache.key_forms import all_forms, stored_keys
from llava_twophase.cache.quarantine import read_quarantine
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.cache.staging import Stage
from llava_twophase.errors import UserError, combined_error
from llava_twophase.multi_scale import parse_scales
from llava_twophase.records import Records
from llava_twophase.text import agree, counted
from llava_twophase.train.arguments import Arguments
from llava_twophase.train.data.feature_source import Collate, FeatureSource, Tokenize
from llava_twophase.train.data.prefetch import PrefetchDataset
from llava_twophase.train.data.row_lookup import RowLookup
from llava_twophase.train.data.tower_check import TowerSettings, check_all_settings

if TYPE_CHECKING:
    from PIL import Image

    from llava_twophase.train.data.on_the_fly import Thumbnails

logger = logging.getLogger(__name__)


def open_source(arguments: Arguments) -> FeatureSource:
    """Open the feature caches, or prepare the towers if there are none.

    Raises:
        UserError: A cache cannot be read or was made with other settings; the images or a processor cannot be read.
    """
    model, data = arguments.model, arguments.data
    settings = [
        TowerSettings(
            vision_tower=tower,
            select_layer=model.select_layer,
            select_feature=model.mm_vision_select_feature,
            image_aspect_ratio=data.image_aspect_ratio,
            s2_scales=parse_scales(model.s2, model.s2_scales),
        )
        for tower in model.vision_tower
    ]
    if data.feature_cache is None:
        from llava_twophase.train.data.on_the_fly import OnTheFlyFeatures

        if data.drop_quarantined:
            logger.warning("--drop_quarantined has no effect without --feature_cache: there is no quarantine")
        return OnTheFlyFeatures(
            image_folder=str(data.image_folder),
            settings=settings,
            dtypes=arguments.tower_dtypes,
            device=arguments.training.device,
            interpolate=model.interpolate_patch_grid,
        )
    thumbnails = None
    if data.sample_captions and data.image_folder is not None:
        from llava_twophase.train.data.on_the_fly import Thumbnails

        thumbnails = Thumbnails.open(data.image_folder)
    stage = None if data.stage_dir is None else Stage(Path(data.stage_dir), int(data.stage_gb * 1e9))
    cache = open_caches(data.feature_cache, model.interpolate_patch_grid, stage)
    return CachedFeatures(cache, settings, data.drop_quarantined, thumbnails)


class CachedFeatures:
    """Features from a cache that phase one or a ``CacheWriter`` wrote, or from several joined ones.

    Args:
        cache: The cache, or the joined caches.
        settings: The run's flags for each cache, compared with its fingerprint.
        drop_quarantined: Drop records of quarantined images.
        thumbnails: Reads the images themselves, None if they are not at hand.

    Raises:
        UserError: A field of a fingerprint differs from its flag.
    """

    def __init__(
        self,
        cache: AnyCache,
        settings: Sequence[TowerSettings],
        drop_quarantined: bool = False,
        thumbnails: Thumbnails | None = None,
    ) -> None:
        self._cache, self._drop_quarantined = cache, drop_quarantined
        self._caches, self._thumbnails = caches_of(cache), thumbnails
        self._lookup = RowLookup(cache)
        self._prefetching: list[PrefetchDataset] = []
        check_all_settings(self._caches, settings)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The fingerprint of the cache, or of the joined caches."""
        return self._cache.fingerprint

    @property
    def identity(self) -> dict[str, Any]:
        """The fingerprint of the cache."""
        return self._cache.fingerprint

    @property
    def encode(self) -> None:
        """None: samples have features."""
        return None

    @property
    def tower_bytes(self) -> int:
        """0: samples have features."""
        return 0

    def usable(self, records: Records) -> Records:
        """Return the records with keys as the cache has them; ``drop_quarantined`` drops those of quarantined images.

        Raises:
            UserError: No record remains.
        """
        records = self._with_stored_keys(records)
        if not self._drop_quarantined:
            return records
        kept = records.without(set().union(*map(_without_features, self._caches)))
        if len(kept) < len(records):
            logger.info(
                "--drop_quarantined: %d of %s dropped", len(records) - len(kept), counted(len(records), "record")
            )
        if records and not kept:
            raise UserError(
                f"--drop_quarantined drops all of {counted(len(records), 'record')}: {self._paths} has none"
            )
        return kept

    def require(self, keys: Sequence[str]) -> None:
        """Check that every image has features in every cache.

        Raises:
            UserError: Some do not; for each cache, all are counted and the first are listed.
        """
        problems = []
        rows = self._lookup.find(keys).reshape(len(keys), len(self._caches))
        for column, cache in enumerate(self._caches):
            missing = list(dict.fromkeys(keys[position] for position in np.flatnonzero(rows[:, column] < 0).tolist()))
            if missing:
                verb = agree(len(missing), "has", "have")
                heading = f"{len(missing)} of {counted(len(set(keys)), 'image')} {verb} no features in {cache.path}"
                problems.append(str(combined_error(missing, f"{heading}; {_advice(cache, missing)}")))
        if problems:
            raise UserError("\n".join(problems))

    def load(self) -> tuple[int, int]:
        """Return the feature shape: tokens and width of one image."""
        return self._cache.feature_shape

    def sample(self, key: str) -> dict[str, torch.Tensor]:
        """Return ``features [L, D]`` of one image, in the storage dtype if it is exact, else float32."""
        return {"features": self._cache.read_tensor([key])[0]}

    def read(self, keys: Sequence[str], device: torch.device) -> torch.Tensor:
        """Return the features of some images, ``[B, L, D]`` on the device."""
        return self._cache.read_tensor(keys).to(device)

    def thumbnails(self, keys: Sequence[str]) -> list[Image.Image] | None:
        """Return small pictures of some images; None without ``--image_folder``."""
        return None if self._thumbnails is None else self._thumbnails.read(keys)

    def prefetch(
        self,
        tokenize: Tokenize,
        collate: Collate,
        keys: Sequence[str],
        batch_size: int,
        batches_in_use: int,
        device: torch.device,
    ) -> PrefetchDataset:
        """Return a dataset that reads batches with threads while the previous step computes."""
        dataset = PrefetchDataset(
            tokenize,
            collate,
            self._cache,
            self._lookup.find(keys),
            batch_size=batch_size,
            batches_in_use=batches_in_use,
            device=device,
        )
        self._prefetching.append(dataset)
        return dataset

    def close(self) -> None:
        """Read nothing more, whatever was to be read ahead: the process need not wait for it at its end."""
        for dataset in self._prefetching:
            dataset.close()
        self._cache.close()

    @property
    def _paths(self) -> str:
        return " joined with ".join(str(cache.path) for cache in self._caches)

    def _with_stored_keys(self, records: Records) -> Records:
        """Return the records with image keys in the Unicode form that the first cache has."""
        unusual = records.images.not_ascii()
        keys = list(dict.fromkeys(unusual.values()))
        stored = dict(zip(keys, stored_keys(self._caches[0], keys), strict=True))
        changed = {position: stored[key] for position, key in unusual.items() if stored[key] != key}
        if not changed:
            return records
        count = counted(len(set(changed.values())), "image")
        logger.info("%s has %s of the records in another Unicode form", self._caches[0].path, count)
        return records.rename(changed)


def _without_features(cache: FeatureCache) -> set[str]:
    """Return the quarantined images in every Unicode form, except those that have features by now."""
    return all_forms(cache.missing(stored_keys(cache, list(read_quarantine(cache.path)))))


def _advice(cache: FeatureCache, missing: Sequence[str]) -> str:
    quarantined = all_forms(read_quarantine(cache.path)) & set(missing)
    if quarantined:
        found = f"{len(quarantined)} of them {agree(len(quarantined), 'is', 'are')} in its quarantine.jsonl"
        return f"{found}: --drop_quarantined True drops their records"
    return "extract them first"
