"""build_projector, save_projector and load_weights."""

import pytest
import torch

from llava_twophase.errors import UserError
from llava_twophase.train.model.projector import build_projector, load_weights, save_projector

# The names that LLaVA v1.2.2 writes for each type, read from its own files.
NAMES = {
    "linear": ["weight", "bias"],
    "mlp1x_gelu": ["0.weight", "0.bias"],
    "mlp2x_gelu": ["0.weight", "0.bias", "2.weight", "2.bias"],
    "mlp3x_gelu": ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"],
}


def build(kind):
    # LLaVA builds mlp1x_gelu as a Sequential, linear as a bare layer.
    return build_projector(kind, 8, 12)


@pytest.mark.parametrize("kind", NAMES)
def test_save_projector_writes_llavas_names_and_load_projector_reads_them(kind, tmp_path):
    torch.manual_seed(1)
    projector = build(kind)
    path = save_projector(projector, tmp_path)
    state = torch.load(path, weights_only=True)
    assert type(state) is dict
    assert list(state) == [f"model.mm_projector.{name}" for name in NAMES[kind]]
    assert not any(tensor.requires_grad for tensor in state.values())
    other = build(kind)
    load_weights(path, other)
    features = torch.randn(2, 4, 8)
    assert torch.equal(other(features), projector(features))
    assert [p.name for p in tmp_path.iterdir()] == ["mm_projector.bin"]


def test_save_projector_keeps_the_dtype(tmp_path):
    path = save_projector(build("linear").bfloat16(), tmp_path)
    assert {tensor.dtype for tensor in torch.load(path, weights_only=True).values()} == {torch.bfloat16}


def test_build_projector_uses_the_exact_gelu():
    projector = build("mlp2x_gelu")
    features = torch.randn(3, 8)
    hidden = torch.nn.functional.linear(features, projector[0].weight, projector[0].bias)
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    expected = torch.nn.functional.linear(hidden, projector[2].weight, projector[2].bias)
    torch.testing.assert_close(projector(features), expected)


@pytest.mark.parametrize("kind", ["identity", "mlp0x_gelu", "mlp2x_relu", "mlp2x_gelu2", ""])
def test_build_projector_refuses_unknown_types(kind):
    with pytest.raises(UserError, match="--mm_projector_type"):
        build(kind)


def test_load_weights_refuses_a_file_of_another_type(tmp_path):
    path = save_projector(build("linear"), tmp_path)
    with pytest.raises(UserError, match="holds another projector"):
        load_weights(path, build("mlp2x_gelu"))


def test_load_weights_refuses_a_wrong_prefix(tmp_path):
    torch.save(build("linear").state_dict(), tmp_path / "bare.bin")
    with pytest.raises(UserError, match="has no mm_projector weights"):
        load_weights(tmp_path / "bare.bin", build("linear"))


def test_load_weights_refuses_a_file_without_tensors(tmp_path):
    (tmp_path / "page.bin").write_text("<html>", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read as a projector file"):
        load_weights(tmp_path / "page.bin", build("linear"))
