"""The frozen LLM: loaded once per rank, straight to where it stays; knows nothing of projectors or data."""

from __future__ import annotations

import json
import logging
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

from llava_twophase.compat import apply_liger, deepspeed_config, is_zero3_enabled
from llava_twophase.errors import UserError, combined_error
from llava_twophase.train.arguments import Arguments

logger = logging.getLogger(__name__)


def load_llm(arguments: Arguments) -> Any:
    """Load the LLM, frozen, in the run's dtype.

    Args:
        arguments: The run's arguments.

    Returns:
        A causal LM on this rank's device; under ZeRO-3 in parts over all ranks, gathered layer by layer when it runs.

    Raises:
        UserError: It cannot be loaded, or ``--bits`` asks for what is not there.
    """
    model, training = arguments.model, arguments.training
    options: dict[str, Any] = {
        "cache_dir": training.cache_dir,
        "dtype": arguments.dtype,
        "attn_implementation": model.attn_implementation,
    }
    zero3 = is_zero3_enabled()
    if zero3:
        _join_ranks()
    else:
        # Straight to this rank's device: the host never holds one copy for each rank.
        options["device_map"] = {"": training.device}
    if training.bits != 16:
        options["quantization_config"] = _quantization(arguments)
    name = model.model_name_or_path
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of all kinds, as a folder may hold anything; an ImportError names what a flag lacks
        raise UserError(f"--model_name_or_path {name} cannot be loaded: {type(error).__name__}: {error}") from error
    llm, found = loaded
    if found["missing_keys"]:
        # transformers only warns of it, and the projector would learn to serve a layer of noise.
        raise combined_error(
            sorted(found["missing_keys"]), f"--model_name_or_path {name} is not whole, it lacks weights"
        )
    llm.requires_grad_(False)
    # Beams, penalties and temperatures are for who chats with it; captions are sampled greedily.
    llm.generation_config = GenerationConfig()
    if training.use_liger_kernel:
        apply_liger(llm, training.liger_kernel_config)
    return _partitioned(llm, arguments) if zero3 else llm


def gathered(module: nn.Module) -> AbstractContextManager[Any]:
    """Hold a module's parameters whole on every rank, which under ZeRO-3 they are not; all ranks must enter."""
    if not is_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(module.parameters()))


def require_bits(arguments: Arguments) -> None:
    """Check that the quantisation asked for is there, before anything is loaded.

    Raises:
        UserError: It is not.
    """
    bits = arguments.training.bits
    if bits == 16:
        return
    if find_spec("bitsandbytes") is None:
        raise UserError(f"--bits {bits} needs bitsandbytes: pip install bitsandbytes, or leave --bits out")
    if not torch.cuda.is_available():
        raise UserError(f"--bits {bits} needs a CUDA device; leave --bits out")
    if is_zero3_enabled():
        raise UserError(f"--bits {bits} and ZeRO-3 exclude each other; use pipelines/zero2.json")


def require_liger(arguments: Arguments) -> None:
    """Check that ``--use_liger_kernel`` can be honoured, before anything is loaded.

    Raises:
        UserError: It cannot.
    """
    if not arguments.training.use_liger_kernel:
        return
    if not torch.accelerator.is_available():
        raise UserError("--use_liger_kernel True: its kernels are written in Triton and need a GPU; leave it out")
    if find_spec("liger_kernel") is None:
        raise UserError("--use_liger_kernel True needs liger-kernel: pip install liger-kernel, or leave it out")


def require_generation_config(arguments: Arguments) -> None:
    """Check the LLM's ``generation_config.json``: an invalid one ends its loading, and LLaVA's saving of it.

    Raises:
        UserError: It cannot be loaded.
    """
    name = arguments.model.model_name_or_path
    try:
        generation = GenerationConfig.from_pretrained(name, cache_dir=arguments.training.cache_dir)
    except OSError:
        return  # there is none, or none that can be read: the LLM loads without
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"--model_name_or_path {name}: its generation_config.json is invalid; mend it: {error}"
        ) from None
    try:
        generation.validate(strict=True)
    except ValueError as error:
        found = [line.removeprefix("- ") for line in str(error).splitlines() if line.startswith("- ")]
        logger.warning(
            "%s: its generation_config.json is contradictory (%s). Nothing here minds, but in LLaVA's stage 2 "
            "transformers 4.37 refuses to save a model with it, after the training",
            name,
            " ".join(found) or error,
        )


def _quantization(arguments: Arguments) -> BitsAndBytesConfig:
    training = arguments.training
    if training.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=arguments.dtype,
        bnb_4bit_use_double_quant=training.double_quant,
        bnb_4bit_quant_type=training.quant_type,
    )


def _join_ranks() -> None:
    # Weights are split over the ranks while they are read, so the ranks must have met before.
    import deepspeed

    deepspeed.init_distributed()


def _partitioned(llm: Any, arguments: Arguments) -> Any:
    # The LLM gets an engine of its own without an optimizer, whose hooks gather each layer's parts when it runs,
    # forward and backward. Trainer's engine has the projector alone, and so have its checkpoints.
    import deepspeed

    training = arguments.training
    given = training.deepspeed
    content = given if isinstance(given, dict) else json.loads(Path(str(given)).read_text(encoding="utf-8"))
    zero = {name: value for name, value in content["zero_optimization"].items() if value != "auto"}
    zero.pop("offload_optimizer", None)
    # Parameters in host memory are the LLM's matter: the projector stays on the device.
    trainers = deepspeed_config(training)
    assert trainers is not None, "ZeRO-3 is enabled"
    trainers["zero_optimization"].pop("offload_param", None)
    config = {
        "train_micro_batch_size_per_gpu": training.per_device_train_batch_size,
        "zero_optimization": zero,
        "bf16": {"enabled": training.bf16},
        "fp16": {"enabled": training.fp16},
    }
    engine, *_ = deepspeed.initialize(model=llm, config=config)
    # Kept alive with the module: it owns the hooks.
    llm.zero3_engine = [engine]
    return llm
