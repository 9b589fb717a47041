"""The frozen vision tower, built only up to the deepest selected layer: crops to patch features.

Shapes: B images, S the crop's side, L tokens out of the tower (577 for CLIP-L/14-336), D its width (1024).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import logging as transformers_logging

from llava_twophase.compat import unpartitioned
from llava_twophase.errors import UserError
from llava_twophase.layers import Layers, as_tuple, from_the_end
from llava_twophase.multi_scale import multi_scale_features
from llava_twophase.vision.families import FAMILIES, TowerFamily, refusal
from llava_twophase.vision.preprocess import Preprocessor

SELECT_FEATURES = ("patch", "cls_patch")
# Larger batches are not faster on a CPU. Two images use all cores, and their activations stay in the caches and in
# memory that the allocator keeps (CLIP-L/14-336 in bf16 on two cores: 0.71 of the matmul rate, with eight images 0.65).
_CPU_IMAGES = 2
# Fields of a tower's configuration that change a feature value; no tower has all of them. A family may add others.
_CONFIG_FIELDS = (
    "model_type", "hidden_size", "intermediate_size", "mlp_ratio", "num_attention_heads", "num_channels",
    "image_size", "patch_size", "hidden_act", "layer_norm_eps", "qkv_bias", "use_swiglu_ffn",
)  # fmt: skip


class VisionTower:
    """A frozen vision tower of one of ``FAMILIES`` that turns crops into patch features.

    It is deliberately not an ``nn.Module``: code that iterates over parameters must not save, cast or train it.

    Args:
        name: Hub id or folder.
        preprocessor: The processor half that runs on the device.
        select_layer: Which hidden state, as in LLaVA: -2 is the second to last. Several are concatenated on channels
            in their order.
        select_feature: ``patch`` drops the CLS token where there is one, ``cls_patch`` keeps it. Register tokens are
            always dropped.
        dtype: Compute dtype.
        device: Where it runs.

    Attributes:
        grid: Rows and columns of patches, (24, 24) for CLIP-L/14-336.
        feature_shape: Tokens and width of one image's features, (576, 1024) for CLIP-L/14-336 patches.

    Raises:
        UserError: The tower cannot be loaded, is of another kind, or has no such layer.
    """

    def __init__(
        self,
        name: str,
        preprocessor: Preprocessor,
        select_layer: Layers = -2,
        select_feature: str = "patch",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if select_feature not in SELECT_FEATURES:
            raise UserError(f"--mm_vision_select_feature {select_feature}: expected {' or '.join(SELECT_FEATURES)}")
        self.name = name
        self.preprocessor = preprocessor
        self.dtype = dtype
        self.device = torch.device(device)
        config = _vision_config(name)
        family = FAMILIES[config.model_type]
        self._prefix = family.prefix_tokens(config)
        self._keep_cls = select_feature == "cls_patch" and family.leading_tokens > 0
        side = _grid_side(name, family, config, preprocessor.tile_size)
        scales = preprocessor.s2_scales
        if scales and select_feature != "patch":
            raise UserError(f"--mm_vision_select_feature {select_feature}: with --s2 True only patch is possible")
        self.grid = (side, side)
        self._depths = _depths(config.num_hidden_layers, as_tuple(select_layer))
        width = config.hidden_size * len(self._depths) * max(1, len(scales))
        self.feature_shape = (side * side + self._keep_cls, width)
        spelled = from_the_end(self._depths, config.num_hidden_layers)
        fields = (*_CONFIG_FIELDS, *family.config_fields)
        self._fingerprint: dict[str, Any] = {
            "tower": {
                **{field: getattr(config, field) for field in fields if hasattr(config, field)},
                "num_hidden_layers": config.num_hidden_layers,
                "attention": _attention(dtype),
            },
            "select_layer": spelled[0] if len(spelled) == 1 else spelled,
            "select_feature": select_feature,
            "image_aspect_ratio": preprocessor.image_aspect_ratio,
            "processor": preprocessor.settings(),
            "compute_dtype": str(dtype).removeprefix("torch."),
        }
        if scales:
            self._fingerprint["s2_scales"] = list(scales)
        config.num_hidden_layers = max(self._depths)
        self._model = _load(family, name, config, dtype)
        setattr(self._model, family.norm, nn.Identity())
        self._model.requires_grad_(False).eval().to(self.device)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights, on the device."""
        return sum(parameter.nbytes for parameter in self._model.parameters())

    def fingerprint(self) -> dict[str, Any]:
        """Return everything that changes a feature value; hashes the weights, so it takes a second or two."""
        fingerprint = dict(self._fingerprint)
        fingerprint["tower"] = {**fingerprint["tower"], "weights_sha256": _weights_hash(self._model)}
        return fingerprint

    @torch.inference_mode()
    def encode(self, crops: torch.Tensor) -> torch.Tensor:
        """Turn crops into features.

        Args:
            crops: ``uint8 [B, S, S, 3]`` on any device.

        Returns:
            ``[B, L, D]`` in the compute dtype on the tower's device, without the CLS token for ``patch``.
        """
        crops = crops.to(self.device, non_blocking=True)
        size = _CPU_IMAGES if self.device.type == "cpu" else len(crops)
        features = [self._encode(part) for part in crops.split(max(1, size))]
        return features[0] if len(features) == 1 else torch.cat(features)

    def _encode(self, crops: torch.Tensor) -> torch.Tensor:
        scales = self.preprocessor.s2_scales
        if not scales:
            return self._features(self.preprocessor.pixel_values(crops, self.dtype))  # [B, 3, S, S] -> [B, L, D]
        # LLaVA parity: scales are resampled in float32, before the pixels are rounded to the compute dtype.
        pixels = self.preprocessor.pixel_values(crops)
        return multi_scale_features(lambda tiles: self._features(tiles.to(self.dtype)), pixels, scales)

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden = self._hidden_states(pixels)  # [B, P + G * G, D]
        patches = hidden[:, self._prefix :]
        if not self._keep_cls:
            return patches
        return hidden if self._prefix == 1 else torch.cat([hidden[:, :1], patches], dim=1)

    def _hidden_states(self, pixels: torch.Tensor) -> torch.Tensor:
        if len(self._depths) == 1:
            last: torch.Tensor = self._model(pixel_values=pixels).last_hidden_state
            return last
        states = self._model(pixel_values=pixels, output_hidden_states=self._depths).hidden_states
        return torch.cat([states[depth] for depth in self._depths], dim=-1)


