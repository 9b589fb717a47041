"""Write a tiny model of each family of vision towers with the image processor of its published models.

Crops are 56 px in 14 px patches: 16 patches of 32 channels, four layers. `SHAPES` has what a family's configuration
needs beside that; `PROCESSORS` has its `preprocessor_config.json`, shortened from the published ones.
"""

import transformers

import tiny
from llava_twophase.vision.families import FAMILIES

MLP_RATIO = {"mlp_ratio": 2, "intermediate_size": None}
RELATIVE = {"use_relative_position_bias": True, "layer_scale_init_value": 0.1}
SHAPES = {
    "dinov2": MLP_RATIO,
    "dinov2_with_registers": {**MLP_RATIO, "num_register_tokens": 3},
    "dinov3_vit": {"num_register_tokens": 3},
    "beit": RELATIVE,
    "data2vec-vision": RELATIVE,
}
SQUARE = {"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}
HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
PROCESSORS = {
    "CLIPImageProcessor": tiny.CLIP_PREPROCESSOR,
    "SiglipImageProcessor": tiny.SIGLIP_PREPROCESSOR,
    "BitImageProcessor": tiny.DINOV2_PREPROCESSOR,
    "ChineseCLIPImageProcessor": {**tiny.CLIP_PREPROCESSOR, "size": SQUARE},
    "ViTImageProcessor": {**tiny.SIGLIP_PREPROCESSOR, "resample": 2},
    "DeiTImageProcessor": {**tiny.CLIP_PREPROCESSOR, **IMAGENET, "size": {"height": 64, "width": 64}},
    "BeitImageProcessor": {**tiny.SIGLIP_PREPROCESSOR, **HALVES, "resample": 2, "do_center_crop": False},
    # The published file has the name that transformers 4 gave to torchvision's processors.
    "DINOv3ViTImageProcessor": {**tiny.SIGLIP_PREPROCESSOR, **IMAGENET, "resample": 2},
}
NAMES_IN_FILES = {"DINOv3ViTImageProcessor": "DINOv3ViTImageProcessorFast"}


def write(folder, model_type, seed=11, **shape):
    """Write the model of a family and its image processor; `shape` changes its configuration."""
    family = FAMILIES[model_type]
    model_class = getattr(transformers, family.model_class)
    shape = {**tiny.VISION_SHAPE, **SHAPES.get(model_type, {}), **shape}
    config = model_class.config_class(**{name: value for name, value in shape.items() if value is not None})
    tiny.redraw(model_class(config), seed).save_pretrained(folder)
    name = family.processor
    return tiny.write_preprocessor(folder, {**PROCESSORS[name], "image_processor_type": NAMES_IN_FILES.get(name, name)})
