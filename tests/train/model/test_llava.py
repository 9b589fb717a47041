"""LlavaProjectorModel: splice and loss equal a plain forward pass of the LLM."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from llava_twophase.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_twophase.train.data.collator import collate
from llava_twophase.train.model.frozen_llm import FrozenLLM
from llava_twophase.train.model.llava import LlavaProjectorModel
from llava_twophase.train.model.load_llm import LoadedLLM
from llava_twophase.train.model.projector import build_projector

PATCHES, WIDTH = 5, 8


@pytest.fixture
def model(tiny_llama):
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    projector = build_projector("mlp2x_gelu", WIDTH, llm.config.hidden_size)
    return LlavaProjectorModel(FrozenLLM(LoadedLLM(llm)), projector).train()


def sample(caption, seed, bos=True):
    start = [1, IMAGE_TOKEN_INDEX] if bos else [IMAGE_TOKEN_INDEX]
    return {
        "input_ids": torch.tensor(start + caption),
        "labels": torch.tensor([IGNORE_INDEX] * len(start) + caption),
        "features": torch.randn(PATCHES, WIDTH, generator=torch.Generator().manual_seed(seed)),
    }


# The pad token of LLaMA tokenizers is often <unk>, id 0: inside a caption it must count like any other token.
CAPTIONS = [[5, 6, 7, 8, 9], [10, 0, 11], [12]]


def reference_loss(model, samples, image_position=1):
    """The mean over all caption tokens, from one pass with all logits for each sample, unpadded."""
    losses = []
    for one in samples:
        embed = model.llm.get_input_embeddings()
        ids = one["input_ids"]
        before, after = embed(ids[:image_position]), embed(ids[image_position + 1 :])
        embeds = torch.cat([before, model.mm_projector(one["features"]), after])[None]
        logits = model.llm(inputs_embeds=embeds).logits[0].float()
        caption = ids[image_position + 1 :]
        first = image_position + PATCHES - 1
        log_probabilities = logits[first : first + len(caption)].log_softmax(-1)
        losses.append(-log_probabilities.gather(1, caption[:, None])[:, 0])
    return torch.cat(losses).mean()


def test_forward_returns_the_mean_over_caption_tokens(model):
    samples = [sample(caption, seed) for seed, caption in enumerate(CAPTIONS)]
    loss = model(**collate(samples))["loss"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference_loss(model, samples), rtol=1e-6, atol=1e-6)


def test_forward_with_num_items_in_batch_returns_the_sum_over_that_number(model):
    """For --average_tokens_across_devices."""
    samples = [sample(caption, seed) for seed, caption in enumerate(CAPTIONS)]
    tokens = sum(map(len, CAPTIONS))
    parts = [model(**collate(part), num_items_in_batch=tokens)["loss"] for part in (samples[:1], samples[1:])]
    torch.testing.assert_close(sum(parts), reference_loss(model, samples), rtol=1e-6, atol=1e-6)


def test_forward_without_bos_puts_the_image_first(model):
    model = LlavaProjectorModel(FrozenLLM(LoadedLLM(model.llm), image_position=0), model.mm_projector)
    samples = [sample(caption, seed, bos=False) for seed, caption in enumerate(CAPTIONS)]
    expected = reference_loss(model, samples, image_position=0)
    torch.testing.assert_close(model(**collate(samples))["loss"], expected, rtol=1e-6, atol=1e-6)


def test_gradients_equal_the_reference_and_reach_the_projector_only(model):
    samples = [sample(caption, seed) for seed, caption in enumerate(CAPTIONS)]
    model(**collate(samples))["loss"].backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    assert len(gradients) == 4
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    assert all(parameter.grad is None for parameter in model.llm.parameters())
    model.zero_grad()
    reference_loss(model, samples).backward()
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-7)


def test_gradient_checkpointing_flag_changes_no_gradient(model):
    batch = collate([sample(caption, seed) for seed, caption in enumerate(CAPTIONS)])
    model(**batch)["loss"].backward()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(**batch)["loss"].backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(plain, model.parameters(), strict=True))


def test_state_dict_holds_the_projector_only(model):
    assert list(model.state_dict()) == [f"mm_projector.{name}" for name in model.mm_projector.state_dict()]
    assert all(name.startswith("mm_projector.") for name, _ in model.named_parameters())
    assert not any(parameter.requires_grad for parameter in model.llm.parameters())


def test_forward_with_crops_encodes_them(model):
    samples = [sample(caption, seed) for seed, caption in enumerate(CAPTIONS)]
    batch = collate(samples)
    features = batch.pop("features")
    on_the_fly = LlavaProjectorModel(
        model.frozen, model.mm_projector, encode=lambda crops: features[crops[:, 0, 0, 0].int()]
    )
    crops = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 2, 2, 3)
    loss = on_the_fly(**batch, crops=crops)["loss"]
    assert torch.equal(loss, model(**batch, features=features)["loss"])
