"""tests/benchmarks/gpu.py: which pieces run, what ends them, and what is kept of them. Pieces are one-line programs."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu, train_step
from llava_twophase.errors import UserError

RUN = {"samples_per_second": 2.0, "peak_gb": 3.0, "flops_over_matmul": 0.5, "first_step_seconds": 9.0, "losses": [5.0]}


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Runs main() with these {piece: Python source}; returns its exit code and the results."""

    def run(pieces, *arguments):
        commands = {name: (lambda _, source=source: [sys.executable, "-c", source]) for name, source in pieces.items()}
        monkeypatch.setattr(gpu, "PIECES", commands)
        code = gpu.main(["--folder", str(tmp_path), "--work", str(tmp_path / "work"), *arguments])
        return code, json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))

    return run


def test_next_call_runs_missing_pieces_then_failed_ones(measure, tmp_path):
    count = "open('order', 'a').write('{0}'); print('{{}}')".format
    fails = count("f") + "; raise SystemExit('no such kernel')"
    code, results = measure({"failing": fails, "first": count("a")})
    assert code == 1 and "exit code 1" in results["failing"]["error"] and results["first"]["result"] == {}
    assert "no such kernel" in (tmp_path / "gpu.log").read_text(encoding="utf-8")
    code, results = measure({"failing": count("F"), "first": count("A"), "second": count("b")})
    assert code == 0 and list(results) == ["failing", "first", "second"]
    assert (tmp_path / "work" / "order").read_text(encoding="utf-8") == "fabF"


def test_piece_is_ended_with_the_processes_that_it_started(measure, tmp_path):
    """Otherwise it would hold memory of the GPU during the next piece."""
    child = "import os, time; open('child', 'w').write(str(os.getpid())); time.sleep(60)"
    source = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with pytest.raises(FileNotFoundError):  # no result, so that the next call runs it again
        measure({"slow": source}, "--seconds", "3")
    process = Path("/proc", (tmp_path / "work" / "child").read_text(encoding="utf-8"))
    deadline = time.monotonic() + 5
    while process.exists() and process.joinpath("cmdline").read_bytes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not process.exists() or not process.joinpath("cmdline").read_bytes()  # gone, or a zombie


def test_pieces_have_no_hub_and_find_this_checkout(measure, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    source = "import json, os, llava_twophase as l; print(json.dumps([os.environ['HF_HUB_OFFLINE'], l.__file__]))"
    _, results = measure({"piece": source})
    offline, file = results["piece"]["result"]
    assert offline == "1" and Path(file).is_relative_to(gpu.ROOT)


def test_lock_of_an_interrupted_compilation_is_removed(measure, tmp_path):
    lock = tmp_path / "work" / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    _, results = measure({"piece": "import json, os; print(json.dumps(os.environ['TORCH_EXTENSIONS_DIR']))"})
    assert not lock.exists() and results["piece"]["result"] == str(tmp_path / "work" / "extensions")


def test_results_of_another_card_are_not_continued(measure, monkeypatch):
    monkeypatch.setattr(gpu, "machine", lambda: {"card": "H100", "torch": "2.11.0"})
    measure({"environment": 'print(\'{"card": "H100", "torch": "2.11.0"}\')'})
    monkeypatch.setattr(gpu, "machine", lambda: {"card": "H200", "torch": "2.11.0"})
    with pytest.raises(SystemExit, match=r"gpu\.json is of another machine: card was H100 and is H200; give another"):
        measure({"next": "print('{}')"})


def test_environment_refuses_a_library_out_of_range(monkeypatch):
    monkeypatch.setattr("llava_twophase.versions.version", lambda name: "1.0")
    with pytest.raises(UserError, match=r"transformers 1\.0 is installed"):
        gpu.environment()


def test_markdown_has_a_row_for_each_way_and_other_figures():
    ours = {**RUN, "samples_per_second": 3.0}
    steps = {"ways_1b": {"llava": RUN, "ours": ours, "graphs": {"failed": "out of memory"}}, "speedup_1b": 1.5}
    text = gpu.markdown(
        {
            "environment": {"result": {"card": "H100", "driver": "580", "torch": "2.11.0"}},
            "step-1b": {"result": steps},
            "memory": {"result": {"4 x 32": {"peak_gb": 1.23456}}},
            "zero2": {"error": "exit code 1"},
        }
    )
    assert text.startswith("H100, driver 580, torch 2.11.0\n")
    assert "| 1b | ours | 3 | 1.50 | 3.00 | 0.50 | 9.0 | 5.0000 |" in text
    assert "| 1b | graphs | out of memory |" in text
    assert "| memory | 4 x 32 peak_gb | 1.235 |" in text and "| zero2 | error | exit code 1 |" in text


def test_every_step_shape_of_the_recipe_is_a_piece():
    shapes = {"0.5b", "1b", "7b", "13b"}
    assert {f"step-{shape}" for shape in shapes} <= gpu.PIECES.keys()
    for shape in shapes:
        command = gpu.PIECES[f"step-{shape}"](False)
        assert shape in command and {"llava", "ours", "compiled", "liger"} <= set(command)


def test_train_step_measures_the_ways_after_one_that_fails(monkeypatch, capsys):
    def run(command, **options):
        way = command[command.index("--worker") + 2]
        return subprocess.CompletedProcess(command, int(way == "compiled"), json.dumps({**RUN, "seconds": 1.0}))

    monkeypatch.setattr(train_step, "draw_samples", lambda shape, folder: None)
    monkeypatch.setattr(train_step.subprocess, "run", run)
    results = train_step.measure("tiny", ["llava", "compiled", "ours"], repeats=2, steps=1)
    assert results["compiled"] == {"failed": "exit code 1; stderr has the reason"}
    assert results["llava"]["peak_gb"] == results["ours"]["peak_gb"] == 3.0
    train_step.show(train_step.SHAPES["tiny"], results)
    assert "exit code 1" in capsys.readouterr().out
