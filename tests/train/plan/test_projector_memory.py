"""Memory of a projector: counted from the module, and optimizer states from a step."""

import pytest
import torch

from llava_twophase.train.command_line import parse_arguments
from llava_twophase.train.model.projector import build_projector
from llava_twophase.train.plan.projector_memory import ProjectorMemory, optimizer_bytes, state_bytes
from train.recipe import recipe


def test_measure_counts_weights_and_what_autograd_keeps_of_a_sample():
    projector = build_projector("mlp2x_gelu", 32, 64)
    memory = ProjectorMemory.measure(projector, (16, 32), torch.float32)
    assert memory.weights == 32 * 64 + 64 + 64 * 64 + 64
    assert (memory.tokens, memory.width) == (16, 64)
    # The input, and the input and the output of GELU.
    assert memory.kept == 16 * (32 + 64 + 64) * 4 and memory.constant == 0
    assert memory.projected_bytes(3, 2) == 3 * 16 * 64 * 2


def test_measure_counts_weights_in_the_compute_dtype_once():
    memory = ProjectorMemory.measure(build_projector("mlp2x_gelu", 32, 64), (16, 32), torch.bfloat16)
    assert memory.constant == 2 * 64 * 64  # the first layer's gradient needs its input alone
    assert memory.kept == 16 * (32 + 64 + 64) * 2


@pytest.mark.parametrize(("optim", "expected"), [("adamw_torch", 8), ("sgd", 0)])
def test_optimizer_bytes_are_those_of_a_step(tmp_path, optim, expected):
    assert optimizer_bytes(parse_arguments(recipe(tmp_path / "out", "--optim", optim))) == expected


@pytest.mark.parametrize(
    ("ranks", "stage", "total"), [(1, None, 16), (8, None, 20), (1, 2, 20), (8, 2, 2 + 2.5 + 1.5), (8, 3, 6 - 1.75)]
)
def test_state_bytes_of_adam(ranks, stage, total):
    assert state_bytes(element_size=2, optimizer=8, ranks=ranks, zero_stage=stage).total == pytest.approx(total)
