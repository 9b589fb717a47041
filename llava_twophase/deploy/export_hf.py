"""Export LLM, projector and vision tower as one folder for Hugging Face's ``LlavaForConditionalGeneration``.

The folder loads in transformers 4.57 and 5, and vLLM knows its tensor names. Weights are streamed, so the memory needed
does not depend on the size of the LLM.

What the folder holds and why:
    - Tensor names are those of the models on the Hub (``language_model.model.*``, ``vision_tower.vision_model.*``,
      ``multi_modal_projector.linear_1.*``). ``save_pretrained`` of transformers 5.24 writes other names, from which
      4.57 loads a random tower.
    - ``tokenizer_config.json`` is written by hand: 5.24 writes ``extra_special_tokens`` as a list, which 4.57 cannot
      read.
    - ``text_config`` has both ``rope_theta`` and ``rope_parameters``.
    - The image processor does not convert to RGB. 5.24 would blend transparency onto white, where LLaVA drops it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from llava_twophase.constants import IMAGE_TOKEN
from llava_twophase.deploy.hf_parts import HfParts, load_parts, require_expressible
from llava_twophase.deploy.trained_projector import TrainedProjector
from llava_twophase.deploy.weights import SafetensorsWriter, stream_tensors, weight_files
from llava_twophase.errors import UserError
from llava_twophase.files import explain_os_errors, require_free_space, sync_folder
from llava_twophase.train.data.tokenizer import load_caption_tokenizer

_PAD_TOKEN = "<pad>"
# The embedding is extended to a multiple of this, as transformers' resize_token_embeddings(pad_to_multiple_of=64) does.
_VOCABULARY_MULTIPLE = 64


def export_hf(projector: TrainedProjector, out: str | Path) -> Path:
    """Write the model folder: into ``OUT.tmp``, which is renamed at the end.

    Args:
        projector: The trained projector; its LLM and tower are read from their folders or from the hub's cache.
        out: Folder to write; it must be new or empty.

    Returns:
        The folder.

    Raises:
        UserError: The combination cannot be expressed in transformers' LLaVA, or a folder cannot be read or written.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; give another one")
    parts = load_parts(projector)
    weights = projector.weights()
    require_expressible(parts, weights)
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    needed = sum(path.stat().st_size for path in (*weight_files(parts.llm_folder), *weight_files(parts.tower_folder)))
    require_free_space(folder, needed, "the exported weights", "free some space or give OUT on another disk")
    work = folder.absolute().with_name(f"{folder.absolute().name}.tmp")
    shutil.rmtree(work, ignore_errors=True)  # of an export that was interrupted
    with explain_os_errors(work.parent, "OUT", lambda: "run the same command again", also=(SafetensorError,)):
        work.mkdir()
        _write_folder(parts, weights, work)
        work.replace(folder)  # an empty folder is replaced, too
        sync_folder(work.parent)
    return folder


def _write_folder(parts: HfParts, weights: dict[str, torch.Tensor], folder: Path) -> None:
    tokenizer, image_id = _write_tokenizer(parts, folder)
    rows = _vocabulary_rows(parts.text_config.vocab_size, len(tokenizer))
    _write_config(parts, folder, image_id=image_id, vocab_size=rows, pad_id=tokenizer.pad_token_id)
    _write_processor(parts, folder)
    writer = SafetensorsWriter(folder)
    for name, tensor in _tensors(parts, weights, rows):
        writer.add(name, tensor)
    writer.close()


def _write_tokenizer(parts: HfParts, folder: Path) -> tuple[Any, int]:
    tokenizer: Any = AutoTokenizer.from_pretrained(parts.llm_folder)
    if not tokenizer.is_fast:
        raise UserError(f"{parts.llm_folder}: its tokenizer has no tokenizer.json form; convert it first")
    bos = load_caption_tokenizer(str(parts.llm_folder), tokenizer).bos
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": _PAD_TOKEN})
    _set_prompt(tokenizer, bos)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    special = ("bos_token", "eos_token", "unk_token", "pad_token")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": min(tokenizer.model_max_length, parts.text_config.max_position_embeddings),
        "extra_special_tokens": {"image_token": IMAGE_TOKEN},
        **{name: str(getattr(tokenizer, name)) for name in special if getattr(tokenizer, name) is not None},
    }
    _write_json(folder / "tokenizer_config.json", config)
    return tokenizer, int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


