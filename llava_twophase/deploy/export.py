"""``export``: write the trained model in another system's format, and say what to do with it."""

from __future__ import annotations

import sys

from llava_twophase.deploy.trained_projector import TrainedProjector
from llava_twophase.errors import UserError


def export(projector: TrainedProjector, kind: str, out: str) -> int:
    """Export and print the next command.

    Args:
        projector: The trained projector.
        kind: ``hf`` or ``gguf``.
        out: Folder or file to write.

    Returns:
        0.

    Raises:
        UserError: ``out`` is a URL, or the export is not possible.
    """
    if "://" in out:
        raise UserError(f"OUT {out}: give a folder or file on this machine, and copy it afterwards")
    if kind == "hf":
        from llava_twophase.deploy.export_hf import export_hf

        folder = export_hf(projector, out)
        print(
            f'{folder}: load it with LlavaForConditionalGeneration.from_pretrained("{folder}"); the prompt is "<image>"'
        )
        return 0
    from llava_twophase.deploy.export_gguf import POSITION_NOTE, export_gguf

    file = export_gguf(projector, out)
    print(
        f"{file}: convert the LLM with llama.cpp's convert_hf_to_gguf.py {projector.llm}, then run\n"
        f"  llama-mtmd-cli -m LLM.gguf --mmproj {file} --image photo.jpg -p ''"
    )
    print(f"note: {POSITION_NOTE}", file=sys.stderr)
    if projector.image_aspect_ratio == "square":
        print("note: llama.cpp pads images to a square; this projector was trained on center crops", file=sys.stderr)
    return 0
