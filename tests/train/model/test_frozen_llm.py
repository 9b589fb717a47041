"""FrozenLLM: loss and gradient equal a plain forward pass, whatever the micro-batches."""

import logging
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from llava_twophase.constants import IGNORE_INDEX
from llava_twophase.errors import UserError
from llava_twophase.text import format_bytes
from llava_twophase.train.model.activation_checkpointing import checkpointable_layers
from llava_twophase.train.model.activation_memory import ActivationMemory
from llava_twophase.train.model.frozen_llm import FrozenLLM
from llava_twophase.train.model.load_llm import LoadedLLM
from llava_twophase.train.model.micro_batches import choose_micro_batching
from train.model.llms import FAMILIES, build_batch, build_family, build_llm, freeze, reference, step

MEMORY = ActivationMemory(layers=4, image_tokens=6, layer=1000, attention=0, boundary=100, head=100)


@pytest.fixture(scope="module")
def llm():
    return build_llm()


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 8, None])
@pytest.mark.parametrize("bos", [True, False])
def test_loss_and_gradient_do_not_depend_on_micro_batches(llm, samples, bos):
    batch = build_batch(bos=bos)
    expected = reference(llm, *batch[:3], image_position=int(bos))
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


@pytest.mark.parametrize("samples", [1, 2, 8])
def test_weights_of_samples_take_the_place_of_the_mean(llm, samples):
    """The mean is the sum with equal weights; the loss of two batches is their sum with weights of their own."""
    features, ids, labels, lengths = build_batch()
    features.requires_grad_()
    counts = (labels != IGNORE_INDEX).sum(1)
    half = len(counts) // 2
    weights = torch.cat([1 / counts[:half].sum().repeat(half), 3 / counts[half:].sum().repeat(len(counts) - half)])
    frozen = freeze(llm, 1, samples)
    parts = [slice(0, half), slice(half, None)]
    one, other = (frozen.loss(features[part], ids[part], labels[part], lengths[part]) for part in parts)
    (expected,) = torch.autograd.grad(one + 3 * other, features)
    weighted = frozen.loss(features, ids, labels, lengths, weights)
    (gradient,) = torch.autograd.grad(weighted, features)
    torch.testing.assert_close(weighted, one + 3 * other, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("every", [0, 1, 2, 4])
def test_activation_checkpointing_changes_no_bit(llm, every):
    batch = build_batch()
    expected = step(freeze(llm, 1, 4, 0), *batch)
    found = step(freeze(llm, 1, 4, every), *batch)
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


@pytest.mark.parametrize("kind", FAMILIES)
def test_gradient_of_every_family_with_dropout_in_its_config(kind):
    """It does not depend on micro-batches or recomputation, and equals a plain forward pass in evaluation mode."""
    llm, batch = build_family(kind), build_batch()
    expected = reference(llm.eval(), *batch[:3])
    llm.train()
    for samples, every in ((8, 0), (3, 1)):
        torch.testing.assert_close(step(freeze(llm, 1, samples, every), *batch), expected, rtol=1e-5, atol=1e-6)


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


def test_llm_has_no_gradients_hooks_or_changed_layers_after_a_step():
    llm = build_llm()
    classes = [type(module) for module in llm.modules()]
    step(freeze(llm, checkpoint_every=1), *build_batch())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in llm.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llm.modules())
    assert [type(module) for module in llm.modules()] == classes


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
        self.sizes = []
        self.first_layer = checkpointable_layers(llm)[0]
        self.handle = llm.register_forward_pre_hook(self.check, with_kwargs=True)

    def check(self, module, args, kwargs):
        samples, checkpointing = len(kwargs["inputs_embeds"]), "Checkpointed" in type(self.first_layer).__name__
        if not self.fits(samples, checkpointing):
            raise torch.OutOfMemoryError("simulated")
        self.sizes.append(samples)


@pytest.fixture
def fake_memory(llm):
    made = []
    yield lambda fits: made.append(FakeMemory(llm, fits)) or made[-1]
    for memory in made:
        memory.handle.remove()


@pytest.mark.parametrize(
    ("fits", "sizes", "message"),
    [
        (lambda samples, checkpointing: samples <= 3, [2] * 4, "continuing with micro-batches of 2 samples"),
        (
            lambda samples, checkpointing: samples == 1 and checkpointing,
            [1] * 8,
            "continuing with micro-batches of 1 sample, activation checkpointing of one layer in 2",
        ),
    ],
)
def test_out_of_memory_reduces_the_micro_batches_and_continues(llm, fake_memory, caplog, fits, sizes, message):
    batch = build_batch((5,) * 8)
    expected = reference(llm, *batch[:3])
    frozen = freeze(llm, 1, 8, 0)
    memory = fake_memory(fits)
    with caplog.at_level(logging.WARNING):
        found = step(frozen, *batch)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert memory.sizes == sizes and message in caplog.text


def test_out_of_memory_of_one_long_sample_leaves_the_others_as_they_are(llm, fake_memory):
    batch = build_batch((5,) * 7 + (70,))
    frozen = freeze(llm, 1, 4, 0, longest=72)
    step(frozen, *build_batch((5,) * 8))
    memory = fake_memory(lambda samples, checkpointing: samples > 1 or checkpointing)
    step(frozen, *batch)
    assert memory.sizes == [1, 4, 3]
    step(frozen, *batch)
    assert memory.sizes == [1, 4, 3] * 2