def _set_prompt(tokenizer: Any, bos: int | None) -> None:
    # The projector was trained with a BOS, or none, in front of the image, whatever the tokenizer adds.
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    start = [] if bos is None else [bos]
    if tokenizer(IMAGE_TOKEN).input_ids == [*start, image_id]:
        return
    token = tokenizer.convert_ids_to_tokens(start)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*token, "$A"], pair=[*token, "$A", *token, "$B"], special_tokens=list(zip(token, start, strict=True))
    )


def _write_config(parts: HfParts, folder: Path, *, image_id: int, vocab_size: int, pad_id: int) -> None:
    text, vision = parts.text_config.to_dict(), parts.vision_config.to_dict()
    rope = text.get("rope_parameters") or {}
    if "rope_theta" in rope:
        text["rope_theta"] = rope["rope_theta"]
    text.update(vocab_size=vocab_size, pad_token_id=pad_id)
    dtype = next(_llm_tensors(parts))[1].dtype
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_id,
        "image_seq_length": parts.image_tokens,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": parts.projector.select_layer,
        "vision_feature_select_strategy": parts.strategy,
        "tie_word_embeddings": bool(parts.text_config.tie_word_embeddings),
        "text_config": text,
        "vision_config": vision,
        "pad_token_id": pad_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    _write_json(folder / "config.json", config)
    token_ids = {
        "bos_token_id": text.get("bos_token_id"),
        "eos_token_id": text.get("eos_token_id"),
        "pad_token_id": pad_id,
    }
    _write_json(folder / "generation_config.json", {"do_sample": False, **token_ids})


def _write_processor(parts: HfParts, folder: Path) -> None:
    processor = parts.processor
    settings = {name: value for name, value in processor.to_dict().items() if not name.startswith("_")}
    settings["image_processor_type"] = type(processor).__name__.removesuffix("Pil").removesuffix("Fast")
    settings.pop("backend", None)
    settings["do_convert_rgb"] = False
    settings["processor_class"] = "LlavaProcessor"
    if parts.projector.image_aspect_ratio == "pad":
        settings.update(image_processor_type="LlavaImageProcessor", do_pad=True)
    _write_json(folder / "preprocessor_config.json", settings)
    content = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": parts.vision_config.patch_size,
        "num_additional_image_tokens": int(parts.has_cls),
        "vision_feature_select_strategy": parts.strategy,
    }
    _write_json(folder / "processor_config.json", content)


def _tensors(parts: HfParts, weights: dict[str, torch.Tensor], rows: int) -> Iterator[tuple[str, torch.Tensor]]:
    tied = bool(parts.text_config.tie_word_embeddings)
    # Each tensor keeps its own dtype, so a float32 projector loses nothing beside an LLM in bfloat16.
    for name, tensor in _llm_tensors(parts):
        if name.startswith("lm_head.") and tied:
            continue
        resized = name.endswith("embed_tokens.weight") or name == "lm_head.weight"
        yield f"language_model.{name}", _extended(tensor, rows) if resized else tensor
    for place, layer in (("0", "linear_1"), ("2", "linear_2")):
        for part in ("weight", "bias"):
            yield f"multi_modal_projector.{layer}.{part}", weights[f"{place}.{part}"]
    yield from _tower_tensors(parts)


def _llm_tensors(parts: HfParts) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in stream_tensors(parts.llm_folder):
        if "rotary_emb.inv_freq" not in name:  # computed; old LLaMA files store it
            yield name, tensor


def _tower_tensors(parts: HfParts) -> Iterator[tuple[str, torch.Tensor]]:
    clip_like = parts.vision_config.model_type != "dinov2"
    for name, tensor in stream_tensors(parts.tower_folder):
        if name.startswith(("text_model.", "text_projection.", "visual_projection.", "logit_")):
            continue
        if "position_ids" in name:
            continue
        name = name.removeprefix("vision_model.")
        yield f"vision_tower.vision_model.{name}" if clip_like else f"vision_tower.{name}", tensor


def _extended(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    if rows == len(tensor):
        return tensor
    mean = torch.mean(tensor, dim=0, keepdim=True, dtype=torch.float32).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - len(tensor), -1)])


def _vocabulary_rows(rows: int, tokens: int) -> int:
    if tokens <= rows:
        return rows
    return -(-tokens // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
