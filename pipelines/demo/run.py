"""`make demo`: both phases and inspection on real weights, as a user would type the commands, and the result.

The commands run as processes and are printed as they run. The last line on stdout is one JSON object. An interrupted
demo resumes if its inputs are unchanged.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_twophase import __version__
from llava_twophase.errors import UserError, run_command
from llava_twophase.files import explain_os_errors, replace_file, require_writable
from pipelines.demo.commands import ROOT, Commands, Models, own_commands
from pipelines.demo.fetch import DINOV2_SMALL, SMOLLM2_135M, cache_folder, fetch
from pipelines.demo.scenes import write_scenes
from pipelines.demo.stamps import fetch_stamps, write_stamps

if TYPE_CHECKING:
    from pipelines.demo.evaluation import Evaluation

MARKER = ".demo"
EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Recipe:
    """Sizes and hyperparameters, chosen for five minutes on two CPU cores.

    Attributes:
        crop: Side of the tower's square input in pixels; crop / 14 squared patches.
        select_layer: Hidden state of the tower.
        train: Training records; for stamps, all that are not held out.
        held_out: Records for evaluation.
        batch: Batch size of the training command.
        steps: Its steps.
        learning_rate: Its learning rate.
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
        0 done, 1 a problem was found, 2 wrong usage, 130 interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.demo", description=__doc__, epilog="example: python -m pipelines.demo --data stamps"
    )
    parser.add_argument("--data", choices=tuple(RECIPES), default="scenes", help="drawn scenes, or Debian's stamps")
    parser.add_argument("--output_dir", type=Path, default=Path("demo-output"), help="folder for everything")
    parser.add_argument("--short", action="store_true", help="a few steps, to see that everything runs; learns little")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return run_command(
        lambda: _run(args.data, args.output_dir, args.short),
        interrupted="interrupted: run the same command again to resume the demo",
    )


def _run(data: str, output_dir: Path, short: bool) -> int:
    # The commands run in the repository's root, where paths relative to it are shortest.
    folder = (output_dir if Path.cwd() == ROOT else output_dir.absolute()) / data
    require_writable(folder, "--output_dir")
    require_writable(cache_folder(), "LLAVA_TWOPHASE_DEMO_CACHE")
    with explain_os_errors(folder, "--output_dir", lambda: "run the same command again to resume"):
        return _run_in(folder, data, short)


def _run_in(folder: Path, data: str, short: bool) -> int:
    recipe = (SHORT if short else RECIPES)[data]
    dtype = _dtype()
    if prepare_folder(folder, _inputs(data, recipe, dtype)):
        print(f"resuming the demo in {folder}: its inputs are unchanged", flush=True)
    onnx, gguf = fetch(DINOV2_SMALL), fetch(SMOLLM2_135M)
    stamps = fetch_stamps() if data == "stamps" else None
    started = time.monotonic()  # after the downloads, which depend on the network

    # torch and transformers are imported when the downloads have succeeded.
    import torch

    from pipelines.demo.evaluation import read_evaluation
    from pipelines.demo.page import Shown, write_page
    from pipelines.demo.weights import dinov2_folder, smollm2_folder

    train, held_out = _write_records(folder, stamps, recipe)
    commands, on_cpu = Commands(), not torch.cuda.is_available()
    tower, llm = dinov2_folder(onnx, recipe.crop), smollm2_folder(gguf)
    models = Models(tower, llm, recipe.select_layer, dtype, on_cpu)
    _extract(commands, folder, [train, held_out], models)
    _train(commands, folder, train, models, recipe)
    _inspect(commands, folder, held_out)
    _evaluate(commands, folder, held_out)
    result = read_evaluation(folder / EVALUATION)
    notes = _notes(data, recipe, short, dtype)
    title = f"LLaVA stage 1 in two phases: {data}"
    page = write_page(folder, Shown(title, notes, commands.lines, own_commands(models), result))
    _print_summary(page, notes, result)
    line = {
        "right_image_loss": round(result.right_image_loss, 4),
        "wrong_image_loss": round(result.wrong_image_loss, 4),
        "exact_captions": round(result.exact_captions, 4),
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(line), flush=True)
    return 0


def prepare_folder(folder: Path, inputs: dict[str, Any]) -> bool:
    """Prepare the demo's folder: keep an earlier demo of the same inputs, and delete one of other inputs.

    Args:
        folder: The folder; it need not exist yet.
        inputs: Everything that the result depends on, as JSON values.

    Returns:
        Whether an earlier demo is resumed.

    Raises:
        UserError: The folder has files that no demo wrote.
    """
    marker = folder / MARKER
    if marker.exists():
        if marker.read_text(encoding="utf-8", errors="replace") == json.dumps(inputs):
            return True
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} has files that no demo wrote; give another folder as --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    with replace_file(marker, "w") as file:
        file.write(json.dumps(inputs))
    return False


