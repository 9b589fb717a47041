"""LLaVA-1.5 stage 1 in two phases: extract patch features once, then train the projector from the feature cache.

The names in ``__all__`` are imported when they are first used, so importing this package loads neither numpy nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava_twophase.lazy import lazy_exports

if TYPE_CHECKING:
    from llava_twophase.cache.joined import JoinedCaches
    from llava_twophase.cache.reader import FeatureCache
    from llava_twophase.cache.writer import CacheWriter
    from llava_twophase.deploy.captioner import Captioner
    from llava_twophase.deploy.trained_projector import load_projector
    from llava_twophase.records import load_records

__all__ = ["CacheWriter", "Captioner", "FeatureCache", "JoinedCaches", "load_projector", "load_records"]
__version__ = "0.1.0"

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "CacheWriter": "cache.writer",
        "Captioner": "deploy.captioner",
        "FeatureCache": "cache.reader",
        "JoinedCaches": "cache.joined",
        "load_projector": "deploy.trained_projector",
        "load_records": "records",
    },
)
