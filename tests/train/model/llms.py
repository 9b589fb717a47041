"""Tiny random LLMs, batches for them, and the loss and gradient that a plain forward pass gives."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llava_twophase.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_twophase.train.model.frozen_llm import FrozenLLM
from llava_twophase.train.model.load_llm import LoadedLLM
from tiny import redraw

PATCHES, WIDTH = 6, 64
# The families of the README, by model type.
FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "phi", "phi3"),
    *("gpt2", "opt", "mpt", "falcon", "bloom", "gpt_neox", "mixtral"),
)
# Every name for a probability of dropping something, or for a router's noise, in the configurations of these families.
_NOISE = (
    *("dropout", "attention_dropout", "hidden_dropout", "activation_dropout", "layerdrop", "classifier_dropout"),
    *("attn_pdrop", "embd_pdrop", "resid_pdrop", "emb_pdrop", "summary_first_dropout", "router_jitter_noise"),
)


def build_llm(kind="llama", dtype=torch.float32, **changes):
    """A LLaMA-like LLM with four layers and grouped-query attention."""
    shape = {
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 128,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(kind, **{**shape, **changes})
    return redraw(AutoModelForCausalLM.from_config(config, dtype=dtype), 3).train()


def build_family(kind, **changes):
    """An LLM of a family, with dropout and noise wherever its configuration has them."""
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    own = {
        "mistral": {"num_key_value_heads": 2},
        "qwen2": {"num_key_value_heads": 2},
        "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
        "gemma": {"num_key_value_heads": 2, "head_dim": 16},
        "gemma2": {"num_key_value_heads": 2, "head_dim": 16},
        "gemma3_text": {"num_key_value_heads": 2, "head_dim": 16},
        "opt": {"word_embed_proj_dim": WIDTH},
        "phi3": {"num_key_value_heads": 4},
        "mixtral": {"num_local_experts": 4, "num_key_value_heads": 2, "intermediate_size": 96},
    }
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **{**shape, **ids, **own.get(kind, {}), **changes})
    for name in _NOISE:
        if hasattr(config, name):
            setattr(config, name, 0.3)
    return redraw(AutoModelForCausalLM.from_config(config), 3)


def build_batch(lengths=(9, 2, 5, 1, 7, 3, 4, 6), bos=True, seed=0):
    """Ragged captions of these lengths, and features."""
    generator = torch.Generator().manual_seed(seed)
    start = int(bos)
    ids = torch.zeros(len(lengths), start + 1 + max(lengths), dtype=torch.long)
    labels = torch.full_like(ids, IGNORE_INDEX)
    ids[:, 0], ids[:, start] = 1, IMAGE_TOKEN_INDEX
    for row, length in enumerate(lengths):
        caption = torch.randint(0, 128, (length,), generator=generator)
        ids[row, start + 1 : start + 1 + length] = labels[row, start + 1 : start + 1 + length] = caption
    features = torch.randn(len(lengths), PATCHES, WIDTH, generator=generator)
    return features, ids, labels, [start + 1 + length for length in lengths]


def reference(llm, features, ids, labels, image_position=1):
    """Loss and gradient of one pass with all logits and the mean that transformers takes: no micro-batches."""
    leaf = features.clone().requires_grad_()
    text = llm.get_input_embeddings()(ids.clamp(min=0))
    embeds = torch.cat([text[:, :image_position], leaf.to(text.dtype), text[:, image_position + 1 :]], dim=1)
    logits = llm(inputs_embeds=embeds, use_cache=False).logits.float()
    ignored = labels.new_full((len(labels), PATCHES), IGNORE_INDEX)
    spliced = torch.cat([labels[:, :image_position], ignored, labels[:, image_position + 1 :]], dim=1)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), spliced[:, 1:].flatten())
    loss.backward()
    return loss.detach(), leaf.grad


def step(frozen, features, ids, labels, lengths=None):
    """Loss and gradient of one step of a `FrozenLLM`."""
    leaf = features.clone().requires_grad_()
    loss = frozen.loss(leaf, ids, labels, lengths)
    loss.backward()
    return loss.detach(), leaf.grad


def freeze(llm, image_position=1, samples=None, checkpoint_every=None, longest=0):
    """A `FrozenLLM` of a transformers model."""
    return FrozenLLM(LoadedLLM(llm), image_position, samples, checkpoint_every, longest)
