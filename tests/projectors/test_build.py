"""Projectors are built by name, checked on random features, and measured without weights."""

import copy
import itertools

import pytest
import torch

from llava_twophase.errors import UserError
from llava_twophase.projectors.build import (
    ProjectorSpec,
    build_projector,
    check_projector,
    measure_projector,
    projector_record,
    recorded_spec,
)
from llava_twophase.projectors.names import SHIPPED

PATCHES, TOWER, LLM = 16, 8, 12
NUMBERS = itertools.count()
SMALL = {"c_abstractor": {"hidden": 8}, "perceiver": {"queries": 5, "depth": 2, "heads": 2, "head_width": 4}}
TOKENS = {"avgpool_mlp": 4, "pixel_shuffle": 4, "ldpv2": 4, "c_abstractor": 4, "perceiver": 5}


def spec(kind, patches=PATCHES, **kwargs):
    return ProjectorSpec(kind, patches, TOWER, LLM, {**SMALL.get(kind, {}), **kwargs})


def build(kind, seed=0, patches=PATCHES, **kwargs):
    torch.manual_seed(seed)
    return build_projector(kind, TOWER, LLM, patches, spec(kind, **kwargs).kwargs)


@pytest.mark.parametrize("kind", SHIPPED)
def test_shipped_projectors_have_the_shape_that_their_check_returns(kind):
    projector = build(kind)
    assert projector(torch.randn(3, PATCHES, TOWER)).shape == (3, TOKENS[kind], LLM)
    assert check_projector(projector, spec(kind)) == TOKENS[kind]


@pytest.mark.parametrize("kind", SHIPPED)
def test_gradients_of_shipped_projectors_reach_all_parameters_and_all_patches(kind):
    projector = build(kind)
    features = torch.randn(2, PATCHES, TOWER, requires_grad=True)
    projector(features).square().sum().backward()
    assert [name for name, weight in projector.named_parameters() if not weight.grad.abs().sum()] == []
    assert (features.grad.abs().sum(dim=2) > 0).all()


@pytest.mark.parametrize("kind", SHIPPED)
def test_initial_weights_of_shipped_projectors_depend_on_the_seed_alone(kind):
    one, same, other = build(kind, seed=1), build(kind, seed=1), build(kind, seed=2)
    features = torch.randn(1, PATCHES, TOWER)
    assert torch.equal(one(features), same(features))
    assert not torch.equal(one(features), other(features))


