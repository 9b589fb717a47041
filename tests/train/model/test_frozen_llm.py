"""The frozen LLM as one function: equal losses and gradients however a batch is cut, and the choice of the cut."""

import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llava_twophase.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_twophase.errors import UserError
from llava_twophase.train.model.frozen_llm import FrozenLLM
from llava_twophase.train.model.micro_batches import Cut, RowMemory, choose_cut, free_bytes, paper_row, saved_bytes
from tiny import redraw

PATCHES, WIDTH = 6, 64
FAMILY = ("llama", "mistral", "qwen2", "qwen3", "gemma", "olmo2")


def build_llm(kind="llama", dtype=torch.float32):
    config = AutoConfig.for_model(
        kind,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
        pad_token_id=0,
    )
    return redraw(AutoModelForCausalLM.from_config(config, dtype=dtype), 3).train()


def build_batch(lengths=(9, 2, 5, 1, 7, 3, 4, 6), bos=True, seed=0):
    """Ragged captions of these lengths, and features."""
    generator = torch.Generator().manual_seed(seed)
    start = int(bos)
    ids = torch.zeros(len(lengths), start + 1 + max(lengths), dtype=torch.long)
    labels = torch.full_like(ids, IGNORE_INDEX)
    ids[:, 0], ids[:, start] = 1, IMAGE_TOKEN_INDEX
    for row, length in enumerate(lengths):
        caption = torch.randint(0, 128, (length,), generator=generator)
        ids[row, start + 1 : start + 1 + length] = labels[row, start + 1 : start + 1 + length] = caption
    features = torch.randn(len(lengths), PATCHES, WIDTH, generator=generator)
    return features, ids, labels, [start + 1 + length for length in lengths]


def plain(llm, features, ids, labels, image_at=1):
    """The whole batch at once, all logits, the mean that transformers would take."""
    leaf = features.clone().requires_grad_()
    text = llm.get_input_embeddings()(ids.clamp(min=0))
    embeds = torch.cat([text[:, :image_at], leaf.to(text.dtype), text[:, image_at + 1 :]], dim=1)
    logits = llm(inputs_embeds=embeds, use_cache=False).logits.float()
    ignored = labels.new_full((len(labels), PATCHES), IGNORE_INDEX)
    spliced = torch.cat([labels[:, :image_at], ignored, labels[:, image_at + 1 :]], dim=1)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), spliced[:, 1:].flatten())
    loss.backward()
    return loss.detach(), leaf.grad


def cut_up(llm, batch, image_at=1, rows=None, recompute=None, factor=1.0):
    features, ids, labels, lengths = batch
    leaf = features.clone().requires_grad_()
    frozen = FrozenLLM(llm, image_at, rows, recompute)
    loss = frozen.loss(leaf, ids, labels, lengths)
    (loss * factor).backward()
    return loss.detach(), leaf.grad


