"""Real pictures with real captions: Debian's tuxpaint-stamps-default, fetched by apt when asked for.

The stamps are GPL-2: they are unpacked into the cache folder, outside the repository, and never committed.
"""

from __future__ import annotations

import logging
import random
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from llava_twophase.errors import UserError
from pipelines.demo.fetch import cache_folder
from pipelines.demo.scenes import PROMPTS, make_record, write_splits

logger = logging.getLogger(__name__)

PACKAGE = "tuxpaint-stamps-default"
INSIDE = "usr/share/tuxpaint/stamps"
SIDE = 224  # pixels; stamps come in all sizes, and the tower's crop is smaller still


def fetch_stamps() -> Path:
    """Return the folder of unpacked stamps in the cache folder, fetched with `apt-get download` on the first call.

    Raises:
        UserError: There is no apt, no dpkg, or the package cannot be downloaded.
    """
    folder = cache_folder() / PACKAGE
    if folder.exists():
        return folder / INSIDE
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise UserError(f"DATA=stamps needs {tool} (Debian or Ubuntu), which is not installed; use DATA=scenes")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".stamps-", dir=folder.parent) as scratch:
        logger.info("fetching %s with apt-get download (about 160 MB)", PACKAGE)
        if _apt("download", PACKAGE, folder=scratch).returncode:
            _apt("update", folder=scratch)  # only now: it needs root and takes a while
            done = _apt("download", PACKAGE, folder=scratch)
            if done.returncode:
                raise UserError(f"apt-get could not download {PACKAGE}: {done.stderr.strip()}\nTry: apt-get update")
        package = next(Path(scratch).glob("*.deb"))
        unpacked = Path(scratch) / "unpacked"
        subprocess.run(["dpkg", "-x", str(package), str(unpacked)], check=True)
        unpacked.replace(folder)
    return folder / INSIDE


def _apt(*arguments: str, folder: str) -> subprocess.CompletedProcess[str]:
    command = ["apt-get", "--quiet", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", errors="replace")


def pair_stamps(stamps: Path) -> list[tuple[Path, str]]:
    """Pair each picture with its caption: the first line of the .txt beside the .png, UTF-8.

    Args:
        stamps: Folder searched with its subfolders.

    Returns:
        (picture, caption) in path order; pictures without a caption are skipped.
    """
    pairs = []
    for picture in sorted(stamps.rglob("*.png")):
        text = picture.with_suffix(".txt")
        lines = text.read_text(encoding="utf-8").splitlines() if text.exists() else []
        if lines and lines[0].strip():
            pairs.append((picture, lines[0].strip()))
    return pairs


def write_stamps(
    stamps: Path, folder: Path, held_out: int, seed: int = 0, limit: int | None = None
) -> tuple[Path, Path]:
    """Write stamps as records and RGB pictures of `SIDE` x `SIDE` pixels, split by a seed.

    Args:
        stamps: Folder of unpacked stamps.
        folder: Receives images/, train.json and held_out.json.
        held_out: Number of held-out stamps; the rest trains.
        seed: Decides the split.
        limit: Use no more than so many stamps.

    Returns:
        Paths of train.json and held_out.json, whose image keys are relative to `folder`/images.
    """
    rng = random.Random(seed)
    pairs = pair_stamps(stamps)
    rng.shuffle(pairs)
    seen: set[bytes] = set()
    records = []
    for source, caption in pairs:
        picture = on_white(source)
        if picture.tobytes() in seen:  # some stamps are duplicates; they must not be in both splits
            continue
        seen.add(picture.tobytes())
        key = source.relative_to(stamps).as_posix()
        target = folder / "images" / key
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(target)
        records.append(make_record(key, caption, rng.choice(PROMPTS)))
        if len(records) == limit:
            break
    return write_splits(folder, records[held_out:], records[:held_out])


def on_white(path: Path) -> Image.Image:
    """Return a stamp on a white square: the colour of transparent pixels is arbitrary, and plain RGB would show it."""
    with Image.open(path) as opened:
        stamp = opened.convert("RGBA")
    stamp.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    square = Image.new("RGBA", (SIDE, SIDE), "white")
    square.alpha_composite(stamp, ((SIDE - stamp.width) // 2, (SIDE - stamp.height) // 2))
    return square.convert("RGB")
