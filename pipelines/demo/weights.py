"""The two fetched weight files, as the model folders that `--vision_tower` and `--model_name_or_path` take."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_twophase.errors import UserError
from pipelines.demo.fetch import DINOV2_SMALL, SMOLLM2_135M, cache_folder

logger = logging.getLogger(__name__)

DINOV2_CONFIG: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "patch_size": 14,
    "image_size": 518,  # the position table's size; other sizes interpolate it
}
IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]
PIL_BICUBIC = 3


def dinov2_folder(onnx_path: Path, crop: int) -> Path:
    """Return DINOv2-small's model folder in the cache folder, converting on the first call only.

    Args:
        onnx_path: `vit_s_focus.onnx`.
        crop: Side in pixels of the square crop that the processor makes; a multiple of 14.

    Raises:
        UserError: A package of the `demo` extra is missing.
    """
    name = f"dinov2-small-{crop}px-{DINOV2_SMALL.sha256[:8]}"
    return _converted(name, lambda folder: convert_dinov2(onnx_path, folder, crop))


def smollm2_folder(gguf_path: Path) -> Path:
    """Return SmolLM2-135M's model folder in the cache folder, converting on the first call only.

    Args:
        gguf_path: `SmolLM2-135M-Instruct.Q4_1.gguf`.

    Raises:
        UserError: A package of the `demo` extra is missing.
    """
    return _converted(f"smollm2-135m-{SMOLLM2_135M.sha256[:8]}", lambda folder: convert_smollm2(gguf_path, folder))


def _converted(name: str, convert: Callable[[Path], None]) -> Path:
    """Return the model folder `name`; it is converted in a temporary folder and renamed when complete."""
    folder = cache_folder() / "models" / name
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".convert-", dir=folder.parent))
    try:
        logger.info("converting the weights to a model folder: %s", folder)
        convert(scratch)
        scratch.replace(folder)
    except ImportError as error:
        raise UserError(
            f"converting the demo's weights needs the demo extra ({error}): pip install '.[demo]'"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def convert_dinov2(onnx_path: Path, folder: Path, crop: int) -> None:
    """Write DINOv2-small, read from the saliency model's ONNX file, as a transformers model folder.

    Args:
        onnx_path: `vit_s_focus.onnx`; its head (`decoder.*`) is ignored.
        folder: Existing empty folder; receives config.json, model.safetensors (float32) and preprocessor_config.json.
        crop: Side of the square crop in pixels.
    """
    import torch
    from transformers import Dinov2Config, Dinov2Model

    model = Dinov2Model(Dinov2Config(**DINOV2_CONFIG))
    state = {name: torch.from_numpy(array.copy()) for name, array in dinov2_arrays(onnx_path).items()}
    # The mask token serves DINOv2's own training only; an exported graph has none.
    state["embeddings.mask_token"] = torch.zeros(1, DINOV2_CONFIG["hidden_size"])
    model.load_state_dict(state)  # strict: every tensor of the model must be found
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": crop},
        "do_center_crop": True,
        "crop_size": {"height": crop, "width": crop},
        "resample": PIL_BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")


def dinov2_arrays(onnx_path: Path) -> dict[str, Any]:
    """Return the backbone's tensors as float32 numpy arrays under the names of `Dinov2Model.state_dict()`.

    Most initializers carry their parameter's name. The exporter transposed linear weights and lost their names, as
    with the two halves of the position table: those are found by the node that uses them.
    """
    import numpy
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(onnx_path)).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    named = {name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")}
    table = {}
    for node in graph.node:
        constants = [arrays[name] for name in node.input if name.startswith("onnx::") and name in arrays]
        if node.op_type == "MatMul" and constants:
            # "/backbone/encoder/layer.0/mlp/fc1/MatMul" -> "encoder.layer.0.mlp.fc1.weight", [in, out] -> [out, in]
            parts = node.name.split("/")[2:-1]
            named[".".join(parts) + ".weight"] = constants[0].T
        elif node.name.startswith("/backbone/embeddings/") and constants:
            table[constants[0].shape[1]] = constants[0]  # [1, 1, 384] for CLS, [1, 1369, 384] for the patches
    named["embeddings.position_embeddings"] = numpy.concatenate([table[1], table[37 * 37]], axis=1)
    return {_current_name(name): array for name, array in named.items()}


def _current_name(name: str) -> str:
    """Translate the exporter's names to those of transformers 5 ("attention.attention.query" -> "attention.q_proj")."""
    for old, new in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        name = name.replace(f"attention.attention.{old}", f"attention.{new}")
    return name.replace("attention.output.dense", "attention.o_proj")


def convert_smollm2(gguf_path: Path, folder: Path) -> None:
    """Write SmolLM2-135M, dequantised from its GGUF file, as a plain model folder with its tokenizer.

    Args:
        gguf_path: `SmolLM2-135M-Instruct.Q4_1.gguf`.
        folder: Existing empty folder; receives config.json, model.safetensors (bfloat16) and the tokenizer's files.
    """
    import gguf  # noqa: F401  (transformers needs it; imported here so that the error names the missing package)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    name, file = str(gguf_path.parent), gguf_path.name
    quantised = AutoModelForCausalLM.from_pretrained(name, gguf_file=file, dtype=torch.float32)
    # transformers cannot save a model that was loaded from GGUF, so its tensors are copied into a new one.
    config = quantised.config.to_dict()
    config.pop("quantization_config", None)
    plain = LlamaForCausalLM(LlamaConfig.from_dict(config))
    plain.load_state_dict(quantised.state_dict())
    plain.bfloat16()  # as SmolLM2 was published; the values have four bits
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(name, gguf_file=file).save_pretrained(folder)
