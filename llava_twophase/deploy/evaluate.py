"""Measure how good a trained projector is on held-out records.

For each record: the loss with its own image, with the image of another record and without an image; whether the image
ranks its own caption above the captions of other records; and the caption that the model generates.

Shapes: B records, T ids, L patch tokens, D tower width, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from llava_twophase.constants import IGNORE_INDEX
from llava_twophase.deploy.captioner import Captioner
from llava_twophase.errors import UserError
from llava_twophase.records import Record
from llava_twophase.train.data.collator import collate

Features = Callable[[Sequence[str]], torch.Tensor]
"""Image keys to features ``[B, L, D]``."""


@dataclass(frozen=True)
class RecordResult:
    """What was measured on one record.

    Attributes:
        image: Image key.
        caption: The true caption.
        generated: The caption that the model generates.
        tokens: Tokens of the true caption, its newline included.
        loss: Mean loss per caption token with the record's own image, in nats.
        loss_shuffled: The same with the image of another record whose caption differs.
        loss_without: The same without an image.
        rank: Position of the true caption among the candidates by mean loss; 0 is the best.
    """

    image: str
    caption: str
    generated: str
    tokens: int
    loss: float
    loss_shuffled: float
    loss_without: float
    rank: int


@dataclass(frozen=True)
class EvaluationSettings:
    """How to evaluate.

    Attributes:
        batch_size: Rows of one forward pass.
        candidates: Captions that an image is ranked against, its own included.
        seed: Draws the candidates.
    """

    batch_size: int = 8
    candidates: int = 10
    seed: int = 0


@torch.inference_mode()
def evaluate(
    captioner: Captioner, records: Sequence[Record], features: Features, settings: EvaluationSettings
) -> list[RecordResult]:
    """Evaluate one projector.

    Args:
        captioner: The loaded run.
        records: Held-out records with at least two different captions.
        features: Gives the features of images.
        settings: Batch size, candidates and seed; the same settings and records give comparable results.

    Returns:
        One result for each record, in order.

    Raises:
        UserError: All captions are equal, so there is no wrong caption to compare with.
    """
    captions = [record.caption for record in records]
    others = other_positions(captions, settings.candidates - 1, settings.seed)
    results = []
    for start in tqdm(range(0, len(records), settings.batch_size), desc="evaluate", unit="batch", disable=None):
        part = range(start, min(start + settings.batch_size, len(records)))
        own = features([records[i].image for i in part])
        wrong = features([records[others[i][0]].image for i in part])
        texts = [captions[i] for i in part]
        generated = captioner.caption_features(own)
        right, counts = caption_losses(captioner, texts, own)
        shuffled, _ = caption_losses(captioner, texts, wrong)
        without, _ = caption_losses(captioner, texts, None)
        for place, i in enumerate(part):
            results.append(
                RecordResult(
                    image=records[i].image,
                    caption=captions[i],
                    generated=generated[place],
                    tokens=counts[place],
                    loss=right[place],
                    loss_shuffled=shuffled[place],
                    loss_without=without[place],
                    rank=_rank(captioner, right[place], [captions[j] for j in others[i]], own[place], settings),
                )
            )
    return results


def caption_losses(
    captioner: Captioner, captions: Sequence[str], features: torch.Tensor | None
) -> tuple[list[float], list[int]]:
    """Return the mean loss of each caption, and its number of tokens.

    Args:
        captioner: The loaded run.
        captions: B captions.
        features: ``[B, L, D]``, or None for rows without an image.
    """
    model, template = captioner.model, captioner.template
    samples = []
    for caption in captions:
        input_ids, labels = template(caption)
        if features is None:
            del input_ids[template.image_position], labels[template.image_position]
        samples.append({"input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels)})
    batch = collate(samples)
    input_ids, labels = batch["input_ids"].to(captioner.device), batch["labels"].to(captioner.device)
    if features is None:
        embeds = model.llm.get_input_embeddings()(input_ids)  # [B, T, H]
        keep = labels.shape[1]
    else:
        embeds = model.splice(input_ids, features)  # [B, T - 1 + L, H]
        keep = labels.shape[1] - template.image_position
    # Rows are padded on the right, so causal attention needs no mask.
    hidden = model.llm(inputs_embeds=embeds, use_cache=False, logits_to_keep=keep).logits.float()
    targets = labels[:, labels.shape[1] - keep :]
    # A row without BOS has no position before its first token, which is therefore not predicted.
    logits, targets = hidden[:, :-1], targets[:, 1:]
    losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    losses = losses.view(targets.shape)  # [B, T']
    counts = (targets != IGNORE_INDEX).sum(1)
    return (losses.sum(1) / counts.clamp(min=1)).tolist(), counts.tolist()


def other_positions(captions: Sequence[str], count: int, seed: int) -> list[list[int]]:
    """Draw for each caption the positions of captions that differ from it and from each other.

    Args:
        captions: The captions of all records.
        count: How many to draw for each caption; fewer if there are not enough different captions.
        seed: Seed of the draw.

    Raises:
        UserError: All captions are equal.
    """
    first = {text: position for position, text in reversed(list(enumerate(captions)))}
    if len(first) < 2:
        raise UserError("all captions of the held-out records are equal; evaluation needs at least two different ones")
    texts, generator = list(first), random.Random(seed)
    drawn = []
    for caption in captions:
        sample = [text for text in generator.sample(texts, min(count + 1, len(texts))) if text != caption]
        drawn.append([first[text] for text in sample[:count]])
    return drawn


def _rank(
    captioner: Captioner, loss: float, candidates: Sequence[str], features: torch.Tensor, settings: EvaluationSettings
) -> int:
    losses: list[float] = []
    for start in range(0, len(candidates), settings.batch_size):
        part = candidates[start : start + settings.batch_size]
        losses += caption_losses(captioner, part, features.expand(len(part), *features.shape))[0]
    return sum(other <= loss for other in losses)
