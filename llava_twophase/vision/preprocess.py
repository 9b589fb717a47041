"""Pictures to uint8 crops, and crops to the processor's pixel values on the device; knows nothing of towers.

Shapes: S the crop's side in pixels (336 for CLIP-L/14-336).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor

from llava_twophase.errors import UserError

ASPECT_RATIOS = ("square", "pad")
# What changes a pixel value, among all that a processor's configuration may hold.
SETTINGS = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size",
    "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std",
)  # fmt: skip


class Preprocessor:
    """A Hugging Face image processor in two halves: the crop (workers), and the normalisation (device).

    Only the Pillow processors are used: the torchvision ones resize differently, and LLaVA's features come from Pillow.

    Args:
        vision_tower: Hub id or folder with ``preprocessor_config.json``.
        image_aspect_ratio: ``square`` (the processor alone) or ``pad`` (a square canvas of the mean colour first).

    Raises:
        UserError: No processor there, a processor with other outputs than one square RGB crop, or an unknown ratio.
    """

    def __init__(self, vision_tower: str, image_aspect_ratio: str = "square") -> None:
        if image_aspect_ratio not in ASPECT_RATIOS:
            raise UserError(f"--image_aspect_ratio {image_aspect_ratio}: expected one of {', '.join(ASPECT_RATIOS)}")
        try:
            self._processor: Any = AutoImageProcessor.from_pretrained(vision_tower, backend="pil")
        except Exception as error:  # of all kinds, as its file may hold anything
            raise UserError(
                f"--vision_tower {vision_tower}: no image processor could be loaded: {type(error).__name__}: {error}"
            ) from error
        if self._processor.backend != "pil":
            raise UserError(f"--vision_tower {vision_tower}: {type(self._processor).__name__} has no Pillow version")
        self.image_aspect_ratio = image_aspect_ratio
        # LLaVA parity: the canvas is the mean cut to integers, (122, 116, 104) for CLIP.
        self._canvas = tuple(int(mean * 255) for mean in self._processor.image_mean)
        try:
            self._table = _normalization_table(self._processor)  # [3, 256] float32
            probe = self.crop(Image.new("RGB", (3, 2)))
        except ValueError as error:
            raise UserError(f"--vision_tower {vision_tower}: its image processor does not work: {error}") from error
        if probe.shape[0] != probe.shape[1]:
            raise UserError(f"--vision_tower {vision_tower}: its processor makes crops of {probe.shape}, not squares")
        self.image_size = int(probe.shape[0])

    def settings(self) -> dict[str, Any]:
        """Return what changes a pixel value: the processor's class and settings, for the fingerprint."""
        values = self._processor.to_dict()
        chosen = {name: values[name] for name in SETTINGS if values.get(name) is not None}
        return {"class": type(self._processor).__name__, **chosen}

    def crop(self, picture: Image.Image) -> np.ndarray:
        """Resize and crop one picture, as the processor does before it rescales.

        Args:
            picture: RGB picture of any size, 1 x 1 included.

        Returns:
            ``uint8 [S, S, 3]``.
        """
        if self.image_aspect_ratio == "pad":
            picture = _pad_to_square(picture, self._canvas)
        # The channel order is said, not inferred: a picture 3 pixels high would be taken for channels-first.
        output = self._processor(
            np.asarray(picture),
            input_data_format="channels_last",
            do_convert_rgb=False,
            do_rescale=False,
            do_normalize=False,
        )
        return np.ascontiguousarray(np.moveaxis(output["pixel_values"][0], 0, -1))

    def pixel_values(self, crops: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Normalise crops on their device, bit-equal to the processor.

        A processor's output depends on the channel and one of 256 values only, so a table of its own outputs is exact.

        Args:
            crops: ``uint8 [B, S, S, 3]``.
            dtype: Compute dtype; the table's float32 values are rounded to it, as a cast of the processor's are.

        Returns:
            ``[B, 3, S, S]`` in ``dtype``.
        """
        if self._table.device != crops.device:
            self._table = self._table.to(crops.device)
        channels_first = crops.permute(0, 3, 1, 2)  # [B, 3, S, S]
        table = self._table.to(dtype)
        planes = [table[channel][channels_first[:, channel].int()] for channel in range(3)]
        return torch.stack(planes, dim=1)  # [B, 3, S, S]


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


def _pad_to_square(picture: Image.Image, color: tuple[int, ...]) -> Image.Image:
    width, height = picture.size
    if width == height:
        return picture
    side = max(width, height)
    canvas = Image.new("RGB", (side, side), color)
    canvas.paste(picture, ((side - width) // 2, (side - height) // 2))
    return canvas
