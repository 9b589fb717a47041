"""``--plan``: what it reports, what it predicts, and that it writes nothing and loads no LLM."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from cache.make import make_cache
from commands import torchrun, train_command
from drawn import make_record, write_records
from helpers import ROOT, run
from llava_twophase.train.cli import main
from llava_twophase.train.plan import calibrate, measure
from llava_twophase.train.plan.show import absent_devices
from tiny import write_llama

CAPTION = "a red circle above a green square and a blue one"
# glibc keeps freed memory of blocks below 32 MB, as many as a program happens to free: measured with it, peaks differ
# by a third. Larger blocks are mapped, and returned when they are freed.
EXACT_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": 65536}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A cache of 144 patch features for each of 23 images, their records, and two random LLMs."""
    folder = tmp_path_factory.mktemp("plan")
    cache, keys, _ = make_cache(folder / "cache", counts=(12, 11), shape=(144, 256))
    records = [make_record(key, key, CAPTION * (1 + number % 3)) for number, key in enumerate(keys)]
    write_llama(folder / "tiny", [CAPTION])
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8}
    write_llama(folder / "larger", [CAPTION], num_key_value_heads=8, vocab_size=30_000, **shape)
    return SimpleNamespace(folder=folder, cache=cache, records=write_records(records, folder / "records.json"))


@pytest.fixture(autouse=True)
def short_measurement(monkeypatch):
    monkeypatch.setattr(calibrate, "_MEASURED_SECONDS", 0)


@pytest.fixture
def command(inputs, tmp_path):
    """Return a training command; the first parameter is the LLM."""

    def build(llm="tiny", **flags):
        return train_command(
            model_name_or_path=inputs.folder / llm,
            **{
                "data_path": inputs.records,
                "vision_tower": "my/tower",
                "feature_cache": inputs.cache,
                "output_dir": tmp_path / "out",
                "per_device_train_batch_size": 8,
                **flags,
            },
        )

    return build


def plan(command, capsys, *flags):
    """Return the exit code and the report of ``--plan``."""
    code = main([*command[1:], "--plan", *flags])
    return code, capsys.readouterr().out


def gigabytes(report, part):
    return float(re.search(rf"([\d.]+)  {part}", report)[1])


def test_plan_loads_no_llm_and_writes_nothing(command, capsys, tmp_path, inputs):
    for file in (inputs.folder / "tiny").glob("*.safetensors"):
        assert file.exists()
        file.rename(file.with_suffix(".away"))
    try:
        code, report = plan(command(), capsys)
    finally:
        for file in (inputs.folder / "tiny").glob("*.away"):
            file.rename(file.with_suffix(".safetensors"))
    assert code == 0 and list(tmp_path.iterdir()) == []
    for section in ("data", "steps", "micro-batches", "memory", "fits", "checkpoint", "time"):
        assert re.search(rf"^{section} ", report, re.M), section
    assert "23 records, 0 held out" in report and "144 of them its image" in report


@pytest.mark.parametrize(
    "flags", [{}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}, {"dataloader_drop_last": True}]
)
def test_plan_counts_the_steps_and_chooses_the_micro_batches_of_the_run(command, capsys, tmp_path, caplog, flags):
    _, report = plan(command(**flags), capsys)
    with caplog.at_level("INFO"):
        assert main(command(**flags)[1:]) == 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text(encoding="utf-8"))
    assert int(re.search(r"steps +(\d+) optimizer steps", report)[1]) == state["max_steps"]
    chosen = re.search(r"in (micro-batches of \d+ samples?, .*?): about", caplog.text)[1]
    assert re.search(r"^micro-batches +(micro-batches of .*?);", report, re.M)[1] == chosen


def test_plan_gives_the_lengths_of_the_samples(command, capsys):
    _, report = plan(command(), capsys)
    longest = int(re.search(r"longest: (\d+)", report)[1])
    assert f"99 %: {longest}" in report
    assert plan(command(model_max_length=160), capsys)[1].count("truncated") == 1
    assert "longest: 160;" in plan(command(model_max_length=160), capsys)[1]


def measured_peak(command, output):
    """Train in a fresh process; return its peak memory in GB."""
    run(["python", *command], **EXACT_ALLOCATOR)
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    return max(entry.get("memory_gb", 0) for entry in state["log_history"])


def test_planned_memory_is_within_20_percent_of_the_measured_peak(command, capsys, tmp_path):
    """On the CPU, for a tiny and a larger random LLM; their difference is free of what Python and libraries take."""
    report = run(["python", *command("larger"), "--plan"]).stdout
    libraries = gigabytes(report, "Python and its libraries")
    planned = {"larger": gigabytes(report, "peak"), "tiny": gigabytes(plan(command("tiny"), capsys)[1], "peak")}
    measured = {}
    for llm, size in planned.items():
        measured[llm] = measured_peak(command(llm, max_steps=1, output_dir=tmp_path / llm), tmp_path / llm)
        assert size + libraries == pytest.approx(measured[llm], rel=0.2)
    assert planned["larger"] - planned["tiny"] > 0.3
    assert planned["larger"] - planned["tiny"] == pytest.approx(measured["larger"] - measured["tiny"], rel=0.2)


