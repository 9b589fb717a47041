"""Training runs side by side: names, arguments that differ, narrow terminals, runs without a loss, and plots."""

import json

import pytest

from llava_twophase.compare_runs import main

LONG = {
    "feature_cache": "caches/laion-cc-sbu-558k-clip-vit-large-patch14-336-{}",
    "model_name_or_path": "/models/organisation/a-language-model-with-a-long-name-{}",
    "mm_projector_type": "mlp{}x_gelu",
}


@pytest.fixture
def finished(tmp_path):
    """Write what a finished run leaves."""

    def write(name, losses, image_tokens=None, **arguments):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        training = {"output_dir": name, "run_name": name, "save_steps": len(name), "logging_dir": name, **arguments}
        content = {
            "given": {"output_dir": name},
            "model": {"mm_projector_type": "linear"},
            "data": {},
            "training": training,
            **({"projector": {"image_tokens": image_tokens}} if image_tokens else {}),
        }
        history = [{"step": step, "loss": loss, "samples_per_second": 2.0} for step, loss in enumerate(losses, 1)]
        (folder / "arguments.json").write_text(json.dumps(content), encoding="utf-8")
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}), encoding="utf-8")
        return str(folder)

    return write


@pytest.fixture
def compare(capsys, monkeypatch):
    """Run the command; return its output and its errors."""

    def run(*arguments, columns=80, expect=0):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main([str(argument) for argument in arguments]) == expect
        return capsys.readouterr()

    return run


def cells(text):
    return [line.split() for line in text.splitlines() if line.strip() and not line.startswith("loss: ")]


def test_table_has_a_row_for_each_run_and_a_column_for_each_difference(finished, compare):
    slow, fast = finished("slow", [4.0, 3.0, 2.0], learning_rate=1e-3), finished("fast", [4.0, 1.0], learning_rate=3e-3)
    assert cells(compare(slow, f"{fast}/", slow, "--last", "2").out) == [
        ["run", "learning_rate", "loss", "samples/s"],
        ["slow", "0.001", "2.5000", "2.00"],
        ["fast", "0.003", "2.5000", "2.00"],
    ]


def test_table_skips_arguments_that_change_no_loss(finished, compare):
    runs = [finished(name, [1.0], report_to=name, dataloader_num_workers=len(name)) for name in ("a", "bb")]
    assert cells(compare(*runs).out)[0] == ["run", "loss", "samples/s"]


def test_narrow_terminal_breaks_no_word(finished, compare):
    runs = [
        finished(f"run-{number}", [1.0], **{name: text.format(number) for name, text in LONG.items()})
        for number in (1, 2)
    ]
    text = compare(*runs).out
    assert max(len(line) for line in text.splitlines()) <= 80
    for number in (1, 2):
        for name, value in LONG.items():
            assert name in text and f"  run-{number}: {value.format(number)}\n" in text
    wide = cells(compare(*runs, columns=300).out)
    assert wide[0][1:4] == ["feature_cache", "mm_projector_type", "model_name_or_path"] and len(wide) == 3


def test_runs_of_one_name_have_their_paths(finished, compare):
    folders = [finished("a/linear", [1.0]), finished("b/linear", [2.0])]
    assert [row[0] for row in cells(compare(*folders, columns=300).out)[1:]] == folders


def test_name_is_not_markup_and_a_run_may_have_no_loss(finished, compare, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: plots)")
    plot = tmp_path / "losses.png"
    rows = cells(compare(finished("[red]linear", [1.0]), finished("none", []), "--plot", plot).out)
    assert [row[:2] for row in rows[1:]] == [["[red]linear", "1.0000"], ["none", "-"]]
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("arguments.json", "[]", "arguments.json is not a JSON object"),
        ("arguments.json", '{"model": {}}', "arguments.json has no data"),
        ("trainer_state.json", "{}", "trainer_state.json has no log_history"),
        ("trainer_state.json", "{", "trainer_state.json cannot be read"),
    ],
)
def test_damaged_run_is_one_error(finished, compare, file, content, problem, tmp_path):
    folder = finished("linear", [1.0])
    (tmp_path / "linear" / file).write_text(content, encoding="utf-8")
    errors = compare(folder, expect=1).err
    assert errors.startswith(f"error: {folder} is not a finished run: {problem}") and len(errors.splitlines()) == 1


def test_plot_that_cannot_be_written_is_one_error(finished, compare, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: plots)")
    folder = finished("linear", [1.0])
    for plot in (tmp_path / "losses.xyz", tmp_path / "nowhere" / "losses.png"):
        assert compare(folder, "--plot", plot, expect=1).err.startswith(f"error: --plot {plot} cannot be written")


@pytest.mark.parametrize("last", ["0", "-1", "ten"])
def test_last_must_be_positive(last, capsys):
    assert main(["run", "--last", last]) == 2
    assert f"--last {last}: expected a whole number of at least 1" in capsys.readouterr().err


def test_image_tokens_are_shown_where_they_differ(finished, compare):
    """A run of an earlier version did not record them."""
    mlp, other = finished("mlp", [1.0], image_tokens=576), finished("mlp3", [1.0], image_tokens=576)
    assert "image_tokens" not in compare(mlp, other).out
    shuffled, old = finished("shuffle", [1.0], image_tokens=144), finished("old", [1.0])
    lines = [line.split() for line in compare(mlp, shuffled, old).out.splitlines()]
    assert [line[1] for line in lines[:4]] == ["image_tokens", "576", "144", "null"]
