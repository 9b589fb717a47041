"""Export a CLIP tower and its projector as an ``mmproj`` GGUF file for llama.cpp.

The LLM is not part of the file; llama.cpp's ``convert_hf_to_gguf.py`` converts it. Names of keys and tensors are those
of llama.cpp's ``tools/mtmd/clip-impl.h``.

Two faults of llama.cpp concern these files:
    - It runs one layer less than ``block_count`` says (ggml-org/llama.cpp#25817). Writing ``feature_layer`` and a
      ``block_count`` of the same value gives the right layer with and without the fault.
    - It appends the CLS token after the patches but numbers positions as if it came first, and then drops the first
      patch instead of the CLS token (ggml-org/llama.cpp#25814). No file can correct that: captions are somewhat worse
      than with the same weights elsewhere.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor

from llava_twophase.deploy.trained_projector import TrainedProjector
from llava_twophase.deploy.weights import model_folder, stream_tensors
from llava_twophase.errors import UserError
from llava_twophase.files import explain_os_errors, replace_file
from llava_twophase.layers import as_tuple, describe

POSITION_NOTE = (
    "llama.cpp places the CLS token after the patches (ggml-org/llama.cpp#25814, open): each patch gets its "
    "neighbour's position and the first patch is lost. Captions are somewhat worse there than in transformers"
)

_LAYER_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_EMBEDDINGS = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",  # the spelling of the CLIP checkpoints
    "pre_layrnorm.bias": "v.pre_ln.bias",
}
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def export_gguf(projector: TrainedProjector, out: str | Path) -> Path:
    """Write the ``mmproj`` file.

    Args:
        projector: The trained projector; its tower is read from its folder or from the hub's cache.
        out: File to write; replaced by rename.

    Returns:
        The file.

    Raises:
        UserError: The tower is not a CLIP tower, the projector is not an MLP that llama.cpp knows, or the package
            ``gguf`` is missing.
    """
    tower = projector.only_tower("llama.cpp's LLaVA")
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise UserError("export --to gguf needs the package gguf: pip install 'llava-twophase[gguf]'") from None
    folder = model_folder(tower, "--vision_tower")
    config = AutoConfig.from_pretrained(folder)
    config = getattr(config, "vision_config", config)
    weights = projector.weights()
    _require_expressible(projector, config, weights)
    layers = _layers(config, *as_tuple(projector.select_layer))
    processor: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
    path = Path(out)
    logging.getLogger("gguf").setLevel(logging.WARNING)
    again = "run the same command again"
    with explain_os_errors(path.absolute().parent, "OUT", lambda: again), replace_file(path) as file:
        writer = GGUFWriter(None, "clip")
        writer.add_type("mmproj")
        writer.add_name(path.stem)
        writer.add_bool("clip.has_vision_encoder", True)
        writer.add_bool("clip.has_llava_projector", True)
        writer.add_string("clip.projector_type", "mlp")
        writer.add_bool("clip.use_gelu", config.hidden_act == "gelu")
        writer.add_bool("clip.use_silu", False)
        _add_vision_keys(writer, config, layers=layers, mean=processor.image_mean, std=processor.image_std)
        for name, tensor in _tensors(folder, weights, layers):
            writer.add_tensor(name, tensor.numpy())
        writer.open_output_file(Path(file.name))
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return path


def _add_vision_keys(writer: Any, config: Any, *, layers: int, mean: list[float], std: list[float]) -> None:
    numbers = {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": layers,
        "projection_dim": config.projection_dim,
        "attention.head_count": config.num_attention_heads,
    }
    for name, value in numbers.items():
        writer.add_uint32(f"clip.vision.{name}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", config.layer_norm_eps)
    writer.add_array("clip.vision.image_mean", [float(value) for value in mean])
    writer.add_array("clip.vision.image_std", [float(value) for value in std])
    writer.add_array("clip.vision.feature_layer", [layers])


def _require_expressible(projector: TrainedProjector, config: Any, weights: dict[str, torch.Tensor]) -> None:
    tower, kind, act = config.model_type, projector.projector_type, getattr(config, "hidden_act", None)
    if kind != "mlp2x_gelu":
        raise UserError(
            f"the projector is {kind}; llama.cpp's type 'mlp' is mlp2x_gelu only, so it cannot be exported; "
            "llava-use-projector caption and evaluate run it"
        )
    problem = None
    if tower != "clip_vision_model":
        problem = f"the vision tower is a {tower}; llama.cpp's LLaVA projector goes with CLIP only"
    elif projector.select_feature != "patch":
        problem = "the projector was trained with cls_patch; llama.cpp drops the CLS token"
    elif projector.s2_scales:
        problem = "the projector reads features of several scales (S2), which llama.cpp's LLaVA does not have"
    elif len(as_tuple(projector.select_layer)) > 1:
        problem = f"the projector reads {describe(projector.select_layer)}; llama.cpp's LLaVA reads one"
    elif act not in ("gelu", "quick_gelu"):
        problem = f"the tower's activation is {act}; llama.cpp knows gelu and quick_gelu"
    if problem is not None:
        raise UserError(f"{problem}; use --to hf")
    width = weights["0.weight"].shape[1]
    if width != config.hidden_size:
        raise UserError(
            f"{projector.path} takes features of width {width}, {projector.vision_towers[0]} gives "
            f"{config.hidden_size}; give the tower that it was trained with"
        )


def _layers(config: Any, select_layer: int) -> int:
    total: int = config.num_hidden_layers
    layers = total + 1 + select_layer if select_layer < 0 else select_layer
    if not 1 <= layers <= total:
        raise UserError(f"select_layer {select_layer} is not one of the {total} layers of the tower")
    return layers


def _tensors(folder: Path, weights: dict[str, torch.Tensor], layers: int) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in sorted(weights.items()):
        yield f"mm.{name}", _stored(tensor)
    for name, tensor in stream_tensors(folder):
        target = _target(name.removeprefix("vision_model."), layers)
        if target is not None:
            yield target, _stored(tensor)


def _target(name: str, layers: int) -> str | None:
    if name in _EMBEDDINGS:
        return _EMBEDDINGS[name]
    match = _LAYER.fullmatch(name)
    if match is None or int(match[1]) >= layers or match[2] not in _LAYER_PARTS:
        return None  # the text tower, the last norm, and layers above the selected one
    return f"v.blk.{match[1]}.{_LAYER_PARTS[match[2]]}.{match[3]}"


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    # llama.cpp computes with float32 or float16 matrices; vectors are always float32.
    half = tensor.ndim > 1 and tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.half() if half else tensor.float()
