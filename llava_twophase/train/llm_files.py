"""Configuration and tokenizer of the LLM, read and checked before its weights are loaded.

``llm_identity`` tells whether two folders hold the same LLM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xxhash
from transformers import AutoConfig, AutoTokenizer

from llava_twophase.errors import UserError
from llava_twophase.hub import download_advice
from llava_twophase.model_names import require_model_folder
from llava_twophase.train.model.llm_config import require_llm

_FLAG = "--model_name_or_path"
# Of a larger file, one block is read from each stretch: 7,000 blocks of a 13B LLM.
_SAMPLED_FROM = 1 << 26
_STRETCH, _BLOCK = 1 << 22, 1 << 12


def load_config_and_tokenizer(name: str, cache_dir: str | None = None) -> tuple[Any, Any]:
    """Load the LLM's configuration and tokenizer.

    Args:
        name: ``--model_name_or_path``.
        cache_dir: Folder of hub downloads.

    Raises:
        UserError: There is no such folder or hub id, the files cannot be read, or it is not an LLM.
    """
    require_model_folder(_FLAG, name, "an LLM")
    config = require_llm(name, _load(AutoConfig, name, cache_dir))
    return config, _load(AutoTokenizer, name, cache_dir)


def llm_identity(name: str) -> str | dict[str, Any]:
    """Return a JSON value that is equal for two folders with the same LLM, wherever they are.

    Large weight files are sampled: other weights are recognised, a few changed bytes may not be.

    Args:
        name: ``--model_name_or_path``. A hub id is its own identity: its weights may not be downloaded yet.
    """
    folder = Path(name)
    if not folder.is_dir():
        return name
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return {path.name: _sampled_digest(path) for path in (folder / "config.json", *weights) if path.is_file()}


def _sampled_digest(path: Path) -> str:
    size = path.stat().st_size
    block = _STRETCH if size < _SAMPLED_FROM else _BLOCK
    digest = xxhash.xxh3_128(str(size).encode())
    with path.open("rb", buffering=0) as file:
        for offset in range(0, size, _STRETCH):
            file.seek(offset)
            digest.update(file.read(block))
    return digest.hexdigest()


def _load(kind: Any, name: str, cache_dir: str | None) -> Any:
    try:
        return kind.from_pretrained(name, cache_dir=cache_dir)
    except Exception as error:  # these files may hold anything, so errors are of many types
        raise UserError(
            f"{_FLAG} {name}: its config or tokenizer cannot be loaded: {type(error).__name__}: {error}"
            f"{download_advice(name)}"
        ) from error
