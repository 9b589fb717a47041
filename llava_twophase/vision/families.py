"""The families of vision towers that are supported, one row each: what is known about a tower beside its configuration.

To add a family, add a row to ``FAMILIES`` and a tiny model to ``tests/vision/tiny_towers.py``. The parity test compares
every layer with the ``hidden_states`` of the model in transformers, and the tables in ``docs/towers.md`` and the
README are made from the rows (``python tests/docs_towers.py``).

A family fits if its model in transformers takes ``pixel_values [B, 3, S, S]``, counts its layers in
``num_hidden_layers``, and returns ``last_hidden_state [B, P + G * G, D]``: P prefix tokens (CLS, registers), then the
patches of a square grid, row by row. It imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Published:
    """A published model of a family, for the tables of the documentation.

    Attributes:
        name: Hub id.
        image_size: Side of its crop in pixels.
        patch_size: Side of a patch in pixels.
        width: Channels of its features.
    """

    name: str
    image_size: int
    patch_size: int
    width: int

    @property
    def grid(self) -> int:
        """Return the number of patches along each side of the crop."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class TowerFamily:
    """What the tower needs to know about a family.

    Attributes:
        title: Its name for people.
        model_class: Its class in transformers.
        norm: Attribute of the norm after the last layer. LLaVA reads hidden states before it, so it is removed.
        positions: How positions are represented, and whether they scale to other resolutions.
        processor: The image processor of its published models.
        published: Published models.
        leading_tokens: Tokens before the patches that do not depend on the configuration: 1 for CLS, 2 for CLS and
            distillation.
        registers: Field of the configuration with the number of register tokens, which are between CLS and the patches.
        any_size: Whether the crop may be any multiple of the patch size; otherwise it is the configuration's size.
        config_fields: Fields of the configuration that change a feature value, beside those that all families share.
        without_head: Fields of the configuration that build the model without its pooling head.
        init: Arguments of the class that build it without its pooling head.
    """

    title: str
    model_class: str
    norm: str
    positions: str
    processor: str
    published: tuple[Published, ...]
    leading_tokens: int = 1
    registers: str = ""
    any_size: bool = False
    config_fields: tuple[str, ...] = ()
    without_head: Mapping[str, Any] = field(default_factory=dict)
    init: Mapping[str, Any] = field(default_factory=dict)

    def prefix_tokens(self, config: Any) -> int:
        """Return the number of tokens before the patches, for a configuration of this family."""
        return self.leading_tokens + (int(getattr(config, self.registers)) if self.registers else 0)


_NO_POOLER = {"add_pooling_layer": False}
_ONE_SIZE = "learned, one resolution"
_RELATIVE = ("use_relative_position_bias", "use_shared_relative_position_bias", "use_absolute_position_embeddings")