@pytest.mark.parametrize("kind", SHIPPED)
def test_shipped_projectors_treat_each_image_alone_and_run_in_bfloat16(kind):
    projector, features = build(kind), torch.randn(3, PATCHES, TOWER)
    torch.testing.assert_close(projector(features)[1:2], projector(features[1:2]))
    assert projector.bfloat16()(features.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert projector.float()(features).shape == (3, TOKENS[kind], LLM)


@pytest.mark.parametrize("kind", [kind for kind in SHIPPED if kind != "perceiver"])
def test_types_with_a_grid_refuse_a_cls_token(kind):
    with pytest.raises(UserError, match=rf"{kind} needs a square grid .* use --mm_vision_select_feature patch"):
        build(kind, patches=17)


def test_perceiver_takes_a_cls_token_unless_it_has_positions():
    assert build("perceiver", patches=17)(torch.randn(1, 17, TOWER)).shape == (1, 5, LLM)
    with pytest.raises(UserError, match="perceiver with positions needs a square grid"):
        build("perceiver", patches=17, positions=True)


def test_measure_projector_counts_without_weights():
    size = measure_projector(ProjectorSpec("mlp2x_gelu", 576, 1024, 4096))
    assert (size.tokens, size.parameters) == (576, 1024 * 4096 + 4096 + 4096 * 4096 + 4096)
    assert size.flops == 2 * 576 * (1024 * 4096 + 4096 * 4096)
    for kind in SHIPPED:
        size = measure_projector(spec(kind))
        assert size.tokens == TOKENS[kind] and size.flops > 0
        assert size.parameters == sum(weight.numel() for weight in build(kind).parameters())


def test_measure_projector_takes_a_class_that_reads_values(user_module):
    kind = user_module("self.scale = float(torch.ones(1)); self.layer = nn.Linear(tower, llm)", "self.layer(x)")
    assert measure_projector(spec(kind)).tokens == PATCHES


def test_projector_record_and_recorded_spec_are_inverse():
    record = projector_record(build("perceiver"), spec("perceiver"), 5)
    assert list(record["mm_projector_source"]) == ["llava_twophase.projectors.perceiver"]
    assert recorded_spec({"mm_projector_type": "perceiver", **record}) == spec("perceiver")
    assert projector_record(build("linear"), spec("linear"), PATCHES) == {}
    assert recorded_spec({"mm_projector_type": "linear"}) is None


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Write a module with a projector class in the current folder; return its type."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write(init, forward):
        name = f"user_projector_{next(NUMBERS)}"  # Python imports a name once
        lines = ["import torch", "from torch import nn", "class Mine(nn.Module):"]
        lines += ["    def __init__(self, tower, llm, grid):", f"        super().__init__(); {init}"]
        lines += ["    def forward(self, x):", f"        return {forward}"]
        (tmp_path / f"{name}.py").write_text("\n".join(lines), encoding="utf-8")
        return f"{name}:Mine"

    return write


LAYER = "self.layer = nn.Linear(tower, llm)"
FAULTS = {
    "wrong width": (LAYER, "self.layer(x)[..., 1:]", r"returned \[2, 16, 11\] .* expected a tensor \[2, tokens, 12\]"),
    "wrong rank": (LAYER, "self.layer(x).mean(1)", r"returned \[2, 12\] "),
    "wrong batch": (LAYER, "self.layer(x)[:1]", r"returned \[1, 16, 12\]"),
    "no tokens": (LAYER, "self.layer(x)[:, :0]", r"returned \[2, 0, 12\]"),
    "no tensor": (LAYER, "(self.layer(x),)", "returned <class 'tuple'>"),
    "integers": (LAYER, "self.layer(x).long()", "returned torch.int64; expected a floating-point"),
    "tokens depend on the batch": (LAYER, "self.layer(x[:, : len(x)])", "2 tokens for some features and 1 for others"),
    "tokens depend on values": (
        LAYER,
        "self.layer(x)[:, : 3 if x.min() > 0 else 5]",
        "5 tokens for some features and 3 for others",
    ),
    "not finite": (LAYER, "self.layer(x) / 0", "values that are not finite"),
    "fails": (LAYER, "self.layer(x[..., 1:])", r"failed on features of shape \[2, 16, 8\]: RuntimeError: mat1 .*\.py:"),
    "cannot be built": (
        "self.layer = nn.Linear(tower, 1 / 0)",
        "x",
        r"cannot be built: ZeroDivisionError: .*user_.*:5",
    ),
    "unused weight": (
        f"{LAYER}; self.spare = nn.Linear(2, 2)",
        "self.layer(x)",
        "spare.weight, spare.bias gets no grad",
    ),
    "detached": (LAYER, "self.layer(x).detach()", "layer.weight, layer.bias gets no gradient"),
    "shared weight": (f"{LAYER}; self.again = self.layer", "self.layer(x)", "again.bias, again.weight is the same"),
    "no weights": ("pass", "x.repeat(1, 1, 2)[..., :12]", "has no trainable weights"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_projector_refuses(fault, user_module):
    init, forward, message = FAULTS[fault]
    kind = user_module(init, forward)
    with pytest.raises(UserError, match=message) as caught:
        check_projector(build(kind), spec(kind))
    assert f"--mm_projector_type {kind}" in str(caught.value)


def test_check_projector_changes_neither_weights_nor_buffers_nor_the_generator(user_module):
    init = f"{LAYER}; self.norm = nn.BatchNorm1d(llm); self.drop = nn.Dropout(0.5)"
    kind = user_module(init, "self.drop(self.norm(self.layer(x).transpose(1, 2)).transpose(1, 2))")
    projector = build(kind)
    before, state = copy.deepcopy(projector.state_dict()), torch.get_rng_state()
    assert check_projector(projector, spec(kind)) == PATCHES
    assert all(torch.equal(before[name], tensor) for name, tensor in projector.state_dict().items())
    assert all(weight.grad is None for weight in projector.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_check_projector_accepts_a_frozen_part(user_module):
    kind = user_module(f"{LAYER}; self.table = nn.Parameter(torch.ones(llm), False)", "self.layer(x) * self.table")
    assert check_projector(build(kind), spec(kind)) == PATCHES


def test_llava_types_take_no_arguments():
    with pytest.raises(UserError, match="LLaVA's mlp2x_gelu takes no arguments; remove the flag"):
        build("mlp2x_gelu", tokens=4)
