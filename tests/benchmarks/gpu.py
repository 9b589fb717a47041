"""Measure this project on one GPU, in pieces of at most eight minutes each. `make gpu` runs it.

    make gpu                                             # every piece that has no result yet
    make gpu GPU_ARGS="--pieces extract step-13b"        # these, again
    make gpu GPU_ARGS="--seconds 480"                    # what fits into eight minutes; the next call continues
    make gpu GPU_ARGS="--rehearse"                       # the same code with tiny shapes, on a CPU too

Pieces run in the order of `--help`, the most useful ones first. Each is a process of its own, which is ended after
eight minutes. Results are kept in `--folder`, so a call continues where the last one stopped; a piece that failed is
tried again, after those that have not run yet. The folder gets three files: `gpu.json`, `gpu.md` with tables for
docs/performance.md, and `gpu.log`. They are written after each piece. The last line of output is the JSON object.

Models have random weights, which change neither times nor memory. Nothing is fetched.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
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
    *("torch", "triton", "transformers", "accelerate", "deepspeed", "bitsandbytes", "liger-kernel"),
    *("h5py", "numpy", "pillow", "xxhash", "safetensors"),
)
# Hugging Face's libraries make no request, and start no threads.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


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
        sizes = ("--images", "4", "--sample", "2", "--repetitions", "1")
        return _script("extract.py", "--layers", "2", *sizes, "--folder", ".")
    workers = str(min(16, os.cpu_count() or 1))
    sizes = ("--images", "4096", "--sample", "512", "--batch_size", "64", "--images_per_shard", "512")
    return _script("extract.py", *sizes, "--num_workers", workers, "--folder", ".")


def _commands(piece: str) -> Callable[[bool], list[str]]:
    return lambda rehearse: _script("gpu_commands.py", piece, *(["--rehearse"] if rehearse else []))


PIECES: dict[str, Callable[[bool], list[str]]] = {
    "environment": lambda _: _script("gpu.py", "--environment"),
    "step-1b": _step("1b", "llava", "ours", "compiled", "graphs", "liger"),
    "tests": lambda _: _script("gpu.py", "--tests"),
    "step-13b": _step("13b", "llava", "ours", "compiled", "liger"),
    "extract": _extract,
    "step-7b": _step("7b", "llava", "ours", "compiled", "liger"),
    **{name: _commands(name) for name in ("memory", "bits4", "bits8", "zero2", "zero3", "plain")},
    "step-0.5b": _step("0.5b", "llava", "ours", "compiled", "graphs", "liger"),
    **{name: _commands(name) for name in ("reencode", "delivery")},
    "step-135m": _step("135m", "llava", "ours", "compiled", "graphs", "liger"),
}
"""Each piece, and its command for full shapes or for the rehearsal. Its last line of output is its result as JSON."""


def machine() -> dict[str, Any]:
    """Return the card, its driver and the versions of the libraries; figures of two machines are not mixed."""
    found: dict[str, Any] = {"card": None}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        lines = subprocess.run(query, stdout=subprocess.PIPE, encoding="utf-8").stdout.splitlines()
        if lines and lines[0].count(",") == 2:  # a machine without a driver has one line that says so
            found["card"], found["driver"], found["card_memory"] = (part.strip() for part in lines[0].split(","))
    found |= {"python": platform.python_version(), "cpus": os.cpu_count(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def environment() -> dict[str, Any]:
    """Return the machine as torch and this project see it.

    Raises:
        UserError: A library that the project needs is too old.
        RuntimeError: There is a card that torch cannot use.
    """
    import torch

    from llava_twophase.versions import SUPPORTED, require_supported

    require_supported(*SUPPORTED)
    found = machine()
    if found["card"] and not torch.cuda.is_available():
        raise RuntimeError(f"{found['card']} with driver {found['driver']}: torch {torch.__version__} cannot use it")
    return {**found, "cuda": torch.version.cuda, "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported()}


def gpu_tests() -> dict[str, Any]:
    """Run the tests that need a GPU, and count their outcomes."""
    report = Path("tests.xml").resolve()
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


def run_piece(name: str, folder: Path, work: Path, rehearse: bool, seconds: float) -> dict[str, Any] | None:
    """Run one piece in a process.

    Args:
        name: A key of ``PIECES``.
        folder: Where ``gpu.log`` is.
        work: The process's directory, for models, images and caches.
        rehearse: Use tiny shapes.
        seconds: The time it may take.

    Returns:
        Its result with its seconds; an ``error`` in place of the result if it failed; None if it was ended before it
        had the full eight minutes, so that the next call can try it again.
    """
    log, started = folder / "gpu.log", time.monotonic()
    extensions = work / "extensions"
    for lock in extensions.glob("*/lock"):
        lock.unlink()  # of a piece that was ended while it compiled; torch would wait for it
    variables = {**os.environ, **ENVIRONMENT, "TORCH_EXTENSIONS_DIR": str(extensions)}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("a", encoding="utf-8") as file:
        file.write(f"=== {name}\n")
        file.flush()
        command = PIECES[name](rehearse)
        # A session of its own, so that the processes that it starts end with it and free the GPU.
        with subprocess.Popen(
            command, cwd=work, stdout=subprocess.PIPE, stderr=file, encoding="utf-8", env=variables,
            start_new_session=True,
        ) as process:  # fmt: skip
            try:
                output, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                return {"error": f"took more than {LIMIT} s; see {log}"} if seconds >= LIMIT else None
            finally:
                _end(process)
        file.write(output)
    took = round(time.monotonic() - started, 1)
    lines = output.splitlines()
    if process.returncode != 0 or not lines:
        print(*log.read_text(encoding="utf-8").splitlines()[-8:], sep="\n", file=sys.stderr)
        return {"error": f"exit code {process.returncode}; see {log}", "seconds": took}
    return {"result": json.loads(lines[-1]), "seconds": took}


def _end(process: subprocess.Popen[str]) -> None:
    """End what is left of a piece's session."""
    for ending in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, ending)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)


