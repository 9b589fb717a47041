"""`make demo`: the whole job on real weights, as a user would type it, and what came of it on pictures held out.

The three commands run as processes and are printed as they run. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava_twophase.errors import UserError, run_command
from pipelines.demo.fetch import DINOV2_SMALL, SMOLLM2_135M, fetch
from pipelines.demo.scenes import write_scenes
from pipelines.demo.stamps import fetch_stamps, write_stamps

if TYPE_CHECKING:
    from pipelines.demo.evaluate import Evaluation

ROOT = Path(__file__).resolve().parents[2]
PROJECTOR = "mlp2x_gelu"


@dataclass(frozen=True)
class Recipe:
    """How much of what; tuned for five minutes on two CPU cores.

    Attributes:
        crop: Side of the tower's square input in pixels; crop / 14 squared patches.
        select_layer: Hidden state of the tower.
        train: Training records; for stamps, all that are not held out.
        held_out: Records to evaluate on.
        batch, steps, learning_rate: Of the training command.
    """

    crop: int
    select_layer: int
    train: int
    held_out: int
    batch: int
    steps: int
    learning_rate: float


RECIPES = {
    "scenes": Recipe(crop=56, select_layer=-7, train=2400, held_out=128, batch=4, steps=600, learning_rate=3e-3),
    "stamps": Recipe(crop=84, select_layer=-3, train=700, held_out=80, batch=4, steps=350, learning_rate=2e-3),
}
SHORT = {
    "scenes": Recipe(crop=56, select_layer=-7, train=64, held_out=16, batch=4, steps=16, learning_rate=3e-3),
    "stamps": Recipe(crop=56, select_layer=-3, train=64, held_out=16, batch=4, steps=16, learning_rate=2e-3),
}


def main(argv: list[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: Arguments without the program's name; `sys.argv` by default.

    Returns:
        0 done, 1 a problem was found, 2 wrong usage.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.demo", description=__doc__, epilog="example: python -m pipelines.demo --data stamps"
    )
    parser.add_argument("--data", choices=tuple(RECIPES), default="scenes", help="drawn scenes, or Debian's stamps")
    parser.add_argument("--output_dir", type=Path, default=Path("demo-output"), help="replaced folder for everything")
    parser.add_argument("--short", action="store_true", help="a few steps, to see that everything runs; learns little")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return run_command(lambda: _run(args.data, args.output_dir, args.short))


def _run(data: str, output_dir: Path, short: bool) -> int:
    recipe = (SHORT if short else RECIPES)[data]
    # The commands run in the repository's root, where paths relative to it read best.
    folder = _fresh((output_dir if Path.cwd() == ROOT else output_dir.absolute()) / data)
    onnx, gguf = fetch(DINOV2_SMALL), fetch(SMOLLM2_135M)
    stamps = fetch_stamps() if data == "stamps" else None
    started = time.monotonic()  # downloads are not counted: they depend on the network alone

    # torch and transformers are imported only now, when downloads have succeeded.
    from pipelines.demo.evaluate import evaluate
    from pipelines.demo.page import write_page
    from pipelines.demo.weights import dinov2_folder, smollm2_folder

    tower, llm = dinov2_folder(onnx, recipe.crop), smollm2_folder(gguf)
    train, held_out = _write_records(folder, stamps, recipe)
    dtype = _dtype()
    _extract(folder, [train, held_out], tower, recipe, dtype)
    _train(folder, train, tower, llm, recipe, dtype)
    shown = _inspect(folder, held_out)
    import torch

    llm_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    result = evaluate(folder / "cache", held_out, str(llm), folder / "projector", PROJECTOR, llm_dtype)
    seconds = time.monotonic() - started
    notes = _notes(data, recipe, short, dtype)
    write_page(folder / "index.html", f"LLaVA stage 1 in two phases: {data}", notes, result, folder / "images", shown)
    _print_summary(folder, notes, result)
    line = {
        "right_image_loss": round(result.right_image_loss, 4),
        "wrong_image_loss": round(result.wrong_image_loss, 4),
        "exact_captions": round(result.exact_captions, 4),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(line), flush=True)
    return 0


def _fresh(folder: Path) -> Path:
    """Return the run's folder, emptied if an earlier demo made it: training would go on from its checkpoint."""
    marker = folder / ".demo"
    if marker.exists():
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} has files that no demo made; name another folder with --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()
    return folder


def _write_records(folder: Path, stamps: Path | None, recipe: Recipe) -> tuple[Path, Path]:
    if stamps is None:
        return write_scenes(folder, recipe.train, recipe.held_out)
    return write_stamps(stamps, folder, recipe.held_out, limit=recipe.train + recipe.held_out)


