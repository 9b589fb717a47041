"""Runs side by side: names that tell them apart, runs without a loss, and plots that cannot be drawn."""

import json

import pytest

from helpers import run

SCRIPT = "pipelines/compare_runs.py"


@pytest.fixture
def finished(tmp_path):
    """Writes what a finished run leaves of itself."""

    def write(name, losses, **arguments):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        flat = {"model": {"mm_projector_type": "linear"}, "data": {}, "training": {"output_dir": name, **arguments}}
        history = [{"step": step, "loss": loss, "samples_per_second": 2.0} for step, loss in enumerate(losses, 1)]
        (folder / "arguments.json").write_text(json.dumps(flat), encoding="utf-8")
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}), encoding="utf-8")
        return folder

    return write


def table(*arguments):
    lines = run(["python", SCRIPT, *arguments], COLUMNS="400").stdout.splitlines()
    return [line.split() for line in lines if line.strip() and "──" not in line]


def test_a_row_for_each_run_and_a_column_for_each_difference(finished):
    slow, fast = finished("slow", [4.0, 3.0, 2.0], learning_rate=1e-3), finished("fast", [4.0, 1.0], learning_rate=3e-3)
    assert table(slow, f"{fast}/", slow, "--last", "2") == [
        ["run", "learning_rate", "loss,", "last", "2", "samples/s"],
        ["slow", "0.001", "2.5000", "2.00"],
        ["fast", "0.003", "2.5000", "2.00"],
    ]


def test_runs_of_one_name_are_told_apart(finished):
    folders = [finished("a/linear", [1.0]), finished("b/linear", [2.0])]
    assert [row[0] for row in table(*folders)[1:]] == [str(folder) for folder in folders]


def test_a_name_is_no_markup_and_a_run_may_have_no_loss(finished, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: plots)")
    plot = tmp_path / "losses.png"
    rows = table(finished("[red]linear", [1.0]), finished("none", []), "--plot", plot)
    assert [row[:2] for row in rows[1:]] == [["[red]linear", "1.0000"], ["none", "-"]]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_cannot_be_written_is_named(finished, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: plots)")
    folder = finished("linear", [1.0])
    for plot in (tmp_path / "losses.xyz", tmp_path / "nowhere" / "losses.png"):
        said = run(["python", SCRIPT, folder, "--plot", plot], expect=1).stderr
        assert f"error: --plot {plot} cannot be written" in said and "Traceback" not in said
