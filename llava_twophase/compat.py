"""Every use of undocumented API of torch, transformers, accelerate and DeepSpeed: what an upgrade of them can break.

Libraries are imported inside the functions: importing this module loads none of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datetime import timedelta

    import torch


def is_zero3_enabled() -> bool:
    """Return whether a DeepSpeed configuration with ZeRO stage 3 is active.

    ``transformers.integrations`` exports this function without documenting it.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled  # type: ignore[attr-defined]

    return bool(is_deepspeed_zero3_enabled())


@contextmanager
def unpartitioned() -> Iterator[None]:
    """Load models completely, also under ZeRO-3, where ``from_pretrained`` would give each rank a part of the weights.

    ``transformers.integrations.deepspeed`` documents its two functions for tests only.
    """
    if not is_zero3_enabled():
        yield
        return
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


def apply_liger(llm: Any, options: dict[str, Any] | None) -> None:
    """Patch an LLM with Liger's kernels, as ``Trainer`` does for the model that it trains.

    Args:
        llm: A transformers model.
        options: ``--liger_kernel_config``; None for Liger's defaults.
    """
    from transformers.integrations import apply_liger_kernel  # type: ignore[attr-defined]

    apply_liger_kernel(llm, options)


def parameter_shape(parameter: torch.Tensor) -> torch.Size:
    """Return a parameter's shape; ZeRO-3 empties parameters at rest and keeps their shape in ``ds_shape``."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def deepspeed_config(training: Any) -> dict[str, Any] | None:
    """Return the DeepSpeed configuration of ``TrainingArguments`` as accelerate keeps it; None without DeepSpeed.

    The dictionary is accelerate's own, so a change takes effect when Trainer builds the engine.
    """
    plugin = getattr(training, "deepspeed_plugin", None)
    return None if plugin is None else plugin.deepspeed_config


def zero_stage(training: Any) -> int | None:
    """Return the ZeRO stage of ``TrainingArguments``; None without DeepSpeed."""
    plugin = getattr(training, "deepspeed_plugin", None)
    return None if plugin is None else int(plugin.zero_stage)


def deepspeed_mismatches(training: Any) -> list[str]:
    """Return a description of each value of the DeepSpeed configuration that differs from the flags."""
    plugin = getattr(training, "deepspeed_plugin", None)
    return [] if plugin is None else list(plugin.hf_ds_config.mismatches)


def tokenizer_settings(name: str, cache_dir: str | None = None) -> dict[str, Any]:
    """Return the content of ``tokenizer_config.json``; an empty dictionary if there is no such file."""
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    settings: dict[str, Any] = get_tokenizer_config(name, cache_dir=cache_dir)
    return settings


def find_file(name: str, file: str, cache_dir: str | None = None) -> str | None:
    """Return the path of one file of a model, downloaded if necessary; None if the model has no such file.

    Args:
        name: Hub id or local folder.
        file: File name inside it.
        cache_dir: Where hub downloads are kept.
    """
    from transformers.utils import cached_file  # type: ignore[attr-defined]

    path: str | None = cached_file(
        name,
        file,
        cache_dir=cache_dir,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return path


def image_outputs(projected: list[torch.Tensor]) -> Any:
    """Wrap projected features as the image encoder's output in transformers' LLaVA.

    Args:
        projected: One ``[L, H]`` tensor per image.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(pooler_output=projected)  # type: ignore[arg-type]


def is_tracker_installed(name: str) -> bool:
    """Return whether HF Trainer can use a tracker, without creating its callback.

    Args:
        name: As ``TrainingArguments.report_to`` lists it.

    Raises:
        ValueError: The name is unknown.
    """
    from transformers.integrations import (  # type: ignore[attr-defined]
        get_available_reporting_integrations,
        get_reporting_integration_callbacks,
    )

    get_reporting_integration_callbacks([name])
    # Two that the list of installed ones does not have.
    return name in ("azure_ml", "flyte", *get_available_reporting_integrations())


def set_hub_offline() -> None:
    """Let huggingface_hub and transformers make no request from now on, as HF_HUB_OFFLINE=1 does from the start."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True


def is_lost_rank(error: RuntimeError) -> bool:
    """Return whether an operation between ranks failed because another rank ended or could not be reached.

    NCCL's errors have a type of their own. Those of gloo are plain ``RuntimeError``s that begin with its source file.
    """
    from torch.distributed import DistError

    return isinstance(error, DistError) or "/gloo/" in str(error)


def set_group_timeouts(timeout: timedelta) -> None:
    """Let operations of every process group wait this long for other ranks.

    ``--ddp_timeout`` reaches only the first group, and on a CPU none. Those that DeepSpeed makes have torch's default:
    10 minutes for NCCL, 30 for gloo.
    """
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timeout, group)


def wait_for_torchrun(seconds: float = 30.0) -> None:
    """Wait on rank 0 until torchrun on every other node has seen its ranks end.

    With ``--master_addr``, torchrun on the first node keeps the store in which the others report their end. It ends as
    soon as they have, sometimes before they have read its answer, and then they print a page of errors after a
    successful run. If rank 0 ends last, they have read it.

    Args:
        seconds: The longest wait.
    """
    env = os.environ
    others = int(env.get("GROUP_WORLD_SIZE", "1")) - 1
    if env.get("RANK") != "0" or not others or env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    from datetime import timedelta

    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # documented, not in __all__

    address = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    store = PrefixStore(env["TORCHELASTIC_RUN_ID"], TCPStore(*address, timeout=timedelta(seconds=seconds)))
    deadline = time.monotonic() + seconds
    # With --rdzv_backend c10d, the keys have another prefix.
    while store.check(["torchelastic/assigned_ranks/0"]) and time.monotonic() < deadline:
        if store.add("torchelastic/agent/terminal_state/num_members", 0) >= others:
            return
        time.sleep(0.1)


def gradient_clipping(training: Any) -> float:
    """Return the gradient norm that a run clips at; 0 for none.

    Args:
        training: ``ProjectorTrainingArguments``, whose DeepSpeed configuration always has a ``gradient_clipping``.
    """
    config = deepspeed_config(training)
    value = "auto" if config is None else config["gradient_clipping"]
    return float(training.max_grad_norm if value == "auto" else value)
