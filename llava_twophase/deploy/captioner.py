"""Caption images with a trained projector: vision tower, projector and LLM by transformers' ``generate``.

Shapes: B images, L patch tokens, D tower width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_twophase.cache.joined import open_caches
from llava_twophase.deploy.image_features import ImageFeatures, ImageInput
from llava_twophase.deploy.trained_projector import TrainedProjector, find_projector, load_projector
from llava_twophase.devices import choose_device
from llava_twophase.errors import UserError
from llava_twophase.hub import use_cache_if_unreachable
from llava_twophase.train.data.conversation import PlainTemplate
from llava_twophase.train.data.tokenizer import load_caption_tokenizer
from llava_twophase.train.llm_files import load_config_and_tokenizer
from llava_twophase.train.loop.generated_captions import generate_captions
from llava_twophase.train.model.frozen_llm import FrozenLLM
from llava_twophase.train.model.input_probe import check_embedding_input
from llava_twophase.train.model.llava import LlavaProjectorModel
from llava_twophase.train.model.load_llm import LoadedLLM, quantization, read_causal_lm

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_MODEL_MAX_LENGTH = 2048


@dataclass(frozen=True)
class Placement:
    """Where and in which precision the models run.

    Attributes:
        device: ``auto`` (a GPU if there is one), or a torch device.
        dtype: A key of ``DTYPES``; None takes what the run was trained with.
        bits: 16, or 8 or 4 for an LLM quantized with bitsandbytes on a GPU.
    """

    device: str = "auto"
    dtype: str | None = None
    bits: int = 16

    def torch_device(self) -> torch.device:
        """Return the device.

        Raises:
            UserError: The device cannot be used, or ``bits`` needs a GPU.
        """
        device = choose_device(self.device)
        if self.bits != 16 and device.type != "cuda":
            raise UserError(f"--bits {self.bits} needs a CUDA device; omit --bits")
        return device

    def llm_options(self, projector: TrainedProjector) -> dict[str, Any]:
        """Return the keyword arguments of ``from_pretrained`` for the LLM of a projector."""
        dtype = DTYPES[self.dtype] if self.dtype else getattr(torch, projector.llm_dtype or "float32")
        options: dict[str, Any] = {"dtype": dtype, "device_map": {"": self.torch_device()}}
        if self.bits != 16:
            options["quantization_config"] = quantization(bits=self.bits, dtype=dtype)
        return options


class Captioner:
    """Captions images as the trained model does: greedily, up to the newline that ends a caption.

    ``Captioner.load("runs/a")("image.jpg")`` returns a string.

    Args:
        model: Projector and frozen LLM in evaluation mode.
        images: Gives the features of images.
        template: The ids in front of a caption.
        tokenizer: The LLM's Hugging Face tokenizer.
    """

    def __init__(
        self, model: LlavaProjectorModel, images: ImageFeatures, template: PlainTemplate, tokenizer: Any
    ) -> None:
        self.model, self.images = model, images
        self.template = template
        self._tokenizer = tokenizer

    @classmethod
    def load(
        cls,
        run: str | Path | TrainedProjector,
        placement: Placement | None = None,
        feature_cache: str | Path | Sequence[str | Path] | None = None,
        **overrides: Any,
    ) -> Captioner:
        """Load the models of a run. Everything that can be wrong is checked before the LLM's weights are read.

        Args:
            run: An ``--output_dir``, a projector file, or what ``find_projector`` returned.
            placement: Device and dtype; the run's own by default.
            feature_cache: Cache whose images need no vision tower; for joined towers the cache of each, in their order.
            overrides: As for ``find_projector``: ``llm``, ``vision_tower``, ``select_layer``, ...

        Returns:
            The captioner; the vision tower is loaded at the first image that the cache does not have.

        Raises:
            UserError: A model cannot be loaded, the projector does not fit between them, or the cache was made with a
                tower or settings that differ from the projector's.
        """
        projector = run if isinstance(run, TrainedProjector) else find_projector(run, **overrides)
        placement = placement or Placement()
        use_cache_if_unreachable([projector.llm, *projector.vision_towers])
        options = placement.llm_options(projector)
        device = options["device_map"][""]
        module = load_projector(projector)
        config, tokenizer = load_config_and_tokenizer(projector.llm)
        _require_width(projector, module, config.get_text_config().hidden_size)
        paths = [feature_cache] if isinstance(feature_cache, (str, Path)) else feature_cache
        cache = open_caches(paths, projector.interpolate_patch_grid) if paths else None
        images = ImageFeatures(projector, device, cache)
        # The length of the image only limits the caption, which generation limits itself.
        template = PlainTemplate(load_caption_tokenizer(projector.llm, tokenizer), _MODEL_MAX_LENGTH, image_tokens=1)
        llm = read_causal_lm(projector.llm, options)
        check_embedding_input(projector.llm, llm.eval())
        frozen = FrozenLLM(LoadedLLM(llm), template.image_position)
        model = LlavaProjectorModel(frozen, module.to(device)).eval()
        return cls(model, images, template, tokenizer)

    @property
    def device(self) -> torch.device:
        """The device of projector and LLM."""
        return next(self.model.mm_projector.parameters()).device

    def __call__(self, image: ImageInput) -> str:
        """Return the caption of one image: a path, an image key of the cache, the bytes of a file, or a PIL image.

        Raises:
            UserError: The image cannot be used.
        """
        return self.caption_features(self.features([image]))[0]

    def features(self, images: Sequence[ImageInput]) -> torch.Tensor:
        """Return the features of some images, float32 ``[B, L, D]`` on the captioner's device.

        Raises:
            UserError: An image cannot be used.
        """
        return self.images.encode([self.images.prepare(image) for image in images])

    @torch.inference_mode()
    def caption_features(self, features: torch.Tensor) -> list[str]:
        """Return one caption for each row of features ``[B, L, D]``."""
        return generate_captions(self.model, self.template, self._tokenizer, features)


def _require_width(projector: TrainedProjector, module: torch.nn.Module, width: int) -> None:
    spec = projector.spec
    found = list(module.parameters())[-1].shape[0] if spec is None else spec.llm_width  # the bias of the last layer
    if found != width:
        raise UserError(
            f"{projector.path} gives features of width {found}, but {projector.llm} takes {width}; give the LLM that "
            "it was trained with"
        )