def _vision_config(name: str) -> PretrainedConfig:
    try:
        found = AutoConfig.from_pretrained(name)
    except Exception as error:  # of all kinds, as the file may hold anything
        raise UserError(f"--vision_tower {name} could not be loaded: {type(error).__name__}: {error}") from error
    config: PretrainedConfig = getattr(found, "vision_config", found)
    if config.model_type not in FAMILIES:
        raise UserError(f"--vision_tower {name} {refusal(config.model_type)}")
    return config


def _grid_side(name: str, family: TowerFamily, config: PretrainedConfig, image_size: int) -> int:
    fits = image_size % config.patch_size == 0 if family.any_size else image_size == config.image_size
    if not fits:
        raise UserError(
            f"--vision_tower {name}: its processor crops to {image_size} px, "
            f"but the tower takes {config.image_size} px in patches of {config.patch_size}"
        )
    return image_size // int(config.patch_size)


def _depths(num_hidden_layers: int, layers: Sequence[int]) -> list[int]:
    depths = [_depth(num_hidden_layers, layer) for layer in layers]
    if len(set(depths)) < len(depths):
        raise UserError(f"--mm_vision_select_layer {' '.join(map(str, layers))}: a layer is listed twice")
    return depths


def _depth(num_hidden_layers: int, select_layer: int) -> int:
    # hidden_states[0] is the embedding's output, so a tower of N layers has N + 1 of them.
    depth = select_layer + num_hidden_layers + 1 if select_layer < 0 else select_layer
    if not 0 <= depth <= num_hidden_layers:
        raise UserError(
            f"--mm_vision_select_layer {select_layer}: the tower has hidden states 0 to {num_hidden_layers} "
            f"(or -{num_hidden_layers + 1} to -1)"
        )
    return depth


def _load(family: TowerFamily, name: str, config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    for option, value in family.without_head.items():
        setattr(config, option, value)
    try:
        # ZeRO-3 is for the model that is trained.
        with _quiet(), unpartitioned():
            model: nn.Module
            model, info = getattr(transformers, family.model_class).from_pretrained(
                name,
                config=config,
                dtype=dtype,
                attn_implementation=_attention(dtype),
                output_loading_info=True,
                **family.init,
            )
    except Exception as error:  # of all kinds, as above
        raise UserError(
            f"--vision_tower {name}: its weights could not be loaded: {type(error).__name__}: {error}"
        ) from error
    missing = set(info["missing_keys"]) | {entry[0] for entry in info["mismatched_keys"]}
    if missing:
        raise UserError(f"--vision_tower {name}: the checkpoint lacks or misshapes {sorted(missing)[:5]}")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    # transformers reports the weights of the layers above select_layer, which are not built, as unexpected.
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _attention(dtype: torch.dtype) -> str:
    # Eager attention is bit-equal to LLaVA's features in float32 and nearest to them in float16. In bfloat16, LLaVA's
    # recipe and the fast way, rounding outweighs what the two kernels differ by.
    return "sdpa" if dtype == torch.bfloat16 else "eager"


def _weights_hash(model: nn.Module) -> str:
    # By content alone, in the compute dtype: the same weights under other tensor names or file formats hash the same.
    digests = []
    for parameter in model.parameters():
        tensor = parameter.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy() if tensor.ndim else tensor.reshape(1).view(torch.uint8).numpy())
        digests.append(digest.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()
