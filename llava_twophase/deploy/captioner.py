"""Caption images with a trained projector: vision tower, projector and LLM by transformers' ``generate``.

Shapes: B images, L patch tokens, D tower width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import AutoTokenizer

from llava_twophase.cache.reader import FeatureCache
from llava_twophase.deploy.trained_projector import TrainedProjector, find_projector
from llava_twophase.errors import UserError
from llava_twophase.train.data.conversation import PlainTemplate
from llava_twophase.train.data.tokenizer import load_caption_tokenizer
from llava_twophase.train.loop.generated_captions import generate_captions
from llava_twophase.train.model.frozen_llm import FrozenLLM
from llava_twophase.train.model.llava import LlavaProjectorModel
from llava_twophase.train.model.load_llm import LoadedLLM, quantization, read_causal_lm
from llava_twophase.train.model.projector import build_projector
from llava_twophase.vision.images import BadImage, decode
from llava_twophase.vision.preprocess import Preprocessor
from llava_twophase.vision.tower import VisionTower

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_MODEL_MAX_LENGTH = 2048
ImageInput = str | Path | bytes | Image.Image


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
            UserError: ``bits`` needs a GPU and there is none.
        """
        name = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        if self.bits != 16 and not name.startswith("cuda"):
            raise UserError(f"--bits {self.bits} needs a CUDA device; omit --bits")
        return torch.device(name)


class Captioner:
    """Captions images as the trained model does: greedily, up to the newline that ends a caption.

    ``Captioner.load("runs/a")("image.jpg")`` returns a string.

    Args:
        projector: The trained projector and its settings.
        model: Projector and frozen LLM in evaluation mode.
        template: The ids in front of a caption.
        tokenizer: The LLM's Hugging Face tokenizer.
        cache: Features by image key; images that it has are not encoded.
    """

    def __init__(
        self,
        projector: TrainedProjector,
        model: LlavaProjectorModel,
        template: PlainTemplate,
        tokenizer: Any,
        cache: FeatureCache | None = None,
    ) -> None:
        self.projector, self.cache = projector, cache
        self.model, self.template = model, template
        self._tokenizer = tokenizer
        self._tower: VisionTower | None = None

    @classmethod
    def load(
        cls,
        run: str | Path | TrainedProjector,
        placement: Placement | None = None,
        feature_cache: str | Path | None = None,
        **overrides: Any,
    ) -> Captioner:
        """Load the models of a run.

        Args:
            run: An ``--output_dir``, a projector file, or what ``find_projector`` returned.
            placement: Device and dtype; the run's own by default.
            feature_cache: Cache whose images need no vision tower.
            overrides: As for ``find_projector``: ``llm``, ``vision_tower``, ``select_layer``, ...

        Returns:
            The captioner; the vision tower is loaded at the first image that the cache does not have.

        Raises:
            UserError: A model cannot be loaded, or the projector does not fit between them.
        """
        projector = run if isinstance(run, TrainedProjector) else find_projector(run, **overrides)
        placement = placement or Placement()
        device = placement.torch_device()
        dtype = DTYPES[placement.dtype] if placement.dtype else getattr(torch, projector.llm_dtype or "float32")
        cache = None if feature_cache is None else FeatureCache(feature_cache)
        weights = projector.weights()
        options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
        if placement.bits != 16:
            options["quantization_config"] = quantization(bits=placement.bits, dtype=dtype)
        llm = read_causal_lm(projector.llm, options)
        tokenizer = AutoTokenizer.from_pretrained(projector.llm)
        _require_width(projector, weights, llm.get_input_embeddings().weight.shape[1])
        module = load_projector(projector)
        # The image's length is needed only for the limit on captions, which generation has of its own.
        template = PlainTemplate(load_caption_tokenizer(projector.llm, tokenizer), _MODEL_MAX_LENGTH, image_tokens=1)
        frozen = FrozenLLM(LoadedLLM(llm), template.image_position)
        model = LlavaProjectorModel(frozen, module.to(device)).eval()
        return cls(projector, model, template, tokenizer, cache)

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
        """Return the features of some images, ``[B, L, D]`` on the captioner's device.

        Raises:
            UserError: An image cannot be used.
        """
        keys = [image if isinstance(image, str) else None for image in images]
        if self.cache is not None and all(key is not None and key in self.cache for key in keys):
            return self.cache.read_tensor([str(key) for key in keys]).to(self.device)
        rows = [self._features_of(image) for image in images]
        return torch.stack(rows)

    @torch.inference_mode()
    def caption_features(self, features: torch.Tensor) -> list[str]:
        """Return one caption for each row of features ``[B, L, D]``."""
        return generate_captions(self.model, self.template, self._tokenizer, features)

    def _features_of(self, image: ImageInput) -> torch.Tensor:
        if self.cache is not None and isinstance(image, str) and image in self.cache:
            return self.cache.read_tensor([image])[0].to(self.device).float()
        tower = self._load_tower()
        try:
            crop = torch.from_numpy(tower.preprocessor.crop(open_image(image)))
        except BadImage as error:
            raise UserError(f"{image if isinstance(image, (str, Path)) else 'the image'}: {error}") from None
        return tower.encode(crop[None])[0].float()

    def _load_tower(self) -> VisionTower:
        if self._tower is None:
            projector = self.projector
            preprocessor = Preprocessor(projector.vision_tower, projector.image_aspect_ratio)
            dtype = getattr(torch, projector.tower_dtype or "float32")
            self._tower = VisionTower(
                name=projector.vision_tower,
                preprocessor=preprocessor,
                select_layer=projector.select_layer,
                select_feature=projector.select_feature,
                dtype=dtype,
                device=self.device,
            )
        return self._tower


def open_image(image: ImageInput) -> Image.Image:
    """Decode an image as training does.

    Raises:
        UserError: It cannot be read or decoded.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        return decode(image if isinstance(image, bytes) else Path(image).read_bytes())
    except OSError as error:
        raise UserError(f"{image!s} cannot be read: {error.strerror or error}") from None
    except BadImage as error:
        name = "the image" if isinstance(image, bytes) else str(image)
        raise UserError(f"{name}: {error}") from None


def load_projector(run: str | Path | TrainedProjector, **overrides: Any) -> nn.Module:
    """Load a trained projector as a module, without its LLM and tower.

    Args:
        run: An ``--output_dir``, a projector file, or what ``find_projector`` returned.
        overrides: As for ``find_projector``.

    Returns:
        A module ``[B, L, D] -> [B, L, H]`` on the CPU, in the dtype of its file.

    Raises:
        UserError: The file cannot be read, or its shapes do not form the projector that its configuration says.
    """
    projector = run if isinstance(run, TrainedProjector) else find_projector(run, **overrides)
    weights = projector.weights()
    matrices = [tensor for tensor in weights.values() if tensor.ndim == 2]
    module = build_projector(projector.projector_type, matrices[0].shape[1], matrices[-1].shape[0])
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != expected:
        raise UserError(f"{projector.path} has {found}, but a {projector.projector_type} projector has {expected}")
    module.to(matrices[0].dtype).load_state_dict(weights)
    return module.requires_grad_(False)


def _require_width(projector: TrainedProjector, weights: dict[str, torch.Tensor], width: int) -> None:
    last = [tensor for tensor in weights.values() if tensor.ndim == 2][-1]
    if last.shape[0] != width:
        raise UserError(
            f"{projector.path} gives features of width {last.shape[0]}, but {projector.llm} takes {width}; give the "
            "LLM that it was trained with"
        )
