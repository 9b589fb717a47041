"""Load the frozen LLM, once per rank and directly onto its device."""

from __future__ import annotations

import json
import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

from llava_twophase.compat import apply_liger, deepspeed_config, is_zero3_enabled
from llava_twophase.errors import UserError, combined_error
from llava_twophase.train.arguments import Arguments
from llava_twophase.train.model.input_probe import check_embedding_input
from llava_twophase.train.model.llm_config import require_bitsandbytes, require_llm

logger = logging.getLogger(__name__)

# Names of the text model's weights in multimodal checkpoints -> names in the text model.
_TEXT_MODEL_KEYS = {r"^language_model\.(?=model\.|lm_head\.)": "", r"^model\.language_model\.": "model."}


@dataclass(frozen=True)
class LoadedLLM:
    """A frozen causal LM, ready to run.

    Attributes:
        model: The transformers model.
        zero3_engine: Under ZeRO-3, the DeepSpeed engine whose hooks gather the model's weights; must stay alive as long
            as the model.
    """

    model: Any
    zero3_engine: Any = None

    @property
    def is_partitioned(self) -> bool:
        """Whether the weights are partitioned over the ranks, so that all ranks must run the model together."""
        return self.zero3_engine is not None


def load_llm(arguments: Arguments) -> LoadedLLM:
    """Load the LLM, frozen, in the run's dtype.

    Returns:
        A causal LM on this rank's device; under ZeRO-3 it is partitioned over all ranks and gathered layer by layer.

    Raises:
        UserError: The LLM cannot be loaded, its files lack weights, or it needs more than embeddings.
    """
    model, training = arguments.model, arguments.training
    options: dict[str, Any] = {
        "cache_dir": training.cache_dir,
        "dtype": arguments.dtype,
        "attn_implementation": model.attn_implementation,
    }
    zero3 = is_zero3_enabled()
    if zero3:
        _init_process_group()
    else:
        # Directly to this rank's device: the host never holds one copy for each rank.
        options["device_map"] = {"": training.device}
    if training.bits != 16:
        options["quantization_config"] = quantization(
            bits=training.bits,
            dtype=arguments.dtype,
            double_quant=training.double_quant,
            quant_type=training.quant_type,
        )
    llm = read_causal_lm(model.model_name_or_path, options)
    if training.use_liger_kernel:
        apply_liger(llm, training.liger_kernel_config)
    loaded = LoadedLLM(llm, _zero3_engine(llm, arguments) if zero3 else None)
    check_embedding_input(model.model_name_or_path, llm)
    return loaded


def read_causal_lm(name: str, options: dict[str, Any]) -> Any:
    """Load a causal LM with frozen weights that generates greedily; of a multimodal checkpoint, its text model alone.

    Args:
        name: Folder or hub id, as ``--model_name_or_path`` gives it.
        options: Keyword arguments of ``from_pretrained``.

    Raises:
        UserError: The LLM cannot be loaded, or its files lack weights.
    """
    try:
        config = AutoConfig.from_pretrained(name, cache_dir=options.get("cache_dir"))
        text = require_llm(name, config)
        if text is not config:
            options = {**options, "config": text, "key_mapping": _TEXT_MODEL_KEYS}
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:  # a folder may hold anything; an ImportError says which package a flag needs
        raise UserError(f"--model_name_or_path {name} cannot be loaded: {type(error).__name__}: {error}") from error
    llm, found = loaded
    if found["missing_keys"]:
        # transformers draws them at random and only warns.
        raise combined_error(
            sorted(found["missing_keys"]), f"--model_name_or_path {name} is incomplete: it lacks weights"
        )
    llm.requires_grad_(False)
    # Captions are generated greedily, whatever beams or temperatures the LLM's own file sets for chats.
    llm.generation_config = GenerationConfig()
    return llm


def gathered(module: nn.Module, modified: bool = False) -> AbstractContextManager[Any]:
    """Gather a module's complete parameters on every rank; under ZeRO-3 all ranks must enter this context.

    Args:
        module: The module.
        modified: Keep what rank 0 writes into them.
    """
    if not is_zero3_enabled():
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
        list(module.parameters()), modifier_rank=0 if modified else None
    )
    return context


def require_bits(arguments: Arguments) -> None:
    """Check that ``--bits`` can be honoured, before anything is loaded.

    Raises:
        UserError: bitsandbytes or a CUDA device is missing, or ZeRO-3 is enabled.
    """
    bits = arguments.training.bits
    if bits == 16:
        return
    require_bitsandbytes(f"--bits {bits}", "omit --bits")
    if is_zero3_enabled():
        raise UserError(f"--bits {bits} does not work with ZeRO-3; use --deepspeed pipelines/zero2.json")


def require_liger(arguments: Arguments) -> None:
    """Check that ``--use_liger_kernel`` can be honoured, before anything is loaded.

    Raises:
        UserError: There is no accelerator, or liger-kernel is not installed.
    """
    if not arguments.training.use_liger_kernel:
        return
    if not torch.accelerator.is_available():
        raise UserError("--use_liger_kernel True: its kernels are written in Triton and need a GPU; omit the flag")
    if find_spec("liger_kernel") is None:
        raise UserError("--use_liger_kernel True needs liger-kernel: pip install liger-kernel, or omit the flag")


def require_generation_config(arguments: Arguments) -> None:
    """Check that the LLM's ``generation_config.json`` can be read, because an invalid one makes loading fail.

    Raises:
        UserError: The file is invalid.
    """
    name = arguments.model.model_name_or_path
    try:
        GenerationConfig.from_pretrained(name, cache_dir=arguments.training.cache_dir)
    except OSError:
        return  # missing or unreadable: the LLM loads without it
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"--model_name_or_path {name}: its generation_config.json is invalid; fix it: {error}"
        ) from None


def quantization(
    *, bits: int, dtype: torch.dtype, double_quant: bool = True, quant_type: str = "nf4"
) -> BitsAndBytesConfig:
    """Return the configuration of a frozen LLM in 8 or 4 bits; ``dtype`` is what 4-bit weights are computed in."""
    four_bits = {
        "load_in_4bit": True,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_quant_type": quant_type,
    }
    options = {"load_in_8bit": True} if bits == 8 else four_bits
    return BitsAndBytesConfig(**options)


def _init_process_group() -> None:
    # Weights are partitioned while they are read, so the process group must exist first.
    import deepspeed

    deepspeed.init_distributed()


def _zero3_engine(llm: Any, arguments: Arguments) -> Any:
    # The LLM gets an engine of its own without an optimizer. Its hooks gather each layer's weights for the forward and
    # the backward pass. Trainer's engine holds the projector alone, and so do its checkpoints.
    import deepspeed

    training = arguments.training
    given = training.deepspeed
    content = given if isinstance(given, dict) else json.loads(Path(str(given)).read_text(encoding="utf-8"))
    zero = {name: value for name, value in content["zero_optimization"].items() if value != "auto"}
    zero.pop("offload_optimizer", None)
    # offload_param is meant for the LLM; the projector stays on the device.
    config_of_trainer = deepspeed_config(training)
    assert config_of_trainer is not None, "ZeRO-3 is enabled"
    config_of_trainer["zero_optimization"].pop("offload_param", None)
    config = {
        "train_micro_batch_size_per_gpu": training.per_device_train_batch_size,
        "zero_optimization": zero,
        "bf16": {"enabled": training.bf16},
        "fp16": {"enabled": training.fp16},
    }
    engine, *_ = deepspeed.initialize(model=llm, config=config)
    return engine