def markdown(results: dict[str, Any]) -> str:
    """Return the machine in one line, a table of the training steps, and one of all other figures."""
    found = {piece: outcome["result"] for piece, outcome in results.items() if "result" in outcome}
    names = {"card": "", "card_memory": "", "cpus": "CPUs", "python": "Python", "cuda": "CUDA"}
    described = {"card": None, **found.get("environment", {})}
    described["card"] = described["card"] or "no GPU: a rehearsal, whose figures mean nothing"
    parts = [f"{names.get(name, name)} {value}".strip() for name, value in described.items()]
    lines = [", ".join(parts), "", f"| {' | '.join(STEP_COLUMNS)} |", "|" + "---|" * len(STEP_COLUMNS)]
    for name, result in found.items():
        if name.startswith("step-"):
            lines += [f"| {' | '.join(row)} |" for row in _step_rows(name.removeprefix("step-"), result)]
    lines += ["", "| piece | figure | value |", "|---|---|---|"]
    for piece, outcome in results.items():
        if "error" in outcome:
            lines.append(f"| {piece} | error | {outcome['error']} |")
        elif piece != "environment" and not piece.startswith("step-"):
            lines += [f"| {piece} | {figure} | {value} |" for figure, value in _flat(outcome["result"])]
    return "\n".join(lines) + "\n"


STEP_COLUMNS = (
    *("LLM", "step", "samples/s", "vs. LLaVA's way", "peak GB", "of matmul rate"),
    *("first step s", "first loss"),
)


def _step_rows(shape: str, result: dict[str, Any]) -> list[list[str]]:
    (ways,) = [value for name, value in result.items() if name.startswith("ways_")]
    baseline, rows = ways["llava"].get("samples_per_second"), []
    for way, run in ways.items():
        if "failed" in run:
            rows.append([shape, way, run["failed"], *[""] * (len(STEP_COLUMNS) - 3)])
            continue
        rate = run["samples_per_second"]
        figures = (rate / baseline if baseline else float("nan"), run["peak_gb"], run["flops_over_matmul"])
        rest = (f"{run['first_step_seconds']:.1f}", f"{run['losses'][0]:.4f}")
        rows.append([shape, way, f"{rate:.4g}", *(f"{figure:.2f}" for figure in figures), *rest])
    return rows


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [row for key, part in value.items() for row in _flat(part, f"{name} {key}".strip())]
    return [(name, f"{value:.4g}" if isinstance(value, float) else str(value))]


def require_same_machine(results: dict[str, Any], file: Path) -> None:
    """Check that the results are of this machine.

    Raises:
        SystemExit: They are of another card or of other versions.
    """
    before, now = results.get("environment", {}).get("result", {}), machine()
    changed = [
        f"{name} was {before[name]} and is {now.get(name)}"
        for name in ("card", "python", *PACKAGES)
        if name in before and before[name] != now.get(name)
    ]
    if changed:
        raise SystemExit(f"error: {file} is of another machine: {'; '.join(changed)}; give another --folder")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", nargs="+", choices=PIECES, help="run these, whether or not they have a result")
    parser.add_argument("--folder", type=Path, help="of the results (default: gpu-results)")
    parser.add_argument("--work", type=Path, help="of models, images and caches, 20 GB (default: gpu-results/work)")
    parser.add_argument("--seconds", type=float, help="start no piece, and end the running one, after this time")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on a CPU too; its figures mean nothing")
    parser.add_argument("--environment", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--tests", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.environment or args.tests:
        print(json.dumps(environment() if args.environment else gpu_tests()))
        return 0
    default = ROOT / "gpu-results"
    folder, work = (args.folder or default).resolve(), (args.work or default / "work").resolve()
    for path in (folder, work):
        path.mkdir(parents=True, exist_ok=True)
    file = folder / ("rehearsal.json" if args.rehearse else "gpu.json")
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    require_same_machine(results, file)
    new = [name for name in PIECES if name not in results]
    failed = [name for name in PIECES if "error" in results.get(name, {})]
    started = time.monotonic()
    for name in args.pieces or [*new, *failed]:
        left = LIMIT if args.seconds is None else min(LIMIT, args.seconds - (time.monotonic() - started))
        if left <= 0:
            print(f"no time left for {name}; the next call continues with it", file=sys.stderr)
            break
        print(f"{name} ...", file=sys.stderr, flush=True)
        outcome = run_piece(name, folder, work, args.rehearse, left)
        if outcome is None:
            print(f"{name}: no time left; the next call runs it again", file=sys.stderr)
            break
        print(f"{name}: {outcome.get('error', '')} {outcome.get('seconds', LIMIT)} s", file=sys.stderr, flush=True)
        results = {piece: {**results, name: outcome}[piece] for piece in PIECES if piece in {*results, name}}
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        file.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results))
    print(json.dumps(results))
    return int(any("error" in outcome for outcome in results.values()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the running piece too
    sys.exit(main())
