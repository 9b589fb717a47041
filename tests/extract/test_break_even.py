"""Break-even of a cache: the arithmetic, a measured step, and the output of `--plan --llm`."""

import json

import pytest
import torch

import drawn
from llava_twophase.errors import UserError
from llava_twophase.extract.break_even import SIZES, compute_break_even, llm_config, measure_step
from llava_twophase.extract.calibrate import Rates


def computed(**changes):
    """558,128 records, as many images, an LLM that takes nine times what the tower takes."""
    known = {"samples": 558_128, "to_encode": 558_128, "step_seconds": 0.09, "rates": Rates(100.0, 1000.0)}
    return compute_break_even("13B", **{"runs": 4, "row_bytes": 1_179_648, **known, **changes})


def test_every_run_except_the_first_saves_the_extraction():
    break_even = computed()
    assert break_even.extraction_seconds == pytest.approx(5581.28)
    assert break_even.run_seconds_on_the_fly - break_even.run_seconds == pytest.approx(break_even.extraction_seconds)
    assert break_even.seconds_on_the_fly - break_even.seconds == pytest.approx(3 * break_even.extraction_seconds)
    assert break_even.saved == pytest.approx(0.1 * 3 / 4)
    assert break_even.first_faster_run == 2
    assert break_even.read_mb_per_second == pytest.approx(1.179648 / 0.09)
    assert "breaks even at run 2;" in break_even.text() and "7.5 % saved" in break_even.text()


def test_one_run_does_not_break_even():
    break_even = computed(runs=1)
    assert break_even.saved == pytest.approx(0) and "does not break even within 1 run;" in break_even.text()


def test_text_reports_small_savings():
    assert "breaks even at run 2 but saves less than 5%" in computed(step_seconds=1.0).text()


@pytest.mark.parametrize(("to_encode", "first"), [(0, 1), (100, 1), (558_128, 2), (3 * 558_128, 4)])
def test_cached_images_need_no_extraction(to_encode, first):
    break_even = computed(to_encode=to_encode)
    assert break_even.first_faster_run == first
    for runs, faster in ((first, True), (first - 1, False)):
        if runs:
            again = computed(to_encode=to_encode, runs=runs)
            assert (again.seconds < again.seconds_on_the_fly - 1e-6) is faster


@pytest.mark.parametrize(
    ("decode", "extraction", "gain", "first"),
    [
        (0.01, 0.01, 0.01, 2),  # as fast as the tower
        (0.045, 0.045, 0.01, 5),  # overlaps with the step on the fly, not in an extraction
        (0.095, 0.095, 0.01, 10),  # nearly as slow as tower and step together
        (0.19, 0.19, 0.10, 2),  # every run on the fly waits for it
    ],
)
def test_decoding_overlaps_with_tower_and_step(decode, extraction, gain, first):
    break_even = computed(rates=Rates(100.0, 1 / decode))
    assert break_even.extraction_seconds == pytest.approx(558_128 * extraction)
    assert break_even.run_seconds_on_the_fly - break_even.run_seconds == pytest.approx(558_128 * gain)
    assert break_even.first_faster_run == first
    once_more = computed(rates=Rates(100.0, 1 / decode), runs=first + 1)
    assert once_more.seconds < once_more.seconds_on_the_fly


def test_measure_step_grows_with_the_number_of_layers(tiny_llama, monkeypatch):
    monkeypatch.setattr("llava_twophase.extract.break_even._MEASURED_SECONDS", 0.1)
    few, many = llm_config("135M"), llm_config("135M")
    few.num_hidden_layers, many.num_hidden_layers = 1, 1000
    cpu = torch.device("cpu")
    assert 0 < measure_step(few, 16, cpu) < measure_step(many, 16, cpu)
    assert measure_step(llm_config(str(tiny_llama)), 16, cpu) > 0


def test_sizes_match_their_names():
    for name, (hidden, inner, layers, heads, kv_heads) in SIZES.items():
        attention = 2 * hidden * hidden * (1 + kv_heads / heads)
        billions = layers * (attention + 3 * hidden * inner) / 1e9
        stated = float(name[:-1]) * (1e-3 if name.endswith("M") else 1)
        assert 0.65 * stated < billions < 1.05 * stated, name  # without embeddings


def test_llm_config_refuses_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match=r"--llm .*nowhere: expected one of 135M, 0.5B"):
        llm_config(str(tmp_path / "nowhere"))


def test_llm_config_refuses_a_tower(tiny_clip):
    with pytest.raises(UserError, match="is a clip_vision_model; expected one of 135M"):
        llm_config(str(tiny_clip))


def test_llm_config_ignores_the_case_of_sizes():
    assert llm_config("7b").hidden_size == llm_config("7B").hidden_size == 4096


def test_plan_without_usable_images_measures_nothing(server, command, image_set, tmp_path):
    records = drawn.write_records([drawn.make_record("x", "gone.jpg", "x")], tmp_path / "records.json")
    log = server.run([*command(data_path=records, on_bad_image="skip"), "--plan", "--llm", "135M"])
    assert "none of the first 3 images can be used, so nothing was measured" in log and "a run " not in log


def test_plan_prints_the_break_even(server, command, tiny_llama):
    log = server.run([*command(), "--plan", "--llm", "135M", "--runs", "5"])
    assert "with 135M on this device alone" in log and "5 runs" in log and "the cache   " in log
    server.run(command())
    log = server.run([*command(), "--plan", "--json", "--llm", str(tiny_llama)])
    break_even = json.loads(log[log.index("{\n") :])["break_even"]
    assert break_even["runs"] == 3 and break_even["extraction_seconds"] == 0 and break_even["first_faster_run"] == 1
    assert (
        break_even["samples"] == 30
        and break_even["step_seconds"] > 0
        and break_even["seconds"] < break_even["seconds_on_the_fly"]
    )
