"""The time of a complete LLM from one and two layers."""

import pytest
import torch

from llava_twophase.train.loop.metrics import StepFlops
from llava_twophase.train.model.activation_memory import analytic_estimate
from llava_twophase.train.model.projector import build_projector
from llava_twophase.train.plan import calibrate
from llava_twophase.train.plan.calibrate import Probe, least_seconds, measurable_samples, sample_seconds
from train.model.llms import build_family, build_llm

CPU = torch.device("cpu")


def probe_of(llm, **changes):
    values = {
        "config": llm.config, "dtype": torch.float32, "attention": None, "device": CPU, "shape": (6, 8),
        "image_position": 1, "length": 12,
    }  # fmt: skip
    return Probe(**{**values, **changes})


def test_probe_measures_the_activations_of_a_layer():
    llm = build_llm()
    estimate = analytic_estimate(llm.config, image_tokens=6, element_size=4)
    probe = probe_of(llm)
    measured = probe.activations(probe.llm(2), estimate)
    assert measured.layers == 4 and measured.layer == pytest.approx(estimate.layer, rel=0.25)


@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text", "gpt2", "opt"])
def test_sample_seconds_measures_llms_of_other_families(kind, monkeypatch):
    monkeypatch.setattr(calibrate, "_MEASURED_SECONDS", 0)
    llm = build_family(kind)
    memory = analytic_estimate(llm.config, image_tokens=6, element_size=4)
    projector = build_projector("linear", 8, 64)
    seconds = sample_seconds(probe_of(llm), projector, StepFlops.of(llm), memory, most=2)
    assert 0 < seconds < 10
    assert next(projector.parameters()).grad is None


def test_sample_seconds_adds_a_layer_for_each_layer(monkeypatch):
    """1 s and 3 s for two samples against one and two layers: five layers take 1 + 4 x 2 s."""
    monkeypatch.setattr(Probe, "seconds", lambda self, llm, *_: 2.0 * llm.config.num_hidden_layers - 1)
    llm = build_llm(num_hidden_layers=5)
    memory = analytic_estimate(llm.config, image_tokens=6, element_size=4)
    projector = build_projector("linear", 8, 64)
    assert sample_seconds(probe_of(llm), projector, StepFlops.of(llm), memory, most=2) == pytest.approx(4.5)


def test_sample_seconds_adds_the_part_of_a_large_vocabulary_that_is_not_measured(monkeypatch):
    monkeypatch.setattr(Probe, "seconds", lambda self, llm, *_: float(llm.config.num_hidden_layers))
    found = []
    for vocabulary in (128, 128 * 1024):
        llm = build_llm(vocab_size=vocabulary)
        memory = analytic_estimate(llm.config, image_tokens=6, element_size=4)
        flops = StepFlops.of(llm)
        found.append(sample_seconds(probe_of(llm), build_projector("linear", 8, 64), flops, memory, most=1))
    assert found[0] == pytest.approx(4) and found[1] > 2 * found[0]


def test_measurable_samples_limits_the_work_of_a_cpu():
    flops = StepFlops(body=10**10, head=0, attention=0)
    assert measurable_samples(flops, layers=40, positions=600, most=8, device=CPU) == 1
    assert measurable_samples(flops, layers=40, positions=6, most=64, device=CPU) == 33
    assert measurable_samples(flops, layers=40, positions=600, most=8, device=torch.device("meta")) == 8


def test_least_seconds_runs_at_least_twice(monkeypatch):
    monkeypatch.setattr(calibrate, "_MEASURED_SECONDS", 0)
    calls = []
    assert least_seconds(lambda: calls.append(1), CPU) >= 0 and len(calls) == 2