FAMILIES: dict[str, TowerFamily] = {
    "clip_vision_model": TowerFamily(
        title="CLIP",
        model_class="CLIPVisionModel",
        norm="post_layernorm",
        positions=_ONE_SIZE,
        processor="CLIPImageProcessor",
        published=(Published("openai/clip-vit-large-patch14-336", 336, 14, 1024),),
    ),
    "siglip_vision_model": TowerFamily(
        title="SigLIP, SigLIP 2",
        model_class="SiglipVisionModel",
        norm="post_layernorm",
        positions=_ONE_SIZE,
        processor="SiglipImageProcessor",
        published=(
            Published("google/siglip-so400m-patch14-384", 384, 14, 1152),
            Published("google/siglip2-large-patch16-384", 384, 16, 1024),
        ),
        leading_tokens=0,
        without_head={"vision_use_head": False},
    ),
    "dinov2": TowerFamily(
        title="DINOv2",
        model_class="Dinov2Model",
        norm="layernorm",
        positions="learned, interpolated to any multiple of the patch size",
        processor="BitImageProcessor",
        published=(Published("facebook/dinov2-large", 224, 14, 1024),),
        any_size=True,
    ),
    "dinov2_with_registers": TowerFamily(
        title="DINOv2 with registers",
        model_class="Dinov2WithRegistersModel",
        norm="layernorm",
        positions="learned, interpolated to any multiple of the patch size",
        processor="BitImageProcessor",
        published=(Published("facebook/dinov2-with-registers-large", 224, 14, 1024),),
        registers="num_register_tokens",
        any_size=True,
        config_fields=("num_register_tokens",),
    ),
    "dinov3_vit": TowerFamily(
        title="DINOv3 ViT",
        model_class="DINOv3ViTModel",
        norm="norm",
        positions="rotary, any multiple of the patch size",
        processor="DINOv3ViTImageProcessor",
        published=(Published("facebook/dinov3-vitl16-pretrain-lvd1689m", 224, 16, 1024),),
        registers="num_register_tokens",
        any_size=True,
        config_fields=("num_register_tokens", "rope_theta", "use_gated_mlp"),
    ),
    "metaclip_2_vision_model": TowerFamily(
        title="MetaCLIP 2",
        model_class="MetaClip2VisionModel",
        norm="post_layernorm",
        positions=_ONE_SIZE,
        processor="CLIPImageProcessor",
        published=(Published("facebook/metaclip-2-worldwide-huge-quickgelu", 224, 14, 1280),),
    ),
    "aimv2_vision_model": TowerFamily(
        title="AIMv2",
        model_class="Aimv2VisionModel",
        norm="rms_norm",
        positions="learned, or sines in native models; one resolution",
        processor="CLIPImageProcessor",
        published=(Published("apple/aimv2-large-patch14-336", 336, 14, 1024),),
        leading_tokens=0,
        config_fields=("is_native", "rms_norm_eps", "mlp_bias"),
        without_head={"use_head": False},
    ),
    "mlcd_vision_model": TowerFamily(
        title="MLCD",
        model_class="MLCDVisionModel",
        norm="post_layernorm",
        positions="rotary, one resolution",
        processor="CLIPImageProcessor",
        published=(Published("DeepGlint-AI/mlcd-vit-bigG-patch14-448", 448, 14, 1664),),
    ),
    "chinese_clip_vision_model": TowerFamily(
        title="Chinese-CLIP",
        model_class="ChineseCLIPVisionModel",
        norm="post_layernorm",
        positions=_ONE_SIZE,
        processor="ChineseCLIPImageProcessor",
        published=(Published("OFA-Sys/chinese-clip-vit-large-patch14-336px", 336, 14, 1024),),
    ),
    "vit": TowerFamily(
        title="ViT",
        model_class="ViTModel",
        norm="layernorm",
        positions=_ONE_SIZE,
        processor="ViTImageProcessor",
        published=(Published("google/vit-large-patch16-224", 224, 16, 1024),),
        init=_NO_POOLER,
    ),
    "deit": TowerFamily(
        title="DeiT",
        model_class="DeiTModel",
        norm="layernorm",
        positions=_ONE_SIZE,
        processor="DeiTImageProcessor",
        published=(Published("facebook/deit-base-distilled-patch16-224", 224, 16, 768),),
        leading_tokens=2,
        init=_NO_POOLER,
    ),
    "beit": TowerFamily(
        title="BEiT",
        model_class="BeitModel",
        norm="layernorm",
        positions="learned relative biases, one resolution",
        processor="BeitImageProcessor",
        published=(Published("microsoft/beit-large-patch16-224", 224, 16, 1024),),
        config_fields=_RELATIVE,
        init=_NO_POOLER,
    ),
    "data2vec-vision": TowerFamily(
        title="Data2Vec vision",
        model_class="Data2VecVisionModel",
        norm="layernorm",
        positions="learned relative biases, one resolution",
        processor="BeitImageProcessor",
        published=(Published("facebook/data2vec-vision-large", 224, 16, 1024),),
        config_fields=_RELATIVE,
        init=_NO_POOLER,
    ),
    "ijepa": TowerFamily(
        title="I-JEPA",
        model_class="IJepaModel",
        norm="layernorm",
        positions=_ONE_SIZE,
        processor="ViTImageProcessor",
        published=(Published("facebook/ijepa_vith14_1k", 224, 14, 1280),),
        leading_tokens=0,
        init=_NO_POOLER,
    ),
    "vit_msn": TowerFamily(
        title="ViT-MSN",
        model_class="ViTMSNModel",
        norm="layernorm",
        positions=_ONE_SIZE,
        processor="ViTImageProcessor",
        published=(Published("facebook/vit-msn-large", 224, 16, 1024),),
    ),
}
"""The supported families: the ``model_type`` of the tower's configuration, and what is known about it."""

UNSUPPORTED = {
    "siglip2_vision_model": "a NaFlex model, whose number of patches depends on the image; SigLIP 2 models of fixed "
    "resolution, such as google/siglip2-large-patch16-384, are supported",
    "timm_wrapper": "a timm model, whose hidden states in transformers have no prefix tokens and whose image processor "
    "needs torchvision; use the model's transformers version if there is one",
    "vit_mae": "a model that drops random patches",
}
"""Towers that are refused for a reason that is worth saying: ``model_type``, and what it is."""


def refusal(model_type: str) -> str:
    """Return why a tower of another family is refused, with the list of those that are supported."""
    found = f"{model_type}: {UNSUPPORTED[model_type]}" if model_type in UNSUPPORTED else model_type
    return f"is a {found}; supported towers: {', '.join(FAMILIES)}"
