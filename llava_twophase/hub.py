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


def path_advice(name: str) -> str:
    """Return what a model's path is relative to and what to give; an empty string for an absolute path."""
    if Path(name).is_absolute():
        return ""
    return (
        f"\nthere is no folder {name} in {Path.cwd()}; a relative path, also one that the config.json of a run has, is "
        "looked up in the current folder: give the full path"
    )


def download_advice(name: str) -> str:
    """Return what to do if a model cannot be loaded: an empty string if the name is a file or folder."""
    return "" if Path(name).exists() else f"{path_advice(name)}\nif it is a hub id, download it: hf download {name}"