def test_plan_for_absent_gpus_says_what_does_not_fit_and_what_to_type(command, capsys, tmp_path):
    code, report = plan(command("larger", micro_batch_size=8, recompute=0), capsys, "1.7")
    assert code == 1 and re.search(r"fits +no, \d+\.\d GB are missing; these fit:", report)
    assert "--micro_batch_size auto --recompute auto (" in report
    assert "not known: the devices of --plan are not at hand" in report
    assert list(tmp_path.iterdir()) == []


def test_plan_for_absent_gpus_needs_neither_bitsandbytes_nor_a_launcher(command, capsys):
    code, report = plan(command("larger", bits=4), capsys, "24")
    assert code == 0 and "the LLM in 4 bits, computed in float32" in report
    full = gigabytes(plan(command("larger"), capsys, "24")[1], "LLM weights")
    assert gigabytes(report, "LLM weights") < 0.8 * full  # most of it is embeddings


def test_plan_for_eight_absent_gpus_with_zero3_has_their_steps_and_shares(command):
    zero3 = command("larger", per_device_train_batch_size=1, deepspeed=ROOT / "pipelines" / "zero3.json")
    report = run(["python", *zero3, "--plan", "8x80"]).stdout
    assert "8 samples in a step: 8 devices x batches of 1 x 1 accumulated" in report
    assert "6 optimizer steps, 3 in an epoch" in report
    share, gathered = (gigabytes(report, f"LLM weights, {part}") for part in ("this device's share", "gathered"))
    assert share == pytest.approx(gathered / 8, abs=0.001) and gathered > 0.08


@pytest.mark.parametrize(("text", "ranks", "gigabytes"), [("24", 1, 24), ("8x80", 8, 80), ("2x39.5", 2, 39.5)])
def test_absent_devices_reads_number_and_memory(text, ranks, gigabytes):
    found, device = absent_devices(text)
    assert found == ranks and gigabytes * 0.97e9 < device.free < gigabytes * 2**30


@pytest.mark.parametrize("text", ["here", "True"])
def test_absent_devices_is_none_for_this_machine(text):
    assert absent_devices(text) is None


def test_plan_refuses_a_value_that_describes_no_gpus(command, capsys):
    assert main([*command()[1:], "--plan", "big"]) == 1
    assert "--plan big: expected no value, or GPUs that are not at hand, such as 24 (GB)" in capsys.readouterr().err


def test_plan_of_a_run_on_the_fly_has_the_tower(plain_set, tiny_clip, command, capsys, inputs):
    """Its weights, its features, and its time."""
    flags = {"data_path": plain_set.json, "image_folder": plain_set.folder, "vision_tower": tiny_clip}
    code, report = plan(command(feature_cache=None, num_train_epochs=1, **flags), capsys)
    assert code == 0 and gigabytes(report, "vision tower") >= 0
    assert "16 of them its image" in report and "random weights in float32, and of the tower" in report


def test_plan_of_several_ranks_is_printed_once(command):
    done = run([*torchrun(2), *command(per_device_train_batch_size=2), "--plan"])
    assert done.stdout.count("optimizer steps") == 1
    assert "4 samples in a step: 2 devices x batches of 2 x 1 accumulated" in done.stdout
    assert "18 in an epoch" not in done.stdout and "6 in an epoch" in done.stdout


@pytest.mark.parametrize("cause", ["no free memory", "out of memory"])
def test_plan_says_why_there_is_no_time_if_two_layers_do_not_fit(command, capsys, monkeypatch, cause):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    if cause == "no free memory":
        monkeypatch.setattr(measure, "free_memory", lambda device: 1000)
    else:
        monkeypatch.setattr(measure, "sample_seconds", fail)
    code, report = plan(command(), capsys)
    assert code == 0 and "not known: two of 2 layers do not fit in the free memory of cpu" in report


def test_plan_adds_the_time_of_recomputed_layers(command, capsys, monkeypatch):
    """A layer's forward pass is half of its work: recomputing all of them makes it one and a half."""
    monkeypatch.setattr(measure, "sample_seconds", lambda *_, **__: 1.0)
    rates = []
    for recompute in (0, 1):
        _, report = plan(command(recompute=recompute), capsys)
        rates.append(float(re.search(r"([\d.]+) samples a second", report)[1]))
    assert rates == [1.0, pytest.approx(1 / 1.5, rel=0.01)]