def _dtype() -> str:
    """Return bf16 where the hardware multiplies it, else fp32: emulated, it is slower than fp32."""
    import torch

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text(encoding="utf-8", errors="replace") if cpu.exists() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def _command(script: str, *arguments: object) -> None:
    """Print one command as a user types it, run it, and stop the demo if it fails."""
    words = [f"pipelines/{script}", *(str(argument) for argument in arguments)]
    print(f"\n$ python {shlex.join(words)}", flush=True)
    code = subprocess.run([sys.executable, *words], cwd=ROOT).returncode
    if code:
        raise UserError(f"pipelines/{script} ended with exit code {code}; its own message stands above")


def _extract(folder: Path, data: list[Path], tower: Path, recipe: Recipe, dtype: str) -> None:
    """Phase one, for the training and the held-out records: both into one cache."""
    for path in data:
        _command(
            "extract_features.py",
            *("--data_path", path, "--image_folder", folder / "images", "--feature_cache", folder / "cache"),
            *("--vision_tower", tower, "--mm_vision_select_layer", recipe.select_layer, "--compute_dtype", dtype),
        )


def _train(folder: Path, data: Path, tower: Path, llm: Path, recipe: Recipe, dtype: str) -> None:
    """Phase two, from the cache."""
    import torch

    # Without a GPU, Trainer takes bf16 only from a user who says that the CPU is meant.
    device = () if torch.cuda.is_available() else ("--use_cpu", True)
    _command(
        "train_projector.py",
        *("--model_name_or_path", llm, "--version", "plain", "--data_path", data),
        *("--feature_cache", folder / "cache", "--vision_tower", tower),
        *("--mm_vision_select_layer", recipe.select_layer, "--mm_projector_type", PROJECTOR),
        *("--tune_mm_mlp_adapter", True, "--bf16", dtype == "bf16", *device),
        *(
            "--output_dir",
            folder / "projector",
            "--per_device_train_batch_size",
            recipe.batch,
            "--max_steps",
            recipe.steps,
        ),
        *("--learning_rate", recipe.learning_rate, "--weight_decay", "0.", "--warmup_ratio", 0.03),
        *(
            "--lr_scheduler_type",
            "cosine",
            "--logging_steps",
            max(1, min(20, recipe.steps // 4)),
            "--save_strategy",
            "no",
        ),
    )


def _inspect(folder: Path, held_out: Path) -> Path:
    """Look at the cache and return the picture that `show` makes of its first held-out image."""
    key = json.loads(held_out.read_text(encoding="utf-8"))[0]["image"]
    picture = folder / "show.png"
    _command("inspect_cache.py", "summary", folder / "cache")
    _command("inspect_cache.py", "verify", folder / "cache")
    _command("inspect_cache.py", "show", folder / "cache", key, "-o", picture, "--image_folder", folder / "images")
    return picture


def _notes(data: str, recipe: Recipe, short: bool, dtype: str) -> list[str]:
    pictures = {
        "scenes": "Drawn scenes: two shapes; the larger one, in the middle, is named first.",
        "stamps": "Tux Paint's stamps (GPL-2), each captioned by the first line of its description.",
    }
    patches = (recipe.crop // 14) ** 2
    notes = [
        f"{pictures[data]} {recipe.steps} steps of {recipe.batch} pictures in {dtype}, {patches} patch features a "
        f"picture ({recipe.crop} px, select_layer {recipe.select_layer}).",
        "The vision tower is DINOv2-small, not LLaVA's CLIP, and the frozen LLM is SmolLM2-135M with weights from a "
        "four-bit file: this shows that both phases work and that the projector carries what is in the picture to the "
        "LLM, not how good LLaVA is.",
    ]
    if short:
        notes.append("This was a short run to see that everything works: it has learnt next to nothing.")
    return notes


def _print_summary(folder: Path, notes: list[str], result: Evaluation) -> None:
    print()
    for record, text in list(zip(result.records, result.generated, strict=True))[:8]:
        print(f"  {'=' if text == record.caption else '!'} true: {record.caption}\n    said: {text}")
    print()
    print("\n".join(notes))
    print(
        f"On {len(result.records)} held-out pictures: loss {result.right_image_loss:.3f} with the right image, "
        f"{result.wrong_image_loss:.3f} with a wrong one; {result.exact_captions:.0%} of the captions exact."
    )
    print(f"Look at {folder / 'index.html'}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