def _inputs(data: str, recipe: Recipe, dtype: str) -> dict[str, Any]:
    weights = [DINOV2_SMALL.sha256, SMOLLM2_135M.sha256]
    return {"version": __version__, "data": data, "recipe": asdict(recipe), "dtype": dtype, "weights": weights}


def _write_records(folder: Path, stamps: Path | None, recipe: Recipe) -> tuple[Path, Path]:
    train, held_out = folder / "train.json", folder / "held_out.json"
    if train.exists() and held_out.exists():  # written after all pictures
        return train, held_out
    if stamps is None:
        return write_scenes(folder, recipe.train, recipe.held_out)
    return write_stamps(stamps, folder, recipe.held_out, limit=recipe.train + recipe.held_out)


def _dtype() -> str:
    """Return bf16 if the hardware multiplies it, else fp32: emulated bf16 is slower than fp32."""
    import torch

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text(encoding="utf-8", errors="replace") if cpu.exists() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def _extract(commands: Commands, folder: Path, data: list[Path], models: Models) -> None:
    """Phase one, for the training and the held-out records: both into one cache."""
    for path in data:
        commands.run(
            "extract_features.py",
            *("--data_path", path, "--image_folder", folder / "images", "--feature_cache", folder / "cache"),
            *models.extract_flags,
        )


def _train(commands: Commands, folder: Path, data: Path, models: Models, recipe: Recipe) -> None:
    """Phase two, from the cache, with checkpoints to resume from."""
    logging_steps, save_steps = max(1, min(20, recipe.steps // 4)), max(4, recipe.steps // 6)
    commands.run(
        "train_projector.py",
        *("--data_path", data, "--feature_cache", folder / "cache", "--output_dir", folder / "projector"),
        *models.train_flags,
        *("--per_device_train_batch_size", recipe.batch, "--max_steps", recipe.steps),
        *("--learning_rate", recipe.learning_rate, "--weight_decay", "0.", "--warmup_ratio", 0.03),
        *("--lr_scheduler_type", "cosine", "--logging_steps", logging_steps),
        *("--save_strategy", "steps", "--save_steps", save_steps, "--save_total_limit", 1),
    )


def _inspect(commands: Commands, folder: Path, held_out: Path) -> None:
    """Inspect the cache."""
    key = json.loads(held_out.read_text(encoding="utf-8"))[0]["image"]
    cache, images = folder / "cache", folder / "images"
    commands.run("inspect_cache.py", "summary", cache)
    commands.run("inspect_cache.py", "verify", cache)
    commands.run("inspect_cache.py", "show", cache, key, "-o", folder / "show.png", "--image_folder", images)


def _evaluate(commands: Commands, folder: Path, held_out: Path) -> None:
    """Caption one held-out picture, and measure the projector on all of them."""
    image = json.loads(held_out.read_text(encoding="utf-8"))[0]["image"]
    commands.run("use_projector.py", "caption", folder / "projector", folder / "images" / image)
    commands.run(
        "use_projector.py",
        *("evaluate", folder / "projector", "--data_path", held_out, "--feature_cache", folder / "cache"),
        *("--image_folder", folder / "images", "--batch_size", 32, "--candidates", 4),
        *("--html", folder / "evaluation.html", "--json"),
        output=folder / EVALUATION,
    )


def _notes(data: str, recipe: Recipe, short: bool, dtype: str) -> list[str]:
    pictures = {
        "scenes": "Drawn scenes of two shapes. The caption begins with the larger one, in the middle.",
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
        notes.append("This was a short run, to see that everything works. The projector has learnt almost nothing.")
    return notes


def _print_summary(page: Path, notes: list[str], result: Evaluation) -> None:
    print()
    for true, text in list(zip(result.captions, result.generated, strict=True))[:8]:
        print(f"  {'=' if text == true else '!'} true:      {true}\n    generated: {text}")
    print()
    print("\n".join(notes))
    print(
        f"On {len(result.captions)} held-out pictures: loss {result.right_image_loss:.3f} with the right image, "
        f"{result.wrong_image_loss:.3f} with a wrong one; {result.exact_captions:.0%} of the captions exact."
    )
    print(f"Open {page}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
