"""Memory by part, the trainer's micro-batches in it, and what to type if it does not fit."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from helpers import ROOT, run
from llava_twophase.train.model.activation_memory import analytic_estimate
from llava_twophase.train.model.micro_batches import choose_micro_batching, free_for_activations, saturating_samples
from llava_twophase.train.model.projector import build_projector
from llava_twophase.train.plan.llm_weights import LLMWeights, Placement
from llava_twophase.train.plan.memory import Device, Setup, Workload, alternatives, plan_memory
from llava_twophase.train.plan.projector_memory import ProjectorMemory

SHAPE = (576, 64)


@pytest.fixture(scope="module")
def workload():
    """An LLM of 3.2 GB in bfloat16."""
    config = LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=28, num_attention_heads=16)
    projector = ProjectorMemory.measure(build_projector("mlp2x_gelu", SHAPE[1], 2048), SHAPE, torch.bfloat16)
    return Workload(
        weights=LLMWeights.of(config),
        activations=analytic_estimate(config, projector.tokens, 2),
        projector=projector,
        feature_bytes=SHAPE[0] * SHAPE[1] * 2,
        tower_bytes=0,
        lengths=(40, 200),
    )


def test_plan_uses_the_choice_of_the_trainer(workload):
    device, setup = Device("cuda", 16 * 10**9), Setup(Placement(2))
    plan = plan_memory(workload, setup, device)
    projected = 32 * 576 * 2048 * 2
    loaded = plan.peak - plan.parts["micro-batch: activations and logits"] - projected
    states = workload.projector.weights * (4 + 8)  # gradients and optimizer, which come later
    expected = choose_micro_batching(
        memory=workload.activations,
        lengths=workload.lengths,
        batch=32,
        free=free_for_activations(device.free - loaded + states, projected),
        saturating=saturating_samples(576, 2048, "cuda"),
    )
    assert plan.micro_batching == expected and plan.fits and 1 < plan.samples < 32
    assert plan.parts["micro-batch: activations and logits"] == expected.peak(200)
    needed = workload.activations.needed(plan.samples, 40, expected.checkpoint_every)
    assert plan.typical == (needed, plan.samples * 40 * workload.activations.head)


def test_plan_of_less_memory_has_smaller_micro_batches_then_recomputes_then_does_not_fit(workload):
    devices = [Device("cuda", int(gigabytes * 1e9)) for gigabytes in (60, 12, 6, 4.5, 3)]
    plans = [plan_memory(workload, Setup(Placement(2)), device) for device in devices]
    assert [plan.fits for plan in plans] == [True, True, True, True, False]
    assert plans[0].samples > plans[1].samples >= plans[2].samples
    assert plans[0].micro_batching.checkpoint_every == 0 and plans[3].micro_batching.checkpoint_every > 0


def test_plan_keeps_the_micro_batches_that_the_user_gave(workload):
    plan = plan_memory(workload, Setup(Placement(2), samples=3, checkpoint_every=2), Device("cuda", 10**9))
    assert (plan.samples, plan.micro_batching.checkpoint_every, plan.fits) == (3, 2, False)


def test_alternatives_fit_and_say_what_to_type(workload):
    setup = Setup(Placement(2), batch=32, samples=32, checkpoint_every=0)
    device = Device("cuda", int(4.5e9))
    assert not plan_memory(workload, setup, device).fits
    found = dict(alternatives(workload, setup, device))
    assert all(plan.fits for plan in found.values())
    for text in ("--micro_batch_size auto --recompute auto", "--bits 4", "--bits 8"):
        assert text in found
    assert "--per_device_train_batch_size 16 --gradient_accumulation_steps 2" in found
    assert "--deepspeed pipelines/zero3.json on 8 devices" in found


def test_alternatives_of_an_llm_that_is_too_large_for_one_device_partition_or_quantise_it(workload):
    device = Device("cuda", int(2.9e9))
    setup = Setup(Placement(2), batch=1)
    assert not plan_memory(workload, setup, device).fits
    found = [text for text, _ in alternatives(workload, setup, device)]
    assert "--bits 4" in found and not any("micro_batch_size" in text for text in found)


def test_alternatives_on_a_cpu_need_no_gpu(workload):
    setup = Setup(Placement(4), batch=1)
    device = Device("cpu", int(5.5e9))
    assert not plan_memory(workload, setup, device).fits
    assert [text for text, _ in alternatives(workload, setup, device)] == ["--bf16 True"]


def test_alternatives_of_several_devices_are_listed_once(workload):
    found = [text for text, _ in alternatives(workload, Setup(Placement(2), batch=1, ranks=8), Device("cuda", 10**10))]
    assert [text for text in found if "zero3.json" in text] == ["--deepspeed pipelines/zero3.json on 8 devices"]


def test_zero3_does_not_offer_bits(workload):
    setup = Setup(Placement(2, shares=2), ranks=2, zero_stage=3)
    found = [text for text, _ in alternatives(workload, setup, Device("cuda", 10**10))]
    assert found and not any("--bits" in text for text in found)


def test_tower_and_accumulated_batches_count(workload):
    device = Device("cuda", 10**11)
    plain = plan_memory(workload, Setup(Placement(2)), device)
    tower = plan_memory(replace(workload, tower_bytes=10**9), Setup(Placement(2)), device)
    accumulated = plan_memory(workload, Setup(Placement(2), accumulation=3), device)
    assert tower.peak - plain.peak == 10**9
    assert accumulated.peak - plain.peak == 2 * 32 * workload.feature_bytes


def test_table_of_the_memory_page_is_what_its_command_prints():
    printed = run(["python", "tests/benchmarks/memory_table.py", "--markdown"]).stdout.splitlines()
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    rows = [line for line in printed if line.startswith("|")]
    assert len(rows) == 14 and "\n".join(rows) in page
