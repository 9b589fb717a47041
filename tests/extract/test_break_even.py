"""When a cache pays: the arithmetic, a measured step, and what `--plan --llm` says of it."""

import json

import pytest
import torch

import drawn
from llava_twophase.errors import UserError
from llava_twophase.extract.break_even import SIZES, llm_config, measure_step, weigh


def weighed(**changes):
    """558,128 records, as many images, an LLM that takes nine times what the tower takes."""
    known = {"samples": 558_128, "to_encode": 558_128, "step_seconds": 0.09, "rates": (100.0, 1000.0)}
    return weigh("13B", **{"runs": 4, "row_bytes": 1_179_648, **known, **changes})


def test_every_run_but_the_first_saves_the_extraction():
    pays = weighed()
    assert pays.extraction_seconds == pytest.approx(5581.28)
    assert pays.run_seconds_on_the_fly - pays.run_seconds == pytest.approx(pays.extraction_seconds)
    assert pays.seconds_on_the_fly - pays.seconds == pytest.approx(3 * pays.extraction_seconds)
    assert pays.saved == pytest.approx(0.1 * 3 / 4)
    assert pays.pays_from == 2
    assert pays.read_mb_per_second == pytest.approx(1.179648 / 0.09)
    assert "pays from run 2 on;" in pays.text() and "7.5 % saved" in pays.text()


def test_one_run_never_pays():
    pays = weighed(runs=1)
    assert pays.saved == pytest.approx(0) and "does not pay within 1 run;" in pays.text()


def test_where_it_hardly_pays_is_said():
    assert "from run 2 on, but hardly" in weighed(step_seconds=1.0).text()


@pytest.mark.parametrize(("to_encode", "first"), [(0, 1), (100, 1), (558_128, 2), (3 * 558_128, 4)])
def test_what_is_cached_is_paid(to_encode, first):
    pays = weighed(to_encode=to_encode)
    assert pays.pays_from == first
    for runs, faster in ((first, True), (first - 1, False)):
        if runs:
            again = weighed(to_encode=to_encode, runs=runs)
            assert (again.seconds < again.seconds_on_the_fly - 1e-6) is faster


@pytest.mark.parametrize(
    ("decode", "extraction", "gain", "first"),
    [
        (0.01, 0.01, 0.01, 2),  # as fast as the tower
        (0.045, 0.045, 0.01, 5),  # hidden behind the step on the fly, not in an extraction
        (0.095, 0.095, 0.01, 10),  # nearly as slow as tower and step together
        (0.19, 0.19, 0.10, 2),  # every run on the fly waits for it
    ],
)
def test_decoding_is_hidden_on_the_fly_before_it_is_in_an_extraction(decode, extraction, gain, first):
    pays = weighed(rates=(100.0, 1 / decode))
    assert pays.extraction_seconds == pytest.approx(558_128 * extraction)
    assert pays.run_seconds_on_the_fly - pays.run_seconds == pytest.approx(558_128 * gain)
    assert pays.pays_from == first
    once_more = weighed(rates=(100.0, 1 / decode), runs=first + 1)
    assert once_more.seconds < once_more.seconds_on_the_fly


def test_a_step_takes_time_for_every_layer(tiny_llama, monkeypatch):
    monkeypatch.setattr("llava_twophase.extract.break_even._SECONDS", 0.1)
    few, many = llm_config("135M"), llm_config("135M")
    few.num_hidden_layers, many.num_hidden_layers = 1, 1000
    cpu = torch.device("cpu")
    assert 0 < measure_step(few, 16, cpu) < measure_step(many, 16, cpu)
    assert measure_step(llm_config(str(tiny_llama)), 16, cpu) > 0


def test_sizes_are_what_they_are_called():
    for name, (hidden, inner, layers, heads, kv_heads) in SIZES.items():
        attention = 2 * hidden * hidden * (1 + kv_heads / heads)
        billions = layers * (attention + 3 * hidden * inner) / 1e9
        stated = float(name[:-1]) * (1e-3 if name.endswith("M") else 1)
        assert 0.65 * stated < billions < 1.05 * stated, name  # without embeddings


def test_an_llm_that_is_none_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--llm .*nowhere: expected one of 135M, 0.5B"):
        llm_config(str(tmp_path / "nowhere"))


def test_an_llm_is_no_tower(tiny_clip):
    with pytest.raises(UserError, match="is a clip_vision_model; expected one of 135M"):
        llm_config(str(tiny_clip))


def test_sizes_are_known_in_either_case():
    assert llm_config("7b").hidden_size == llm_config("7B").hidden_size == 4096


def test_nothing_usable_is_said(server, command, image_set, tmp_path):
    records = drawn.write_records([drawn.make_record("x", "gone.jpg", "x")], tmp_path / "records.json")
    log = server.run([*command(data_path=records, on_bad_image="skip"), "--plan", "--llm", "135M"])
    assert "none of the first 3 images can be used, so nothing was measured" in log and "a run " not in log


def test_the_plan_says_when_the_cache_pays(server, command, tiny_llama):
    log = server.run([*command(), "--plan", "--llm", "135M", "--runs", "5"])
    assert "with 135M on this device alone" in log and "5 runs" in log and "from run" in log
    server.run(command())
    log = server.run([*command(), "--plan", "--json", "--llm", str(tiny_llama)])
    pays = json.loads(log[log.index("{\n") :])["pays"]
    assert pays["runs"] == 3 and pays["extraction_seconds"] == 0 and pays["pays_from"] == 1
    assert pays["samples"] == 30 and pays["step_seconds"] > 0 and pays["seconds"] < pays["seconds_on_the_fly"]
