"""Figures beside the loss."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from llava_twophase.train.loop.metrics import RATES, Meter, StepFlops


def test_step_flops_counts_forward_and_backward_of_frozen_weights(tiny_llama):
    llm = AutoModelForCausalLM.from_pretrained(tiny_llama)
    flops = StepFlops.of(llm)
    body = sum(p.numel() for p in llm.model.layers.parameters() if p.ndim == 2)
    assert (flops.body, flops.head) == (body, llm.lm_head.weight.numel())
    assert flops.attention == 2 * 64
    assert flops.count(3, 10, 4) == 3 * (4 * (body * 10 + flops.head * 4) + 6 * 128 * 100)


def test_meter_reports_rates_of_all_ranks():
    meter = Meter(steps=2, samples=8, tokens=80, flops=2e12)
    report = meter.report(2, torch.device("cpu"), steps_left=3)
    assert set(report) == set(RATES)
    # Three more steps take as long as 1.5 times these two; both figures are rounded.
    assert report["eta_seconds"] == pytest.approx(1.5 * 16 / report["samples_per_second"], rel=0.01, abs=0.1)
    assert report["memory_gb"] > 0.01
