"""Whether the Hugging Face hub can be reached: asked once, so that an offline machine does not wait for every file."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger(__name__)

_SECONDS = 10.0


def use_cache_if_unreachable(names: Iterable[str]) -> None:
    """Read models from the local cache only, from now on, if some are hub ids and the hub cannot be reached.

    Without this, huggingface_hub repeats the request for each file of each model six times.

    Args:
        names: Hub ids or folders of the models that will be read.
    """
    from huggingface_hub import constants, get_session

    from llava_twophase.compat import set_hub_offline

    if constants.HF_HUB_OFFLINE or all(Path(name).exists() for name in names):
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception as error:  # no network, no name server, a proxy's refusal: all of them mean the same here
        logger.warning(
            "%s cannot be reached (%s): models are read from the local cache only", constants.ENDPOINT, error
        )
        set_hub_offline()


def download_advice(name: str) -> str:
    """Return how to download a model that cannot be loaded, or an empty string if the name is a file or folder."""
    return "" if Path(name).exists() else f"\nif it is not on this machine yet, download it: hf download {name}"
