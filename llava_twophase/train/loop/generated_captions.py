"""Captions that the model writes while it learns, beside the true ones: an HTML page at each evaluation, and trackers.

Knows nothing of how the model is trained; it is called by Trainer after an evaluation.
"""

from __future__ import annotations

import base64
import html
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_twophase.records import Record
from llava_twophase.train.data.conversation import PlainTemplate
from llava_twophase.train.data.source import FeatureSource
from llava_twophase.train.model.llava import LlavaProjectorModel

logger = logging.getLogger(__name__)

LONGEST = 64  # generated tokens
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Captions at step {step}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.4 system-ui, sans-serif; margin: 1.5rem auto; max-width: 50rem; padding: 0 1rem }}
td {{ padding: .4rem .8rem .4rem 0; vertical-align: top }} img {{ max-width: 8rem; border-radius: 4px }}
</style>
<h1>Captions at step {step}</h1>
<table><tr><th>image<th>written<th>true</tr>
{rows}
</table></html>
"""


@torch.no_grad()
def write_captions(
    model: LlavaProjectorModel, template: PlainTemplate, tokenizer: Any, features: torch.Tensor
) -> list[str]:
    """Caption images greedily, as stage 1 has taught the model to.

    Args:
        model: In evaluation mode.
        template: Gives the ids in front of a caption.
        tokenizer: The LLM's.
        features: ``[B, L, D]`` on the model's device.

    Returns:
        One caption each, up to its newline.
    """
    prompt = torch.tensor([template.prompt] * len(features), device=features.device)
    embeds = model.splice(prompt, features)  # [B, image_position + L, H]
    written = model.llm.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
        max_new_tokens=LONGEST,
        do_sample=False,
        eos_token_id=template.newline,
        pad_token_id=template.newline or 0,
    )
    return [text.split("\n")[0] for text in tokenizer.batch_decode(written, skip_special_tokens=True)]


@dataclass
class CaptionSamples(TrainerCallback):
    """Writes ``samples/step-NNNNNN.html`` after each evaluation.

    Attributes:
        model: The model in training.
        template: Gives the ids in front of a caption.
        tokenizer: The LLM's.
        records: The records to caption, held-out ones.
        source: Where their features come from.
        image_folder: For thumbnails; None shows image keys alone.
        folder: The run's output folder.
    """

    model: LlavaProjectorModel
    template: PlainTemplate
    tokenizer: Any
    records: Sequence[Record]
    source: FeatureSource
    image_folder: str | None
    folder: Path

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Caption the records; every rank takes part, since under ZeRO-3 the LLM lies spread over them."""
        training = self.model.training
        features = self.source.read([record.image for record in self.records], args.device)
        self.model.eval()
        captions = write_captions(self.model, self.template, self.tokenizer, features)
        self.model.train(training)
        if not state.is_world_process_zero:
            return
        samples = [self._sample(record, caption) for record, caption in zip(self.records, captions, strict=True)]
        page = _PAGE.format(step=state.global_step, rows="\n".join(map(_row, samples)))
        path = self.folder / "samples" / f"step-{state.global_step:06d}.html"
        path.parent.mkdir(exist_ok=True)
        path.write_text(page, encoding="utf-8")
        logger.info("wrote %s", path)
        self._track(args.report_to or [], state.global_step, page, samples)

    def _sample(self, record: Record, written: str) -> _Sample:
        jpeg = None
        if self.image_folder is not None:
            from llava_twophase.train.data.on_the_fly import thumbnail

            jpeg = thumbnail(self.image_folder, record.image)
        return _Sample(record.image, written, record.caption.strip(), jpeg)

    def _track(self, trackers: Sequence[str], step: int, page: str, samples: Sequence[_Sample]) -> None:
        # wandb and trackio get no step of ours: they count Trainer's logs, and wandb drops what is behind its count.
        if "wandb" in trackers:
            import wandb

            wandb.log({"samples": wandb.Html(page), "train/global_step": step})
        if "tensorboard" in trackers:
            from torch.utils.tensorboard import SummaryWriter

            with SummaryWriter(str(self.folder / "samples")) as writer:
                writer.add_text("samples", _markdown(samples), step)
                for sample in samples:
                    if sample.jpeg is not None:
                        writer.add_image(
                            f"samples/{sample.image}", np.asarray(sample.picture()), step, dataformats="HWC"
                        )
        if "trackio" in trackers:
            import trackio

            rows = [
                [trackio.Image(s.picture(), s.image) if s.jpeg is not None else s.image, s.written, s.true]
                for s in samples
            ]
            trackio.log({"samples": trackio.Table(_COLUMNS, rows), "train/global_step": step})


class _Sample(NamedTuple):
    image: str  # its key
    written: str
    true: str
    jpeg: bytes | None  # a thumbnail, where the pictures are at hand

    def picture(self) -> Image.Image:
        assert self.jpeg is not None
        return Image.open(io.BytesIO(self.jpeg))


_COLUMNS = ["image", "written", "true"]


def _row(sample: _Sample) -> str:
    image = html.escape(sample.image)
    if sample.jpeg is not None:
        image = f'<img src="data:image/jpeg;base64,{base64.b64encode(sample.jpeg).decode("ascii")}" alt="{image}">'
    return f"<tr><td>{image}<td>{html.escape(sample.written)}<td>{html.escape(sample.true)}</tr>"


def _markdown(samples: Sequence[_Sample]) -> str:
    rows = [_COLUMNS, ["---"] * 3, *([sample.image, sample.written, sample.true] for sample in samples)]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in row) + " |" for row in rows
    )
