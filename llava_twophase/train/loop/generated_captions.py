"""Captions that the model generates during training: an HTML page for each evaluation, and experiment trackers."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_twophase import __version__
from llava_twophase.files import replace_file
from llava_twophase.html import Card, Markup, Page, mark_differences
from llava_twophase.records import Record
from llava_twophase.train.data.conversation import PlainTemplate
from llava_twophase.train.data.feature_source import FeatureSource
from llava_twophase.train.model.llava import LlavaProjectorModel

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 64
_MADE_WITH = f"llava-train-projector {__version__}"
_NO_PICTURES = "There are no pictures, because a feature cache has no images: add --image_folder to the command."


@torch.no_grad()
def generate_captions(
    model: LlavaProjectorModel, template: PlainTemplate, tokenizer: Any, features: torch.Tensor
) -> list[str]:
    """Generate captions greedily from the prompt of stage 1.

    Args:
        model: In evaluation mode.
        template: Gives the ids in front of a caption.
        tokenizer: The LLM's.
        features: ``[B, L, D]`` on the model's device.

    Returns:
        One caption for each image, up to its newline.
    """
    prompt = torch.tensor([template.prompt] * len(features), device=features.device)
    embeds = model.splice(prompt, features)  # [B, image_position + L, H]
    generated = model.llm.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=template.newline,
        pad_token_id=template.newline or 0,
    )
    return [text.split("\n")[0] for text in tokenizer.batch_decode(generated, skip_special_tokens=True)]


@dataclass(frozen=True)
class _Sample:
    key: str
    generated: str
    true: str
    picture: Image.Image | None


@dataclass
class CaptionSamples(TrainerCallback):
    """Writes ``samples/step-NNNNNN.html`` and ``samples/index.html`` after each evaluation.

    Attributes:
        model: The model in training.
        template: Gives the ids in front of a caption.
        tokenizer: The LLM's.
        records: The held-out records to caption.
        source: Gives their features and pictures.
        folder: The run's output folder.
    """

    model: LlavaProjectorModel
    template: PlainTemplate
    tokenizer: Any
    records: Sequence[Record]
    source: FeatureSource
    folder: Path

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Caption the records; every rank takes part, because ZeRO-3 shards the LLM over the ranks."""
        training = self.model.training
        keys = [record.image for record in self.records]
        features = self.source.read(keys, args.device)
        self.model.eval()
        captions = generate_captions(self.model, self.template, self.tokenizer, features)
        self.model.train(training)
        if not state.is_world_process_zero:
            return
        pictures: Sequence[Image.Image | None] = self.source.thumbnails(keys) or [None] * len(keys)
        samples = [
            _Sample(record.image, caption, record.caption.strip(), picture)
            for record, caption, picture in zip(self.records, captions, pictures, strict=True)
        ]
        run_name = args.run_name or self.folder.resolve().name
        page = self._write_pages(samples, state, run_name)
        self._track(args.report_to or [], state.global_step, page, samples)

    def _write_pages(self, samples: Sequence[_Sample], state: TrainerState, run_name: str) -> bytes:
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        path = folder / _page_name(state.global_step)
        earlier = sorted(page.name for page in folder.glob("step-*.html") if page.name < path.name)
        page = _samples_page(samples, state, run_name, earlier[-1:])
        with replace_file(path) as file:
            file.write(page)
        with replace_file(folder / "index.html") as file:
            file.write(_index_page(sorted(page.name for page in folder.glob("step-*.html")), state, run_name))
        hint = "" if samples[0].picture is not None else "; add --image_folder to the command for pictures"
        logger.info("wrote %s%s", path, hint)
        return page

    def _track(self, trackers: Sequence[str], step: int, page: bytes, samples: Sequence[_Sample]) -> None:
        # Both trackers get the captions in the run that has the losses.
        if "wandb" in trackers:
            import wandb

            # Without a step: wandb counts Trainer's logs and drops values with a smaller step than its own.
            wandb.log({"samples": wandb.Html(page.decode()), "train/global_step": step})
        if "tensorboard" in trackers:
            from torch.utils.tensorboard import SummaryWriter

            folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or self.folder / "runs"
            with SummaryWriter(str(folder), filename_suffix=".samples") as writer:
                _write_summaries(writer, samples, step)


def _page_name(step: int) -> str:
    return f"step-{step:06d}.html"


def _samples_page(samples: Sequence[_Sample], state: TrainerState, run_name: str, previous: Sequence[str]) -> bytes:
    page = Page(f"Captions at step {state.global_step}", f"Run {run_name}. {_losses(state)}", _MADE_WITH)
    page.links({"all steps": "index.html", **{f"previous: step {_step(name)}": name for name in previous}})
    if samples[0].picture is None:
        page.warn(_NO_PICTURES)
    page.text("Words that the true caption does not have are marked.")
    page.cards([_card(sample) for sample in samples])
    return page.to_bytes()


def _index_page(pages: Sequence[str], state: TrainerState, run_name: str) -> bytes:
    page = Page("Captions during training", f"Run {run_name}. {_losses(state)}", _MADE_WITH)
    page.links({f"step {_step(name)}": name for name in pages})
    page.table({f"step {step}": text for step, text in _loss_history(state).items()}, "loss at each evaluation")
    return page.to_bytes()


def _card(sample: _Sample) -> Card:
    generated = Markup(f"generated: {mark_differences(sample.generated, sample.true)}")
    panels = [] if sample.picture is None else [("picture", sample.picture)]
    return Card(title=sample.key, lines=[generated, f"true: {sample.true}"], panels=panels)


def _losses(state: TrainerState) -> str:
    found = _loss_history(state)
    return f"{found[state.global_step]}." if state.global_step in found else ""


def _loss_history(state: TrainerState) -> Mapping[int, str]:
    """Return the loss on held-out records and the last training loss before it, by step."""
    history: dict[int, str] = {}
    training = None
    for entry in state.log_history:
        training = entry.get("loss", training)
        if "eval_loss" in entry:
            before = "" if training is None else f", {float(training):.4g} in training"
            history[int(entry["step"])] = f"Loss {float(entry['eval_loss']):.4g} on held-out records{before}"
    return history


def _step(page_name: str) -> int:
    return int(page_name.removeprefix("step-").removesuffix(".html"))


def _write_summaries(writer: Any, samples: Sequence[_Sample], step: int) -> None:
    rows = [("image", "generated", "true"), ("---",) * 3, *((s.key, s.generated, s.true) for s in samples)]
    table = ("| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in row) + " |" for row in rows)
    writer.add_text("samples", "\n".join(table), step)
    for sample in samples:
        if sample.picture is not None:
            writer.add_image(f"samples/{sample.key}", np.asarray(sample.picture), step, dataformats="HWC")
