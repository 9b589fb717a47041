"""Measure this project on one GPU, in pieces of at most eight minutes each. `make gpu` runs it.

    make gpu                                             # every piece that has no result yet
    make gpu GPU_ARGS="--pieces extract step-13b"        # these, again
    make gpu GPU_ARGS="--seconds 480"                    # what fits into eight minutes; the next call continues
    make gpu GPU_ARGS="--rehearse"                       # the same code with tiny shapes, on a CPU too

Results are kept in `--folder` (default: gpu-results), one file for all calls, so a call continues where the last one
stopped. A piece is a process of its own, which is ended after eight minutes; a piece that failed is tried again by the
next call, after those that have not run yet. The last line is one JSON object with all results; above it and in
`gpu.md` is a Markdown table for docs/performance.md.

Models have random weights, which change neither times nor memory. Nothing is fetched.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "tests" / "benchmarks"
LIMIT = 480
PACKAGES = (
    *("torch", "transformers", "accelerate", "deepspeed", "h5py", "numpy", "pillow", "xxhash", "safetensors"),
    *("bitsandbytes", "liger-kernel", "triton"),
)


def _script(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(BENCHMARKS / name), *arguments]


def _step(shape: str, *ways: str) -> Callable[[bool], list[str]]:
    def command(rehearse: bool) -> list[str]:
        if rehearse:  # CUDA graphs and Liger's kernels need a GPU
            ways_here = [way for way in ways if way not in ("graphs", "liger")]
            return _script("train_step.py", "--shapes", "tiny", "--ways", *ways_here)
        return _script("train_step.py", "--shapes", shape, "--steps", "5", "--ways", *ways)

    return command


def _extract(rehearse: bool) -> list[str]:
    if rehearse:
        return _script("extract.py", "--layers", "2", "--images", "4", "--repetitions", "1")
    workers = str(min(16, os.cpu_count() or 1))
    sizes = ("--images", "2048", "--batch_size", "64", "--images_per_shard", "512")
    return _script("extract.py", *sizes, "--num_workers", workers)


def _commands(piece: str) -> Callable[[bool], list[str]]:
    return lambda rehearse: _script("gpu_commands.py", piece, *(["--rehearse"] if rehearse else []))


COMMAND_PIECES = ("memory", "plain", "zero2", "zero3", "bits8", "bits4", "reencode", "delivery")
PIECES: dict[str, Callable[[bool], list[str]]] = {
    "environment": lambda _: _script("gpu.py", "--environment"),
    "tests": lambda _: _script("gpu.py", "--tests"),
    "extract": _extract,
    "step-135m": _step("135m", "llava", "ours", "compiled", "graphs", "liger"),
    "step-1b": _step("1b", "llava", "ours", "compiled", "graphs", "liger"),
    "step-7b": _step("7b", "llava", "ours", "compiled", "liger"),
    "step-13b": _step("13b", "llava", "ours", "compiled", "liger"),
    **{
        name: _commands(name)
        for name in ("memory", "plain", "zero2", "zero3", "bits8", "bits4", "reencode", "delivery")
    },
}
"""Each piece, and its command for full shapes or for the rehearsal. Its last line of output is its result as JSON."""


def environment() -> dict[str, Any]:
    """Return the machine and the versions of the libraries.

    Raises:
        SystemExit: A library that the project needs is missing or too old.
    """
    import torch

    from llava_twophase.versions import require_supported

    require_supported()
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        card = subprocess.run(query, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout.splitlines()[0]
        found["card"], found["driver"], found["card_memory"] = (part.strip() for part in card.split(","))
        found["cuda"] = torch.version.cuda
    else:
        found["card"] = "none: a CPU rehearsal, whose figures mean nothing"
    return found


def gpu_tests() -> dict[str, Any]:
    """Run the tests that need a GPU, and count their outcomes."""
    report = Path("gpu-tests.xml").resolve()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py", f"--junitxml={report}"]
    done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr)
    from xml.etree import ElementTree

    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    cases = suite.findall("testcase")
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = {
        case.get("name"): case.find("skipped").get("message") for case in cases if case.find("skipped") is not None
    }
    return {
        "exit_code": done.returncode,
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": failed,
        "skipped": skipped,
    }


def run_piece(name: str, folder: Path, rehearse: bool, seconds: float) -> dict[str, Any] | None:
    """Run one piece in a process.

    Args:
        name: A key of ``PIECES``.
        folder: Where it works and where its log goes.
        rehearse: Use tiny shapes.
        seconds: The time it may take.

    Returns:
        Its result with its seconds; an ``error`` in place of the result if it failed; None if it was ended before it
        had the full eight minutes, so that the next call can try it again.
    """
    command = PIECES[name](rehearse)
    log, started = folder / f"{name}.log", time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with log.open("w", encoding="utf-8") as errors:
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
                timeout=seconds,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"took more than {LIMIT} s; see {log}"} if seconds >= LIMIT else None
    with log.open("a", encoding="utf-8") as errors:
        errors.write(done.stdout)
    took = round(time.monotonic() - started, 1)
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        return {"error": f"exit code {done.returncode}; see {log}", "seconds": took}
    return {"result": json.loads(lines[-1]), "seconds": took}


def markdown(results: dict[str, Any]) -> str:
    """Return all figures as one Markdown table: piece, figure, value."""
    lines = ["| piece | figure | value |", "|---|---|---|"]
    for piece, outcome in results.items():
        rows = _flat(outcome["result"]) if "result" in outcome else [("error", outcome["error"])]
        lines += [f"| {piece} | {figure} | {value} |" for figure, value in rows]
    return "\n".join(lines) + "\n"


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [row for key, part in value.items() for row in _flat(part, f"{name} {key}".strip())]
    return [(name, f"{value:.4g}" if isinstance(value, float) else str(value))]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", nargs="+", choices=PIECES, help="run these, whether or not they have a result")
    parser.add_argument("--folder", type=Path, default=ROOT / "gpu-results", help="default: gpu-results")
    parser.add_argument("--seconds", type=float, help="start no piece, and end the running one, after this time")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on a CPU too; its figures mean nothing")
    parser.add_argument("--environment", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--tests", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.environment or args.tests:
        print(json.dumps(environment() if args.environment else gpu_tests()))
        return 0
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ("rehearsal.json" if args.rehearse else "gpu.json")
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    new = [name for name in PIECES if name not in results]
    failed = [name for name in PIECES if "error" in results.get(name, {})]
    started = time.monotonic()
    for name in args.pieces or [*new, *failed]:
        left = LIMIT if args.seconds is None else min(LIMIT, args.seconds - (time.monotonic() - started))
        if left <= 0:
            print(f"no time left for {name}; the next call continues with it", file=sys.stderr)
            break
        print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
        outcome = run_piece(name, folder, args.rehearse, left)
        if outcome is None:
            print("no time left; the next call runs it again", file=sys.stderr)
            break
        print(outcome.get("error", f"{outcome.get('seconds')} s"), file=sys.stderr)
        results[name] = outcome
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    ordered = {name: results[name] for name in PIECES if name in results}
    table = markdown(ordered)
    file.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)
    print(json.dumps(ordered))
    return int(any("error" in outcome for outcome in ordered.values()))


if __name__ == "__main__":
    sys.exit(main())
