"""The demo's commands, as a user would type them."""

from __future__ import annotations

import shlex
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from llava_twophase.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PROJECTOR = "mlp2x_gelu"


@dataclass
class Commands:
    """Runs commands, and keeps them as a user would type them.

    Attributes:
        lines: The commands so far.
    """

    lines: list[str] = field(default_factory=list)

    def run(self, script: str, *arguments: object, output: Path | None = None) -> None:
        """Print a command, run it, and stop the demo if it fails.

        Args:
            script: Name below ``pipelines/``.
            arguments: Its arguments.
            output: File for its standard output; None leaves it on the terminal.
        """
        words = _words(script, *arguments)
        redirection = "" if output is None else f" > {shlex.quote(str(output))}"
        self.lines.append(f"python {shlex.join(words)}{redirection}")
        print(f"\n$ {self.lines[-1]}", flush=True)
        with nullcontext() if output is None else (ROOT / output).open("wb") as stdout:
            code = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=stdout).returncode
        if code:
            raise UserError(f"pipelines/{script} ended with exit code {code}; its message is above")


@dataclass(frozen=True)
class Models:
    """The two models, and the flags that follow from them and from the hardware.

    Attributes:
        tower: Folder of the vision tower.
        llm: Folder of the LLM.
        select_layer: Hidden state of the tower.
        dtype: ``bf16`` or ``fp32``, of tower and LLM.
        on_cpu: Whether there is no GPU. Trainer accepts bf16 on a CPU only if the CPU is asked for.
    """

    tower: Path
    llm: Path
    select_layer: int
    dtype: str
    on_cpu: bool

    @property
    def extract_flags(self) -> list[object]:
        """Flags of phase one."""
        return [
            *("--vision_tower", self.tower, "--mm_vision_select_layer", self.select_layer),
            *("--compute_dtype", self.dtype),
        ]

    @property
    def train_flags(self) -> list[object]:
        """Flags of phase two."""
        return [
            *("--model_name_or_path", self.llm, "--version", "plain"),
            *("--vision_tower", self.tower, "--mm_vision_select_layer", self.select_layer),
            *("--mm_projector_type", PROJECTOR, "--tune_mm_mlp_adapter", True, "--bf16", self.dtype == "bf16"),
            *(("--use_cpu", True) if self.on_cpu else ()),
        ]


def own_commands(models: Models) -> list[str]:
    """Return the commands for a user's own pictures, with the demo's models."""
    inputs = ("--data_path", "mine.json", "--image_folder", "my-pictures", "--feature_cache", "caches/mine")
    trained = ("--data_path", "mine.json", "--feature_cache", "caches/mine", "--output_dir", "runs/mine")
    recipe = ("--per_device_train_batch_size", 4, "--num_train_epochs", 1, "--learning_rate", "1e-3")
    commands = (
        _words("extract_features.py", *inputs, *models.extract_flags),
        _words("train_projector.py", *trained, *models.train_flags, *recipe),
        _words("use_projector.py", "caption", "runs/mine", "my-pictures"),
    )
    return [f"python {shlex.join(words)}" for words in commands]


def _words(script: str, *arguments: object) -> list[str]:
    return [f"pipelines/{script}", *map(str, arguments)]
