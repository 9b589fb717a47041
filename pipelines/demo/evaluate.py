"""Evaluate the trained projector on held-out pictures: losses with the right and a wrong image, and captions.

Features are read from the cache, as in training; the tower is not loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llava_twophase.cache.reader import FeatureCache
from llava_twophase.records import Record, load_records
from llava_twophase.train.data.collator import collate
from llava_twophase.train.data.conversation import PlainTemplate
from llava_twophase.train.data.tokenizer import load_caption_tokenizer
from llava_twophase.train.model.frozen_llm import FrozenLLM
from llava_twophase.train.model.llava import LlavaProjectorModel
from llava_twophase.train.model.load_llm import LoadedLLM
from llava_twophase.train.model.projector import FILE, build_projector, load_projector
from pipelines.demo.commands import PROJECTOR, Models

BATCH = 32
LONGEST_CAPTION = 32  # generated tokens


@dataclass
class Evaluation:
    """Figures and texts of the held-out records.

    Attributes:
        right_image_loss: Mean over caption tokens, each record with its own image.
        wrong_image_loss: The same captions, each with the image of another record whose caption differs.
        exact_captions: Fraction of the greedily generated captions that equal the true one, 0 to 1.
        records: The held-out records, in file order.
        generated: One caption for each.
    """

    right_image_loss: float
    wrong_image_loss: float
    exact_captions: float
    records: list[Record]
    generated: list[str]


class _Trained:
    """The LLM, its tokenizer and the trained projector."""

    def __init__(self, cache: FeatureCache, models: Models, projector: Path) -> None:
        self.cache = cache
        llm = str(models.llm)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(llm)
        dtype = torch.bfloat16 if models.dtype == "bf16" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(llm, dtype=dtype).eval()
        tokens, width = cache.feature_shape
        module = build_projector(PROJECTOR, width, model.config.hidden_size)
        load_projector(projector, module)
        self.template = PlainTemplate(load_caption_tokenizer(llm, self.tokenizer), 2048, tokens)
        self.model = LlavaProjectorModel(FrozenLLM(LoadedLLM(model), self.template.image_position), module).eval()

    def loss(self, captions: Sequence[str], keys: Sequence[str]) -> float:
        """Return the mean loss over all caption tokens, caption i with the image of key i."""
        total = count = 0.0
        for start in range(0, len(keys), BATCH):
            samples = []
            for caption in captions[start : start + BATCH]:
                input_ids, labels = self.template(caption)
                samples.append({"input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels)})
            batch = collate(samples)
            features = self.cache.read_tensor(keys[start : start + BATCH])
            tokens = int((batch["labels"] >= 0).sum())
            total += float(self.model(**batch, features=features)["loss"]) * tokens
            count += tokens
        return total / count

    def generate(self, keys: Sequence[str]) -> list[str]:
        """Return a greedily generated caption for each image, up to its newline."""
        captions: list[str] = []
        for start in range(0, len(keys), BATCH):
            written = self._generate(self.cache.read_tensor(keys[start : start + BATCH]))
            captions += (text.split("\n")[0] for text in self.tokenizer.batch_decode(written))
        return captions

    def _generate(self, features: torch.Tensor) -> torch.Tensor:
        """Return generated ids, `[B, T]`, for features `[B, L, D]`; the caller drops what follows a newline."""
        empty, _ = self.template("")  # [BOS, IMAGE, newline], or without BOS
        prompt, newline = torch.tensor([empty[: self.template.image_position + 1]] * len(features)), empty[-1]
        inputs = {"inputs_embeds": self.model.splice(prompt, features)}  # [B, L, H]
        past: Any = None
        written: list[torch.Tensor] = []
        ended = torch.zeros(len(features), dtype=torch.bool)
        while len(written) < LONGEST_CAPTION and not ended.all():
            # An index, not a count: as in training, a slice of the hidden states would make lm_head copy its weight.
            last = torch.tensor([next(iter(inputs.values())).shape[1] - 1])
            output = self.model.llm(**inputs, cache=past, use_cache=True, logits_to_keep=last)
            past, token = output.cache, output.logits[:, -1].argmax(-1)  # [B]
            written.append(token)
            ended |= token == newline
            inputs = {"input_ids": token[:, None]}
        return torch.stack(written, dim=1)


def wrong_partners(captions: Sequence[str]) -> list[int]:
    """Return for each caption the position of the next different one, cyclically.

    Raises:
        ValueError: All captions are the same, so there is no wrong image.
    """
    if len(set(captions)) < 2:
        raise ValueError("needs at least two different captions")
    partners = []
    for position, caption in enumerate(captions):
        other = (position + 1) % len(captions)
        while captions[other] == caption:
            other = (other + 1) % len(captions)
        partners.append(other)
    return partners


def evaluate(cache: Path, data: Path, models: Models, trained: Path) -> Evaluation:
    """Measure the trained projector on held-out records.

    Args:
        cache: Feature cache that has their images.
        data: Held-out records.
        models: The frozen LLM and its dtype.
        trained: Output folder of the training command.
    """
    records = load_records(data)
    captions, keys = [record.caption for record in records], [record.image for record in records]
    with torch.inference_mode():
        model = _Trained(FeatureCache(cache), models, trained / FILE)
        generated = model.generate(keys)
        right = model.loss(captions, keys)
        wrong = model.loss(captions, [keys[position] for position in wrong_partners(captions)])
    exact = sum(text == caption for text, caption in zip(generated, captions, strict=True))
    return Evaluation(
        right_image_loss=right,
        wrong_image_loss=wrong,
        exact_captions=exact / len(records),
        records=records,
        generated=generated,
    )
