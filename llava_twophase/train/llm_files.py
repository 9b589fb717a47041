"""Configuration and tokenizer of the LLM, read and checked before its weights are loaded."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoTokenizer

from llava_twophase.errors import UserError
from llava_twophase.model_names import require_model_folder
from llava_twophase.train.arguments import Arguments
from llava_twophase.train.model.llm_config import require_llm

_FLAG = "--model_name_or_path"


def load_config_and_tokenizer(arguments: Arguments) -> tuple[Any, Any]:
    """Load the LLM's configuration and tokenizer.

    Raises:
        UserError: There is no such folder or hub id, the files cannot be read, or it is not an LLM.
    """
    name, cache_dir = arguments.model.model_name_or_path, arguments.training.cache_dir
    require_model_folder(_FLAG, name, "an LLM")
    config = require_llm(name, _load(AutoConfig, name, cache_dir))
    return config, _load(AutoTokenizer, name, cache_dir)


def _load(kind: Any, name: str, cache_dir: str | None) -> Any:
    try:
        return kind.from_pretrained(name, cache_dir=cache_dir)
    except Exception as error:  # these files may hold anything, so errors are of many types
        raise UserError(
            f"{_FLAG} {name}: its config or tokenizer cannot be loaded: {type(error).__name__}: {error}"
        ) from error