@pytest.fixture(scope="module")
def llm():
    return build_llm()


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, None])
@pytest.mark.parametrize("bos", [True, False])
def test_loss_and_gradient_do_not_depend_on_the_cut(llm, rows, bos):
    batch = build_batch(bos=bos)
    expected = plain(llm, *batch[:3], image_at=int(bos))
    torch.testing.assert_close(cut_up(llm, batch, int(bos), rows), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("lengths", [(3,), (5, 5, 5), (1, 9, 1, 1, 1)])
def test_last_batches_may_be_ragged(llm, lengths):
    batch = build_batch(lengths)
    expected = plain(llm, *batch[:3])
    for rows in (1, 2, 4):
        torch.testing.assert_close(cut_up(llm, batch, 1, rows), expected, rtol=1e-6, atol=1e-7)


def test_lengths_are_only_a_shortcut(llm):
    features, ids, labels, lengths = build_batch()
    with_them, without = (FrozenLLM(llm, 1, 2).loss(features, ids, labels, known) for known in (lengths, None))
    torch.testing.assert_close(with_them, without, rtol=1e-6, atol=0)


@pytest.mark.parametrize("recompute", [0, 1, 2, 4])
def test_recomputation_changes_nothing(llm, recompute):
    batch = build_batch()
    expected = cut_up(llm, batch, rows=4, recompute=0)
    found = cut_up(llm, batch, rows=4, recompute=recompute)
    llm.activation_checkpointing_disable()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_batch_without_a_caption_token_teaches_nothing(llm):
    """pytorch/pytorch#116349: a mean over no token would be NaN, and end the run."""
    features, ids, labels, lengths = build_batch((3, 1))
    masked = torch.full_like(labels, IGNORE_INDEX)
    loss, gradient = cut_up(llm, (features, ids, masked, lengths))
    assert loss == 0 and not gradient.any()
    masked[0] = labels[0]
    expected = plain(llm, features, ids, masked)
    torch.testing.assert_close(cut_up(llm, (features, ids, masked, lengths), rows=1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", FAMILY)
def test_every_llm_of_the_family_gets_its_plain_gradient(kind):
    llm, batch = build_llm(kind), build_batch()
    expected = plain(llm, *batch[:3])
    torch.testing.assert_close(cut_up(llm, batch, rows=4), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "opt", "mpt", "falcon", "bloom", "phi3", "gemma2"])
def test_llms_with_other_layers_and_names_get_theirs(kind):
    """What is not there under LLaMA's names is not left out. Without dropout, which some of them have."""
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    config = AutoConfig.for_model(kind, **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    llm, batch = redraw(AutoModelForCausalLM.from_config(config), 3).eval(), build_batch()
    expected = plain(llm, *batch[:3])
    torch.testing.assert_close(cut_up(llm, batch, rows=4, recompute=0), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_stays_within_rounding(dtype, tolerance):
    llm, batch = build_llm(dtype=dtype), build_batch()
    loss, gradient = plain(build_llm(), *batch[:3])
    for rows in (1, 8):
        found = cut_up(llm, batch, rows=rows)
        assert found[0] == pytest.approx(loss.item(), rel=tolerance)
        assert (found[1] - gradient).norm() < 3 * tolerance * gradient.norm()


def test_float16_gradients_too_small_for_float16_survive():
    llm = build_llm(dtype=torch.float16)
    _, gradient = cut_up(llm, build_batch())
    _, small = cut_up(llm, build_batch(), factor=2.0**-20)
    assert small.abs().max() < torch.finfo(torch.float16).tiny
    torch.testing.assert_close(small * 2.0**20, gradient)


def test_an_overflow_is_passed_on_and_lowers_the_scale():
    llm = build_llm(dtype=torch.float16)
    frozen, (features, ids, labels, _) = FrozenLLM(llm, 1, 8, 0), build_batch()
    frozen._scale = torch.tensor(2.0**40)
    leaf = features.clone().requires_grad_()
    frozen.loss(leaf, ids, labels).backward()
    assert not leaf.grad.isfinite().all()
    assert frozen._scale == 2.0**39


def test_without_gradients_it_is_a_forward_pass(llm):
    features, ids, labels, lengths = build_batch()
    frozen = FrozenLLM(llm)
    with torch.no_grad():
        loss = frozen.loss(features.requires_grad_(), ids, labels, lengths)
    assert not loss.requires_grad and frozen.cut is None
    torch.testing.assert_close(loss, plain(llm, features.detach(), ids, labels)[0], rtol=1e-6, atol=0)


def test_the_llm_is_left_as_it_was():
    llm = build_llm()
    cut_up(llm, build_batch(), recompute=1)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in llm.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llm.modules())


def test_the_last_layer_computes_only_what_is_read(llm):
    seen = []
    layer = llm.model.layers[-1]
    handles = [
        part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
        for part in (layer.self_attn.k_proj, layer.mlp.down_proj)
    ]
    features, ids, labels, lengths = build_batch((4, 4))
    FrozenLLM(llm, 1, 2, 0).loss(features, ids, labels, lengths)
    for handle in handles:
        handle.remove()
    positions = ids.shape[1] - 1 + PATCHES
    assert seen == [positions, positions - PATCHES]  # the last image position is read, as is every caption token


def test_no_attention_mask_is_made(llm, monkeypatch):
    calls = []
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: (calls.append((kwargs["attn_mask"], kwargs["is_causal"])), kernel(*args, **kwargs))[1],
    )
    cut_up(llm, build_batch(), rows=8)
    assert calls and set(calls) == {(None, True)}


class FakeMemory:
    """Simulates a device that runs out: no CPU raises torch.OutOfMemoryError by itself."""

    def __init__(self, llm, fits):
        self.fits, self.tried = fits, []
        self.handle = llm.register_forward_pre_hook(self.check, with_kwargs=True)

    def check(self, module, args, kwargs):
        rows, recompute = len(kwargs["inputs_embeds"]), module.is_activation_checkpointing
        self.tried.append(rows)
        if not self.fits(rows, recompute):
            raise torch.OutOfMemoryError("simulated")


@pytest.mark.parametrize(
    ("fits", "cut"),
    [(lambda rows, recompute: rows <= 3, Cut(2)), (lambda rows, recompute: rows == 1 and recompute, Cut(1, 4))],
)
def test_out_of_memory_cuts_smaller_and_goes_on(llm, caplog, fits, cut):
    batch = build_batch()
    expected = plain(llm, *batch[:3])
    memory, frozen = FakeMemory(llm, fits), FrozenLLM(llm)
    frozen.cut = Cut(8)
    leaf = batch[0].clone().requires_grad_()
    with caplog.at_level(logging.WARNING):
        loss = frozen.loss(leaf, *batch[1:])
    loss.backward()
    memory.handle.remove()
    llm.activation_checkpointing_disable()
    torch.testing.assert_close((loss.detach(), leaf.grad), expected, rtol=1e-6, atol=1e-7)
    assert frozen.cut == cut and str(cut) in caplog.text


def test_nothing_smaller_is_a_users_error(llm):
    memory, frozen = FakeMemory(llm, lambda *_: False), FrozenLLM(llm)
    frozen.cut = Cut(2)
    batch = build_batch()
    with pytest.raises(UserError, match="every layer is recomputed; try"):
        frozen.loss(batch[0].requires_grad_(), *batch[1:])
    memory.handle.remove()
    llm.activation_checkpointing_disable()


def test_the_choice_is_made_once_and_said(llm, caplog):
    frozen, batch = FrozenLLM(llm), build_batch()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            frozen.loss(batch[0].clone().requires_grad_(), *batch[1:])
    assert frozen.cut == Cut(8)
    assert caplog.text.count("a batch of 8 goes through the LLM in micro-batches of 8 samples") == 1
    assert "--micro_batch_size" in caplog.text


ROW = RowMemory(layers=32, layer=100, boundary=10, head=50)


@pytest.mark.parametrize(
    ("free", "cut"),
    [
        (10**6, Cut(8)),
        (16_000, Cut(4)),
        (4_000, Cut(1)),
        (3_500, Cut(1, 4)),
        (700, Cut(1, 1)),
        (1, Cut(1, 1)),
    ],
)
def test_small_micro_batches_come_before_recomputation(free, cut):
    assert choose_cut(ROW, free, batch=32, enough=7) == cut


def test_users_have_the_last_word():
    assert choose_cut(ROW, 10**6, 32, 7, rows=3) == Cut(3)
    assert choose_cut(ROW, 1, 32, 7, rows=3, recompute=0) == Cut(3)
    assert choose_cut(ROW, 10**6, 32, 7, recompute=2) == Cut(8, 2)


def test_paper_and_trial_agree():
    llm = build_llm(dtype=torch.bfloat16).requires_grad_(False)
    embeds = torch.randn(1, 50, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    found = saved_bytes(lambda: llm(inputs_embeds=embeds, use_cache=False, logits_to_keep=1), llm)
    row = paper_row(llm.config, 50, 1, 2)
    assert found / row.layers == pytest.approx(row.layer, rel=0.15)


def test_free_memory_is_shared_by_a_nodes_ranks(monkeypatch):
    device = torch.device("cpu")
    alone = free_bytes(device)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0 < free_bytes(device) < alone / 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own look
def test_compiled_layers_give_the_same_gradient():
    llm, batch = build_llm(), build_batch()
    expected = cut_up(llm, batch, rows=4)
    frozen = FrozenLLM(llm, 1, 4)
    frozen.compile(backend="aot_eager")
    leaf = batch[0].clone().requires_grad_()
    loss = frozen.loss(leaf, *batch[1:])
    loss.backward()
    torch.testing.assert_close((loss.detach(), leaf.grad), expected, rtol=1e-6, atol=1e-7)
