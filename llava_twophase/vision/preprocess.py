"""Images to uint8 crops, and crops to the image processor's pixel values on the device.

Shapes: S side of the crop in pixels (336 for CLIP-L/14-336).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, BaseImageProcessor

from llava_twophase.errors import UserError
from llava_twophase.hub import download_advice, use_cache_if_unreachable
from llava_twophase.model_names import require_tower_folder
from llava_twophase.multi_scale import require_multiples
from llava_twophase.vision.images import OUT_OF_MEMORY, BadImage
from llava_twophase.vision.resize import (
    Canvas,
    Region,
    center_region,
    is_supported,
    resize_region,
    shortest_edge_size,
)

ASPECT_RATIOS = ("square", "pad")
# The settings of a processor's configuration that change a pixel value.
SETTINGS = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size",
    "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std",
)  # fmt: skip
# Image processors without a Pillow version, and the Pillow processor that takes the same settings. DINOv3's resizes
# float images with torchvision: the values differ by at most 1/255 before normalisation. The fingerprint has the class.
_PILLOW_VERSIONS = {"DINOv3ViTImageProcessor": "ViTImageProcessorPil"}
# The largest image that resizing or padding may make as a whole; of a larger one only the crop is computed.
_MAX_PIXELS = 1 << 25
# Longer images are refused: padding them to a square makes sums of a million pixels for each pixel of the crop.
_MAX_SIDE = 1 << 20


class Preprocessor:
    """A Hugging Face image processor in two parts: the crop (in workers), and the normalisation (on the device).

    Only the Pillow processors are used: the torchvision ones resize differently, and LLaVA's features come from Pillow.

    Args:
        vision_tower: Hub id or folder with ``preprocessor_config.json``.
        image_aspect_ratio: ``square`` (the processor alone) or ``pad`` (a square canvas of the mean colour first).
        s2_scales: Sides of ``--s2_scales``, smallest first; crops have the largest. None for one scale.

    Attributes:
        image_size: S.
        tile_size: Side of what the tower sees at once: S, or the smallest scale.

    Raises:
        UserError: There is no processor, its output is not one square RGB crop, or the ratio is unknown.
    """

    def __init__(self, vision_tower: str, image_aspect_ratio: str = "square", s2_scales: Sequence[int] = ()) -> None:
        if image_aspect_ratio not in ASPECT_RATIOS:
            raise UserError(f"--image_aspect_ratio {image_aspect_ratio}: expected one of {', '.join(ASPECT_RATIOS)}")
        self._processor = _load_processor(vision_tower)
        self.image_aspect_ratio = image_aspect_ratio
        self.s2_scales = tuple(s2_scales)
        # LLaVA parity: the canvas colour is the mean rounded down to integers, (122, 116, 104) for CLIP.
        self._color = tuple(int(mean * 255) for mean in self._processor.image_mean)
        try:
            self._table = _normalization_table(self._processor)  # [3, 256] float32
            probe = self._process(Image.new("RGB", (3, 2)))
        except ValueError as error:
            raise UserError(f"--vision_tower {vision_tower}: its image processor does not work: {error}") from error
        if probe.shape[0] != probe.shape[1]:
            raise UserError(f"--vision_tower {vision_tower}: its processor makes crops of {probe.shape}, not squares")
        self.image_size = self.tile_size = int(probe.shape[0])
        if self.s2_scales:
            require_multiples(self.s2_scales, self.tile_size, vision_tower)
            self.image_size = self.s2_scales[-1]
            self._processor = _load_processor(vision_tower, **_sizes(self._processor, self.image_size))

    def settings(self) -> dict[str, Any]:
        """Return the processor's class and the settings that change a pixel value, for the fingerprint."""
        values = self._processor.to_dict()
        chosen = {name: values[name] for name in SETTINGS if values.get(name) is not None}
        return {"class": type(self._processor).__name__, **chosen}

    def crop(self, image: Image.Image) -> np.ndarray:
        """Resize and crop one image, as the processor does before it rescales.

        Thin images take no more memory than others: only the pixels of the crop are computed, with the same values.

        Args:
            image: RGB image.

        Returns:
            ``uint8 [S, S, 3]``.

        Raises:
            BadImage: The image cannot be resized in bounded memory.
        """
        width, height = image.size
        try:
            canvas = self._canvas(width, height)
            largest = max(canvas.width * canvas.height, self._resized_pixels(canvas))
            if largest > max(_MAX_PIXELS, width * height):
                return self._crop_region(image, canvas)
            return self._process(_paste(image, canvas))
        except MemoryError:
            raise BadImage(f"cannot be resized: {OUT_OF_MEMORY} with {width} x {height} pixels") from None
        except (ValueError, OSError, RuntimeError) as error:
            raise BadImage(f"cannot be resized: {error} ({width} x {height} pixels)") from None

    def _process(self, image: Image.Image) -> np.ndarray:
        # The channel order is given, not inferred: an image 3 pixels high would be taken for channels-first.
        output = self._processor(
            np.asarray(image),
            input_data_format="channels_last",
            do_convert_rgb=False,
            do_rescale=False,
            do_normalize=False,
        )
        return np.ascontiguousarray(np.moveaxis(output["pixel_values"][0], 0, -1))

    def _canvas(self, width: int, height: int) -> Canvas:
        if self.image_aspect_ratio != "pad":
            return Canvas(width, height)
        side = max(width, height)
        return Canvas(side, side, (side - width) // 2, (side - height) // 2, self._color)

    def _resized_pixels(self, canvas: Canvas) -> int:
        edge = self._processor.size.get("shortest_edge") if self._processor.do_resize else None
        if not edge:
            return 0
        width, height = shortest_edge_size(canvas.width, canvas.height, edge)
        return width * height

    def _crop_region(self, image: Image.Image, canvas: Canvas) -> np.ndarray:
        size, region = self._resized_size(canvas), None
        if size is not None and max(image.size) <= _MAX_SIDE and is_supported(self._processor.resample):
            region = self._region(size)
        if size is None or region is None:
            raise ValueError("it is too long and thin")
        return resize_region(np.asarray(image), canvas, size, region, self._processor.resample)

    def _resized_size(self, canvas: Canvas) -> tuple[int, int] | None:
        size = self._processor.size if self._processor.do_resize else {}
        if size.get("shortest_edge") and not size.get("longest_edge"):
            return shortest_edge_size(canvas.width, canvas.height, size["shortest_edge"])
        if size.get("height") and size.get("width"):
            return size["width"], size["height"]
        return None

    def _region(self, size: tuple[int, int]) -> Region | None:
        if not getattr(self._processor, "do_center_crop", False):
            return Region(0, 0, *size)
        crop = self._processor.crop_size
        return center_region(size, (crop["width"], crop["height"]))

    def pixel_values(self, crops: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Normalise crops on their device, bit-equal to the processor.

        The processor's output depends on the channel and one of 256 values only, so a table of its outputs is exact.

        Args:
            crops: ``uint8 [B, S, S, 3]``.
            dtype: Compute dtype; the table's float32 values are rounded to it.

        Returns:
            ``[B, 3, S, S]`` in ``dtype``.
        """
        if self._table.device != crops.device:
            self._table = self._table.to(crops.device)
        channels_first = crops.permute(0, 3, 1, 2)  # [B, 3, S, S]
        table = self._table.to(dtype)
        planes = [table[channel][channels_first[:, channel].int()] for channel in range(3)]
        return torch.stack(planes, dim=1)  # [B, 3, S, S]


def _sizes(processor: Any, side: int) -> dict[str, Any]:
    # LLaVA parity: with S2, both the resized image and the crop have the largest scale.
    square = {"height": side, "width": side}
    return {"size": {"shortest_edge": side} if processor.size.get("shortest_edge") else square, "crop_size": square}


def _load_processor(vision_tower: str, **changes: Any) -> Any:
    require_tower_folder(str(vision_tower))
    use_cache_if_unreachable([str(vision_tower)])
    try:
        settings, _ = BaseImageProcessor.get_image_processor_dict(vision_tower)
        kind = str(settings.get("image_processor_type")).removesuffix("Fast")
        if kind in _PILLOW_VERSIONS:
            processor: Any = getattr(transformers, _PILLOW_VERSIONS[kind]).from_pretrained(vision_tower, **changes)
        else:
            from_pretrained: Any = AutoImageProcessor.from_pretrained
            processor = from_pretrained(vision_tower, backend="pil", **changes)
    except Exception as error:  # any type: the file may hold anything
        raise UserError(
            f"--vision_tower {vision_tower}: no image processor could be loaded: {type(error).__name__}: {error}"
            f"{download_advice(str(vision_tower))}"
        ) from error
    if processor.backend != "pil":
        raise UserError(f"--vision_tower {vision_tower}: {type(processor).__name__} has no Pillow version")
    return processor


def _normalization_table(processor: Any) -> torch.Tensor:
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), (3, 16, 16))
    output = processor(
        np.ascontiguousarray(ramp),
        input_data_format="channels_first",
        do_convert_rgb=False,
        do_resize=False,
        do_center_crop=False,
    )
    return torch.from_numpy(np.asarray(output["pixel_values"][0], dtype=np.float32).reshape(3, 256))


def _paste(image: Image.Image, canvas: Canvas) -> Image.Image:
    if image.size == (canvas.width, canvas.height):
        return image
    padded = Image.new("RGB", (canvas.width, canvas.height), canvas.color)
    padded.paste(image, (canvas.left, canvas.top))
    return padded
