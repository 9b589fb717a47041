"""Gather what this project needs on a GPU machine without network into one folder. `make gpu-wheels` runs it.

    make gpu-wheels                                                         # Python 3.12, torch 2.11 for CUDA 13.0
    make gpu-wheels GPU_ARGS="--python 3.11 --torch 2.13.0 --cuda 130"

The machine has Python, NumPy, and torch with its dependencies, on x86-64. Everything else is gathered, in the versions
of constraints.txt; a version that the machine has, and that is in the range of pyproject.toml, stays. DeepSpeed has no
wheel on PyPI, so one is built here, without its C++ and CUDA operations. bitsandbytes keeps one CUDA library of many.

The last line is the command that installs all of it on the machine, from this project's root.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LIMIT_MB = 64
# No newer C library than torch's own wheels need. pip prefers the first, and matches each of them exactly.
PLATFORMS = (
    *("manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64"),
    *(f"manylinux_2_{minor}_x86_64" for minor in range(5, 29)),
)
TESTS = ("pytest", "pytest-timeout")


def requirements() -> list[str]:
    """Return the lines of pyproject.toml that a GPU machine needs: dependencies, extra `gpu`, and pytest."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    tests = [line for line in extras["test"] if Requirement(line).name in TESTS]
    return [*project["dependencies"], *extras["gpu"], *tests]


def constraints(preinstalled: Mapping[str, str]) -> dict[str, str]:
    """Return {name: version} of constraints.txt, with the versions of the machine where it has the package."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    return {canonicalize_name(name): version for name, version in pins.items()} | dict(preinstalled)


def pip(*arguments: str | Path) -> str:
    """Run this interpreter's pip and return what it prints; DeepSpeed, if it is built, gets no compiled operations."""
    command = [sys.executable, "-m", "pip", "--quiet", *map(str, arguments)]
    environment = {**os.environ, "DS_BUILD_OPS": "0"}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8", env=environment).stdout


def target(python: str) -> list[str]:
    """Return pip's options that select wheels for the machine."""
    return [
        "--only-binary=:all:",
        f"--python-version={python}",
        *(f"--platform={name}" for name in PLATFORMS),
    ]


def resolve(wanted: Iterable[str], python: str, *options: str | Path) -> dict[str, str]:
    """Return {name: version} of requirements and all that they depend on, as pip resolves them for the machine."""
    nowhere = ("--dry-run", "--report", "-", "--target", tempfile.gettempdir())
    report = json.loads(pip("install", *nowhere, *target(python), *options, *wanted))
    found = [entry["metadata"] for entry in report["install"]]
    return {canonicalize_name(metadata["name"]): metadata["version"] for metadata in found}


def slim_bitsandbytes(wheel: Path, cuda: str) -> None:
    """Repack bitsandbytes' wheel in place with the libraries for the CPU and for one CUDA version.

    Args:
        wheel: The wheel from PyPI.
        cuda: As in the library's name: 130 for CUDA 13.0.

    Raises:
        SystemExit: The wheel has no library for this CUDA version.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "wheel", "unpack", wheel, "--dest", folder]
        subprocess.run(command, check=True, stdout=sys.stderr)
        (content,) = folder.iterdir()
        libraries = {path.name: path for path in (content / "bitsandbytes").glob("libbitsandbytes_*.so")}
        kept = {"libbitsandbytes_cpu.so", f"libbitsandbytes_cuda{cuda}.so"}
        if kept - libraries.keys():
            raise SystemExit(f"error: {wheel.name} has no {', '.join(kept - libraries.keys())}; give another --cuda")
        for library in libraries.keys() - kept:
            libraries[library].unlink()
        wheel.unlink()
        command = [sys.executable, "-m", "wheel", "pack", content, "--dest-dir", wheel.parent]
        subprocess.run(command, check=True, stdout=sys.stderr)


def require_complete(folder: Path, preinstalled: Mapping[str, str], python: str) -> None:
    """Check that the wheels' requirements are in the folder or on the machine.

    pip evaluates conditions such as `python_version < "3.13"` for the interpreter that runs it, not for the machine's.

    Raises:
        SystemExit: With each requirement that is not met.
    """
    machine = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    wheels = [_metadata(path) for path in sorted(folder.glob("*.whl"))]
    found = dict(preinstalled) | {canonicalize_name(wheel.name): str(wheel.version) for wheel in wheels}

    def is_met(needed: Requirement) -> bool:
        if needed.marker is not None and not needed.marker.evaluate(machine):
            return True
        name = canonicalize_name(needed.name)
        return name in found and needed.specifier.contains(found[name], prereleases=True)

    missing = [
        f"{wheel.name} needs {needed}" for wheel in wheels for needed in wheel.requires_dist or [] if not is_met(needed)
    ]
    if missing:
        raise SystemExit("error: " + "; ".join(missing) + f"; run this script with Python {python}")


def _metadata(wheel: Path) -> Metadata:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Metadata.from_email(archive.read(name), validate=False)


def require_size(folder: Path, limit_mb: float = LIMIT_MB) -> float:
    """Return the folder's size in MB (10^6 bytes).

    Raises:
        SystemExit: It is over the limit; with the largest files.
    """
    sizes = {path.name: path.stat().st_size / 1e6 for path in folder.iterdir()}
    total = sum(sizes.values())
    if total > limit_mb:
        largest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:5]
        listed = ", ".join(f"{name} {sizes[name]:.1f} MB" for name in largest)
        raise SystemExit(f"error: {folder} has {total:.1f} MB, the limit is {limit_mb:g} MB; the largest: {listed}")
    return total


def gather(folder: Path, python: str, torch: str, cuda: str) -> None:
    """Fill the folder with wheels and requirements.txt; the wheels of an earlier call are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    preinstalled = resolve([f"torch=={torch}", "numpy"], python)
    pins = constraints(preinstalled)
    pip("wheel", "--no-deps", "--wheel-dir", folder, f"deepspeed=={pins['deepspeed']}")
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.writelines(f"{name}=={version}\n" for name, version in pins.items())
        file.flush()
        found = resolve(requirements(), python, "--constraint", file.name, "--find-links", folder)
    chosen = [f"{name}=={version}" for name, version in found.items() if name not in {*preinstalled, "deepspeed"}]
    pip("download", "--no-deps", "--dest", folder, *target(python), *chosen)
    slim_bitsandbytes(*folder.glob("bitsandbytes-*.whl"), cuda)
    (folder / "requirements.txt").write_text("\n".join(requirements()) + "\n", encoding="utf-8")
    require_complete(folder, preinstalled, python)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="the machine's Python (default: 3.12)")
    parser.add_argument("--torch", default="2.11.0", help="the machine's torch (default: 2.11.0)")
    parser.add_argument("--cuda", default="130", help="CUDA of the machine's torch: 130 for 13.0 (the default)")
    parser.add_argument("--folder", type=Path, default=Path("gpu-wheels"), help="default: gpu-wheels")
    args = parser.parse_args()
    gather(args.folder, args.python, args.torch, args.cuda)
    for path in sorted(args.folder.iterdir()):
        print(f"{path.stat().st_size / 1e6:8.2f} MB  {path.name}")
    print(f"{require_size(args.folder):8.2f} MB  in all, of at most {LIMIT_MB} MB")
    print(f"python3 -m pip install --no-index --find-links {args.folder} -r {args.folder}/requirements.txt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
