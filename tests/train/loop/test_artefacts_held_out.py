"""``held_out.json``: the records that a run holds out, and their evaluation after it."""

import json

from llava_twophase.deploy.cli import main as use_projector
from llava_twophase.records import load_records


def test_run_writes_the_records_that_eval_fraction_holds_out(train_in_process, plain_set, plain_cache, capsys):
    assert train_in_process(eval_fraction=0.25, max_steps=2) == (0, True)
    run = train_in_process.folder / "out"
    held_out, everything = load_records(run / "held_out.json"), load_records(plain_set.json)
    assert len(held_out) == round(0.25 * len(everything))
    assert held_out == [record for record in everything if record in held_out]
    capsys.readouterr()
    command = ["evaluate", run, "--data_path", run / "held_out.json", "--feature_cache", plain_cache, "--json"]
    assert use_projector([*map(str, command), "--candidates", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["evaluated_records"] == len(held_out)


def test_run_without_eval_fraction_writes_no_held_out_records(train_in_process, plain_set):
    assert train_in_process(eval_data_path=plain_set.json, eval_fraction=0.25, max_steps=1) == (0, True)
    assert not (train_in_process.folder / "out" / "held_out.json").exists()


def test_held_out_records_are_those_that_are_not_trained(train_in_process, monkeypatch):
    """The file is there before the first step, so that an interrupted run has it too."""
    from llava_twophase.train import run as run_module

    seen = []

    def stop(arguments, inputs, checkpoint):
        seen.append((inputs.records, load_records(train_in_process.folder / "out" / "held_out.json")))
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "_build_model", stop)
    assert train_in_process(eval_fraction=0.5)[0] == 130
    ((trained, held_out),) = seen
    assert held_out and not {record.image for record in trained} & {record.image for record in held_out}