def test_out_of_memory_with_the_smallest_micro_batch_is_an_error(llm, fake_memory):
    fake_memory(lambda *_: False)
    with pytest.raises(UserError, match="1 sample, activation checkpointing of every layer; try --micro_batch_size 1"):
        step(freeze(llm, 1, 2, 0), *build_batch())


def test_out_of_memory_without_gradients_reduces_the_forward_passes_only(llm, fake_memory):
    frozen, batch = freeze(llm, 1, 8, 0), build_batch()
    expected = step(frozen, *batch)[0]
    chosen = frozen.micro_batching
    memory = fake_memory(lambda samples, checkpointing: samples <= 2)
    with torch.no_grad():
        torch.testing.assert_close(frozen.loss(*batch), expected, rtol=1e-6, atol=0)
    assert memory.sizes == [2] * 4 and frozen.micro_batching == chosen


def test_micro_batching_is_chosen_once_and_logged(llm, caplog):
    frozen, batch = freeze(llm), build_batch()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            step(frozen, *batch)
    assert frozen.micro_batching.samples == 8 and frozen.micro_batching.checkpoint_every == 0
    assert caplog.text.count("a batch of 8 goes through the LLM in micro-batches of 8 samples") == 1
    assert "--micro_batch_size" in caplog.text


@pytest.mark.parametrize(
    ("given", "is_kept"), [((None, None), True), ((8, 0), True), ((4, None), False), ((None, 1), False)]
)
def test_resume_with_keeps_the_saved_micro_batching_unless_flags_differ(llm, given, is_kept):
    frozen = freeze(llm, 1, 8, 0, longest=50)
    step(frozen, *build_batch())
    resumed = freeze(llm, 1, *given)
    resumed.resume_with(frozen.micro_batching)
    assert (resumed.micro_batching == frozen.micro_batching) is is_kept


def test_one_long_caption_makes_one_small_micro_batch(llm):
    """Three steps: the long caption comes in the second one."""
    sizes = []
    handle = llm.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    frozen = freeze(llm, 1, 4, 0, longest=200)
    for lengths in ((5,) * 8, (5,) * 7 + (198,), (5,) * 8):
        step(frozen, *build_batch(lengths))
    handle.remove()
    assert sizes == [4, 4, 1, 4, 3, 4, 4]


def test_ranks_of_a_partitioned_llm_run_it_equally_often(llm, monkeypatch):
    """Under ZeRO-3 each pass gathers weights from all ranks; another number of passes would wait forever."""
    ranks, passes = [(5,) * 8, (5,) * 7 + (198,)], []
    longest = [200, *[7] * 7]

    def reduce(values, device):
        return longest if len(values) == 8 else [*values[:2], 200, values[3]]

    monkeypatch.setattr("llava_twophase.train.model.frozen_llm.largest_of_all_ranks", reduce)
    for lengths in ranks:
        sizes = []
        handle = llm.register_forward_pre_hook(
            lambda module, args, kwargs, sizes=sizes: sizes.append(len(kwargs["inputs_embeds"])), with_kwargs=True
        )
        batch = build_batch(lengths)
        frozen = FrozenLLM(LoadedLLM(llm, zero3_engine="engine"), 1, 4, 0, longest=200)
        frozen.micro_batching = choose_micro_batching(MEMORY, (7, 200), 8, None, 8, samples=4, checkpoint_every=0)
        found = step(frozen, *batch)
        handle.remove()
        torch.testing.assert_close(found, reference(llm, *batch[:3]), rtol=1e-6, atol=1e-7)
        passes.append(sizes)
    assert passes == [[1, 4, 3]] * 2


@pytest.mark.parametrize("given", [(None, None), (4, 0)])
def test_measured_memory_stays_below_what_is_logged(caplog, given):
    """The long captions come after the first batch."""
    llm = build_llm(num_hidden_layers=8, intermediate_size=256)
    frozen = freeze(llm, 1, *given, longest=162)
    with caplog.at_level(logging.INFO):
        step(frozen, *build_batch((5,) * 8))
    promised = frozen.micro_batching.peak(162)
    for lengths in ((5,) * 8, (5,) * 7 + (160,), (160,) * 8, (30, 60, 90, 120, 5, 5, 5, 5)):
        batch = build_batch(lengths)
        # acc_events: without it, torch 2.11 warns that it clears events of earlier cycles.
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
            step(frozen, *batch)
        assert peak_allocation(profiler) < promised
    assert f"at most {format_bytes(promised, 1)} for" in caplog.text


def peak_allocation(profiler):
    """The largest sum of allocations that were alive at once."""
    changes = [event.cpu_memory_usage for event in profiler.events() if event.name == "[memory]"]
    return max(accumulate(changes))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # raised inside torch.compile
def test_compiled_layers_give_the_same_gradient():
    llm, batch = build_llm(), build_batch()
    expected = step(freeze(llm, 1, 4), *batch)
    frozen = freeze(llm, 1, 4)
    frozen.compile(backend="aot_eager")
    torch.testing.assert_close(step(frozen, *batch), expected, rtol=1e-6, atol=1e-7)
