"""``--plan``: report what a training command would do and need, write nothing, and load no LLM."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import islice

import torch

from llava_twophase.compat import deepspeed_config, zero_stage
from llava_twophase.files import free_bytes
from llava_twophase.train.arguments import Arguments
from llava_twophase.train.data.dataset import CaptionDataset
from llava_twophase.train.environment import checkpoint_space, output_folder
from llava_twophase.train.layout import Layout
from llava_twophase.train.loop.trainer import sample_order
from llava_twophase.train.model.activation_memory import analytic_estimate, free_memory, process_memory
from llava_twophase.train.plan.llm_weights import LLMWeights, Placement
from llava_twophase.train.plan.measure import Measurement, measure
from llava_twophase.train.plan.memory import Device, Setup, Workload, alternatives, plan_memory
from llava_twophase.train.plan.projector_memory import ProjectorMemory, optimizer_bytes
from llava_twophase.train.plan.report import PlanReport
from llava_twophase.train.plan.steps import Lengths, count_steps, measure_lengths
from llava_twophase.train.preflight import TrainingInputs, prepare_inputs

# Checks that concern the devices of this machine, by a flag of each.
_OF_PRESENT_DEVICES = ("deepspeed", "bits", "use_liger_kernel")


def show_plan(arguments: Arguments) -> int:
    """Print the plan of a command.

    Args:
        arguments: The checked command line, with ``--plan``.

    Returns:
        0, or 1 if the run does not fit in the memory of its devices.

    Raises:
        UserError: Bad input, as the run itself would report it.
    """
    absent = absent_devices(str(arguments.training.plan))
    inputs = prepare_inputs(arguments, skip=() if absent is None else _OF_PRESENT_DEVICES)
    report = make_report(arguments, inputs, absent)
    print(report.text())
    return 0 if report.memory.fits else 1


def absent_devices(text: str) -> tuple[int, Device] | None:
    """Return the devices that the value of ``--plan`` describes; None for those of this machine.

    Args:
        text: ``24``: one GPU of 24 GB; ``8x80``: eight of 80 GB; another text for this machine.
    """
    match = re.fullmatch(r"(?:([1-9]\d*)x)?(\d+(?:\.\d+)?)", text)
    return None if match is None else (int(match[1] or 1), Device.absent(float(match[2])))


def make_report(arguments: Arguments, inputs: TrainingInputs, absent: tuple[int, Device] | None) -> PlanReport:
    """Plan a run.

    Args:
        arguments: The run's arguments.
        inputs: Its inputs.
        absent: Number and kind of the devices if they are not those of this machine.
    """
    training = arguments.training
    here = training.device
    ranks, device = absent or (training.world_size, Device(here.type, free_memory(here)))
    steps = count_steps(training, len(inputs.records), ranks)
    lengths = measure_lengths(inputs.records, inputs.template, inputs.rows)
    setup = make_setup(arguments, ranks)
    process = process_memory() if device.type == "cpu" else 0
    workload = make_workload(arguments, inputs, ranks)
    memory = plan_memory(workload, setup, device)
    if absent is None:
        measurement = measure(arguments, inputs, workload=workload, memory=memory, length=_typical(lengths))
        workload = measurement.refine(workload)
        memory = plan_memory(workload, setup, device)
    else:
        measurement = Measurement(None, None, "the devices of --plan are not at hand")
    kept, size = checkpoint_space(arguments, workload.projector.weights)
    return PlanReport(
        records=len(inputs.records),
        held_out=len(inputs.eval_records),
        lengths=lengths,
        steps=steps,
        dtype=_dtype(arguments),
        device="a GPU that is not at hand" if absent else str(here),
        process=process,
        memory=memory,
        checkpoint_bytes=size,
        checkpoints=kept,
        disk_free=free_bytes(output_folder(arguments)),
        sample_seconds=measurement.sample_seconds,
        time_note=measurement.note,
        alternatives=() if memory.fits else tuple(alternatives(workload, setup, device)),
    )


def make_setup(arguments: Arguments, ranks: int) -> Setup:
    """Return how the run is trained on so many devices."""
    training, stage = arguments.training, zero_stage(arguments.training)
    zero = (deepspeed_config(training) or {}).get("zero_optimization", {})
    samples, checkpoint_every = arguments.micro_batching
    placement = Placement(
        element_size=arguments.dtype.itemsize,
        bits=training.bits,
        double_quant=training.double_quant,
        shares=ranks if stage == 3 else 0,
        offloaded=zero.get("offload_param", {}).get("device", "none") != "none",
        most_gathered=int(float(zero.get("stage3_max_live_parameters", 1e9))),
    )
    return Setup(
        placement=placement,
        ranks=ranks,
        batch=training.per_device_train_batch_size,
        accumulation=training.gradient_accumulation_steps,
        zero_stage=stage,
        optimizer=optimizer_bytes(arguments),
        samples=samples,
        checkpoint_every=checkpoint_every,
    )


def make_workload(arguments: Arguments, inputs: TrainingInputs, ranks: int) -> Workload:
    """Return what is trained."""
    config, shape = inputs.config.get_text_config(), (inputs.spec.patches, inputs.spec.tower_width)
    projector = ProjectorMemory.measure(inputs.projector, shape, arguments.dtype)
    return Workload(
        weights=LLMWeights.of(config),
        activations=analytic_estimate(config, projector.tokens, arguments.dtype.itemsize),
        projector=projector,
        feature_bytes=_feature_bytes(arguments, inputs),
        tower_bytes=inputs.source.tower_bytes,
        lengths=(_longest_of_first_batch(arguments, inputs, ranks), inputs.rows.longest),
    )


def _feature_bytes(arguments: Arguments, inputs: TrainingInputs) -> int:
    sample = inputs.source.sample(inputs.records[0].image)
    if "features" in sample:
        return sample["features"].nbytes
    size: int = max(dtype.itemsize for dtype in arguments.tower_dtypes)
    return sample["crops"].nbytes + inputs.spec.patches * inputs.spec.tower_width * size


def _longest_of_first_batch(arguments: Arguments, inputs: TrainingInputs, ranks: int) -> int:
    records, template = inputs.records, inputs.template
    dataset = CaptionDataset(records, template, inputs.source)
    layout = replace(Layout.of(arguments.training), world_size=ranks)
    order = sample_order(arguments.training, len(records), dataset.lengths, layout)
    first = islice(order, ranks * arguments.training.per_device_train_batch_size)
    return max(min(template.count_ids(records[sample].caption), template.max_ids) for sample in first)


def _typical(lengths: Lengths) -> int:
    # Ids of a sample with the mean number of positions.
    return round(lengths.mean) - lengths.image_tokens + 1


def _dtype(arguments: Arguments) -> str:
    training = arguments.training
    name = {torch.bfloat16: "bfloat16", torch.float16: "float16"}.get(arguments.dtype, "float32")
    stored = name if training.bits == 16 else f"{training.bits} bits, computed in {name}"
    return f"{stored}, partitioned by ZeRO-3" if zero_stage(training) == 3 else stored
