"""Stored rows and features: exact dtypes to the bit, int8 and int4 within their error, as the format describes."""

import numpy as np
import pytest
import torch

from llava_twophase.cache.codec import Channels, Codec
from llava_twophase.errors import UserError

CLIP = (576, 1024)
SHAPE = (9, 64)
EXACT = ["bfloat16", "float16", "float32"]


def features(images=3, shape=SHAPE, seed=0):
    """Features like those of towers: channels of very different scale, some far from 0, and a few huge tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens, dim = shape
    channel = torch.Generator().manual_seed(99)  # the same for every seed
    scale = torch.exp(0.8 * torch.randn(dim, generator=channel))
    scale[:2] *= 30
    mean = scale * torch.randn(dim, generator=channel)
    values = torch.randn(images, tokens, dim, generator=generator) * scale + mean
    huge = torch.rand(images, tokens, 1, generator=generator) < 0.015
    return torch.where(huge, values * 6, values)


def codec(storage, shape=SHAPE):
    channels = None if storage in EXACT else Channels.measure([features(4, shape, seed=1), features(2, shape, seed=2)])
    return Codec(storage, shape, channels)


def relative_error(storage, shape=SHAPE):
    values = features(4, shape)
    chosen = codec(storage, shape)
    return float((chosen.from_rows(chosen.to_rows(values)) - values).norm() / values.norm())


@pytest.mark.parametrize("storage", EXACT)
def test_exact_dtypes_keep_every_bit_of_a_value(storage):
    values = features().to(getattr(torch, storage))
    rows = codec(storage).to_rows(values)
    assert rows.shape == (3, codec(storage).row_bytes) and rows.dtype == torch.uint8
    assert torch.equal(codec(storage).from_rows(rows), values)
    np.testing.assert_array_equal(codec(storage).to_numpy(rows.numpy()), values.float().numpy())


def test_float32_holds_bfloat16_values_exactly():
    values = features().bfloat16()
    assert torch.equal(codec("float32").from_rows(codec("float32").to_rows(values)), values.float())


@pytest.mark.parametrize(
    ("storage", "most"), [("bfloat16", 1_179_648), ("float32", 2_359_296), ("int8", 600_000), ("int4", 340_000)]
)
def test_row_bytes_of_a_clip_image(storage, most):
    chosen = codec(storage, CLIP)
    assert chosen.row_bytes <= most
    # Rows begin at multiples of 64 bytes, where copies are fast.
    assert chosen.row_bytes % 64 == 0


@pytest.mark.parametrize(("storage", "most"), [("int8", 0.009), ("int4", 0.09)])
def test_lossy_storage_has_a_small_relative_error(storage, most):
    assert 0 < relative_error(storage, (64, 1024)) < most


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_a_row_does_not_depend_on_its_batch(storage):
    values = features(5)
    together = codec(storage).to_rows(values)
    assert torch.equal(together, torch.cat([codec(storage).to_rows(part) for part in values.split(2)]))


def test_int8_rows_follow_the_format():
    chosen, values = codec("int8"), features()
    raw = chosen.to_rows(values).numpy()
    q = raw[:, : 9 * 64].view(np.int8).reshape(3, 9, 64).astype(np.float32)
    scale = raw[:, 9 * 64 :].copy().view(np.float16).reshape(3, 9, 1).astype(np.float32)
    expected = q * scale * chosen.channels.std + chosen.channels.mean
    np.testing.assert_array_equal(chosen.to_numpy(raw), expected)
    # Half a step at most, except for the rounding of the scale.
    step = scale * chosen.channels.std
    assert (np.abs(expected - values.numpy()) <= 0.57 * step).all()


def test_int4_rows_follow_the_format():
    chosen, values = codec("int4"), features()
    raw = chosen.to_rows(values).numpy()
    packed = raw[:, : 9 * 32].reshape(3, 9, 32)
    scale = raw[:, 9 * 32 :].copy().view(np.float16).reshape(3, 9, 2).astype(np.float32)
    expected = np.empty((3, 9, 64), np.float32)
    for channel in range(64):
        byte = packed[..., channel // 2]
        q = (byte & 15 if channel % 2 == 0 else byte >> 4).astype(np.float32) - 8
        expected[..., channel] = q * scale[..., channel // 32]
    expected = expected * chosen.channels.std + chosen.channels.mean
    np.testing.assert_array_equal(chosen.to_numpy(raw), expected)
    np.testing.assert_allclose(chosen.from_rows(torch.from_numpy(raw)).numpy(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("storage", [*EXACT, "int8", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_finite_finds_the_row_of_a_value_that_is_not_finite(storage, bad):
    values = features()
    values[1, 4, 63] = bad
    values = values if storage not in EXACT else values.to(getattr(torch, storage))
    assert codec(storage).finite(codec(storage).to_rows(values).numpy()).tolist() == [True, False, True]


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_constant_channels_and_tokens_at_the_mean_are_exact(storage):
    sample = features(4)
    sample[..., 7] = 3.0
    chosen = Codec(storage, SHAPE, Channels.measure([sample]))
    values = torch.tensor(chosen.channels.mean).expand(1, *SHAPE).clone()
    np.testing.assert_array_equal(chosen.from_rows(chosen.to_rows(values)), values)
    values[0, 0, 7] = 3.5  # not in the sample
    assert abs(float(chosen.from_rows(chosen.to_rows(values))[0, 0, 7]) - 3.5) < 0.1


def test_measure_of_constant_features_has_std_1():
    channels = Channels.measure([torch.ones(1, *SHAPE)])
    assert channels.std.tolist() == [1.0] * 64 and channels.mean.tolist() == [1.0] * 64


def test_measure_does_not_depend_on_batches_and_json_keeps_every_bit():
    values = features(6)
    together, parts = Channels.measure([values]), Channels.measure(values.split(1))
    np.testing.assert_allclose(together.mean, parts.mean, rtol=1e-6)
    np.testing.assert_allclose(together.std, values.flatten(0, 1).double().std(0, correction=0), rtol=1e-6)
    again = Channels.from_json(together.to_json())
    assert again.sha256() == together.sha256()
    np.testing.assert_array_equal(again.std, together.std)


@pytest.mark.parametrize("content", [{}, {"mean": "AAAA"}, {"mean": "?", "std": "?"}, {"mean": 1, "std": 2}])
def test_from_json_refuses_damaged_channels(content):
    with pytest.raises(UserError, match="channels are damaged"):
        Channels.from_json(content)


def test_codec_refuses_missing_channels_and_widths_that_int4_cannot_block():
    with pytest.raises(UserError, match="int4 keeps blocks of 32 channels, but the features are 48 wide; use int8"):
        Codec("int4", (9, 48), Channels(np.zeros(48, "f4"), np.ones(48, "f4")))
    with pytest.raises(UserError, match="int8 needs the mean and std of 64 channels"):
        Codec("int8", SHAPE)
    with pytest.raises(UserError, match="int8 needs the mean and std of 64 channels"):
        Codec("int8", SHAPE, Channels(np.zeros(32, "f4"), np.ones(32, "f4")))


@pytest.mark.parametrize("storage", [*EXACT, "int8", "int4"])
def test_numpy_to_rows_equals_to_rows_bit_for_bit(storage):
    values = features(64)
    values[0, 0] = 0.0
    values[0, 1] = -0.0
    values[1] *= 1e-6
    values[2] *= 1e-42
    values[3, :, :32] = 3.0
    chosen = codec(storage)
    if chosen.channels is not None:
        values[4] = torch.from_numpy(chosen.channels.mean)
    expected = chosen.to_rows(values).numpy()
    np.testing.assert_array_equal(chosen.numpy_to_rows(values.numpy()), expected)


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "int8", "int4"])
def test_numpy_to_rows_lets_finite_find_rows_that_overflow(storage):
    values = features().numpy()
    values[1, 0, 0] = 3.4e38
    assert codec(storage).finite(codec(storage).numpy_to_rows(values)).tolist() == [True, False, True]
