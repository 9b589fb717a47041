"""FrozenLLM: loss and gradient equal a plain forward pass, whatever the micro-batches."""

import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llava_twophase.constants import IGNORE_INDEX
from llava_twophase.errors import UserError
from llava_twophase.train.model.micro_batches import MicroBatching
from tiny import redraw
from train.model.llms import WIDTH, build_batch, build_llm, freeze, reference, step

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "olmo2")


@pytest.fixture(scope="module")
def llm():
    return build_llm()


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 8, None])
@pytest.mark.parametrize("bos", [True, False])
def test_loss_and_gradient_do_not_depend_on_micro_batches(llm, samples, bos):
    batch = build_batch(bos=bos)
    expected = reference(llm, *batch[:3], image_at=int(bos))
    torch.testing.assert_close(step(freeze(llm, int(bos), samples), *batch), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("lengths", [(3,), (5, 5, 5), (1, 9, 1, 1, 1)])
def test_loss_and_gradient_of_incomplete_batches(llm, lengths):
    batch = build_batch(lengths)
    expected = reference(llm, *batch[:3])
    for samples in (1, 2, 4):
        torch.testing.assert_close(step(freeze(llm, 1, samples), *batch), expected, rtol=1e-6, atol=1e-7)


def test_loss_is_the_same_without_lengths(llm):
    features, ids, labels, lengths = build_batch()
    losses = [freeze(llm, 1, 2).loss(features, ids, labels, known) for known in (lengths, None)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


@pytest.mark.parametrize("every", [0, 1, 2, 4])
def test_activation_checkpointing_changes_no_bit(llm, every):
    batch = build_batch()
    expected = step(freeze(llm, 1, 4, 0), *batch)
    found = step(freeze(llm, 1, 4, every), *batch)
    llm.activation_checkpointing_disable()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_batch_without_a_caption_token_has_zero_loss_and_gradient(llm):
    """pytorch/pytorch#116349: a mean over no token would be NaN and end the run."""
    features, ids, labels, lengths = build_batch((3, 1))
    masked = torch.full_like(labels, IGNORE_INDEX)
    loss, gradient = step(freeze(llm), features, ids, masked, lengths)
    assert loss == 0 and not gradient.any()
    masked[0] = labels[0]
    expected = reference(llm, features, ids, masked)
    found = step(freeze(llm, 1, 1), features, ids, masked, lengths)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", LLAMA_LIKE)
def test_gradient_of_llama_like_families(kind):
    llm, batch = build_llm(kind), build_batch()
    expected = reference(llm, *batch[:3])
    torch.testing.assert_close(step(freeze(llm, 1, 4), *batch), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "opt", "mpt", "falcon", "bloom", "phi3", "gemma2"])
def test_gradient_of_families_with_other_layers_and_names(kind):
    """Submodules that do not have LLaMA's names are computed at all positions. Without dropout."""
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    config = AutoConfig.for_model(kind, **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    llm, batch = redraw(AutoModelForCausalLM.from_config(config), 3).eval(), build_batch()
    expected = reference(llm, *batch[:3])
    torch.testing.assert_close(step(freeze(llm, 1, 4, 0), *batch), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_stays_within_rounding(dtype, tolerance):
    llm, batch = build_llm(dtype=dtype), build_batch()
    loss, gradient = reference(build_llm(), *batch[:3])
    for samples in (1, 8):
        found = step(freeze(llm, 1, samples), *batch)
        assert found[0] == pytest.approx(loss.item(), rel=tolerance)
        assert (found[1] - gradient).norm() < 3 * tolerance * gradient.norm()


def test_float16_gradients_below_its_range_do_not_vanish():
    llm, (features, ids, labels, lengths) = build_llm(dtype=torch.float16), build_batch()
    _, gradient = step(freeze(llm), features, ids, labels, lengths)
    leaf = features.clone().requires_grad_()
    (freeze(llm).loss(leaf, ids, labels, lengths) * 2.0**-20).backward()
    assert leaf.grad.abs().max() < torch.finfo(torch.float16).tiny
    torch.testing.assert_close(leaf.grad * 2.0**20, gradient)


def test_float16_overflow_reaches_the_gradient_once():
    """The trainer's scaler skips that step; the next one has a smaller scale."""
    llm, (features, ids, labels, _) = build_llm(dtype=torch.float16), build_batch()
    frozen = freeze(llm, 1, 8, 0)
    frozen._scale = frozen._scale * 2.0**24
    finite = [bool(step(frozen, features, ids, labels)[1].isfinite().all()) for _ in range(24)]
    assert not finite[0] and finite[-1]
    assert finite == sorted(finite)


def test_loss_without_gradients_chooses_no_micro_batching(llm):
    features, ids, labels, lengths = build_batch()
    frozen = freeze(llm)
    with torch.no_grad():
        loss = frozen.loss(features.requires_grad_(), ids, labels, lengths)
    assert not loss.requires_grad and frozen.micro_batching is None
    torch.testing.assert_close(loss, reference(llm, features.detach(), ids, labels)[0], rtol=1e-6, atol=0)


def test_llm_has_no_gradients_and_no_hooks_after_a_step():
    llm = build_llm()
    step(freeze(llm, checkpoint_every=1), *build_batch())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in llm.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llm.modules())


def test_attention_gets_no_mask(llm, monkeypatch):
    calls = []
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: (calls.append((kwargs["attn_mask"], kwargs["is_causal"])), kernel(*args, **kwargs))[1],
    )
    step(freeze(llm, 1, 8), *build_batch())
    assert calls and set(calls) == {(None, True)}


class FakeMemory:
    """Simulates a device that runs out of memory: no CPU raises torch.OutOfMemoryError by itself."""

    def __init__(self, llm, fits):
        self.fits = fits
        self.handle = llm.register_forward_pre_hook(self.check, with_kwargs=True)

    def check(self, module, args, kwargs):
        if not self.fits(len(kwargs["inputs_embeds"]), module.is_activation_checkpointing):
            raise torch.OutOfMemoryError("simulated")


@pytest.mark.parametrize(
    ("fits", "expected_choice"),
    [
        (lambda samples, checkpointing: samples <= 3, MicroBatching(2)),
        (lambda samples, checkpointing: samples == 1 and checkpointing, MicroBatching(1, 4)),
    ],
)
def test_out_of_memory_reduces_the_micro_batches_and_continues(llm, caplog, fits, expected_choice):
    batch = build_batch()
    expected = reference(llm, *batch[:3])
    memory, frozen = FakeMemory(llm, fits), freeze(llm)
    frozen.micro_batching = MicroBatching(8)
    with caplog.at_level(logging.WARNING):
        found = step(frozen, *batch)
    memory.handle.remove()
    llm.activation_checkpointing_disable()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert frozen.micro_batching == expected_choice and str(expected_choice) in caplog.text


def test_out_of_memory_with_the_smallest_micro_batch_is_an_error(llm):
    memory, frozen = FakeMemory(llm, lambda *_: False), freeze(llm)
    frozen.micro_batching = MicroBatching(2)
    with pytest.raises(UserError, match="activation checkpointing of every layer; try"):
        step(frozen, *build_batch())
    memory.handle.remove()
    llm.activation_checkpointing_disable()


def test_micro_batching_is_chosen_once_and_logged(llm, caplog):
    frozen, batch = freeze(llm), build_batch()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            step(frozen, *batch)
    assert frozen.micro_batching == MicroBatching(8)
    assert caplog.text.count("a batch of 8 goes through the LLM in micro-batches of 8 samples") == 1
    assert "--micro_batch_size" in caplog.text


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # raised inside torch.compile
def test_compiled_layers_give_the_same_gradient():
    llm, batch = build_llm(), build_batch()
    expected = step(freeze(llm, 1, 4), *batch)
    frozen = freeze(llm, 1, 4)
    frozen.compile(backend="aot_eager")
    torch.testing.assert_close(step(frozen, *batch), expected, rtol=1e-6, atol=1e-7)
