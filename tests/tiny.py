"""Write tiny models in real formats: vision towers, LLMs and their tokenizers, with seeded random weights.

All weights are random, including LayerNorm scales and biases. With the library's initialisation (scales 1, biases 0,
positions near 0), a missing norm or bias would not change any output, and no test would notice it.
"""

import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)

IMAGE_SIZE = 56
PATCH_SIZE = 14
TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2  # 16 patch features
VISION_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
CLIP_PREPROCESSOR = {
    "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": IMAGE_SIZE},
}
SIGLIP_PREPROCESSOR = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
}
DINOV2_PREPROCESSOR = {
    **CLIP_PREPROCESSOR,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "BitImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "size": {"shortest_edge": 64},  # as in the published model: the crop removes a border
}


def redraw(model, seed):
    """Set all floating-point parameters of `model` to seeded random values; return `model` in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "embed" in name and "patch" not in name:
                parameter.copy_(0.5 * noise)
            elif parameter.ndim >= 2:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:  # norm scales, layer scales
                parameter.copy_(1 + 0.1 * noise)
    return model.eval()


def write_preprocessor(folder, settings):
    """Write `preprocessor_config.json` as in a repository on the hub."""
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return folder


def write_clip(folder, seed=1, **shape):
    """Write a CLIPVisionModel: 16 patches of 32 numbers (17 with CLS), four layers; `shape` changes that."""
    model = redraw(CLIPVisionModel(CLIPVisionConfig(**{**VISION_SHAPE, **shape})), seed)
    model.save_pretrained(folder)
    return write_preprocessor(folder, CLIP_PREPROCESSOR)


def write_clip_full(folder, clip_folder):
    """Write a CLIPModel with text tower, like openai/clip-vit-*, with the vision weights of `clip_folder`."""
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text.update(vocab_size=64, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    model = redraw(CLIPModel(CLIPConfig(text_config=text, vision_config=VISION_SHAPE, projection_dim=16)), seed=2)
    vision = CLIPVisionModel.from_pretrained(clip_folder)
    own, wanted = dict(model.vision_model.named_parameters()), dict(vision.named_parameters())
    with torch.no_grad():
        for name, parameter in wanted.items():
            own[name.removeprefix("vision_model.")].copy_(parameter)
    model.save_pretrained(folder)
    return write_preprocessor(folder, CLIP_PREPROCESSOR)


def write_siglip(folder, seed=3):
    """Write a SiglipVisionModel: 16 patches of 32 numbers, no CLS, four layers."""
    model = redraw(SiglipVisionModel(SiglipVisionConfig(**VISION_SHAPE)), seed)
    model.save_pretrained(folder)
    return write_preprocessor(folder, SIGLIP_PREPROCESSOR)


def write_dinov2(folder, seed=4):
    """Write a Dinov2Model: 16 patches of 32 numbers (17 with CLS), four layers."""
    shape = {name: value for name, value in VISION_SHAPE.items() if name != "intermediate_size"}
    model = redraw(Dinov2Model(Dinov2Config(mlp_ratio=2, **shape)), seed)
    model.save_pretrained(folder)
    return write_preprocessor(folder, DINOV2_PREPROCESSOR)


def train_tokenizer(captions, add_bos=True):
    """Train a fast BPE tokenizer on `captions`, with LLaMA's special tokens and word marks."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([caption + "\n" for caption in captions], trainer)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",  # as Vicuna has it: a mask made from the padding id would remove real <unk>s
        padding_side="right",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def write_llama(folder, captions, add_bos=True, seed=5, **shape):
    """Write a LlamaForCausalLM of width 64 with two layers and grouped-query attention, and its tokenizer.

    `shape` overrides fields of its configuration. With `add_bos=False` the tokenizer has <s> but does not add it, like
    those of GPT-2 and SmolLM2.
    """
    tokenizer = train_tokenizer(captions, add_bos)
    known = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    config = LlamaConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        **{**known, **shape},
    )
    model = redraw(LlamaForCausalLM(config), seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
