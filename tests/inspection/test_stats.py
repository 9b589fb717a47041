"""Statistics against numpy on the whole sample, what stands out, comparisons of caches, and plots."""

import json

import numpy as np
import pytest

from cache.make import fingerprint_of, make_cache, make_shard, write
from helpers import run
from llava_twophase.cache.format import SHARDS
from llava_twophase.cache.shard_writer import ShardSpec, ShardWriter, sha256
from llava_twophase.inspection.compare import compare, distance
from llava_twophase.inspection.rows import Rows
from llava_twophase.inspection.statistics import Measured

SCRIPT = "pipelines/inspect_cache.py"


def cache_of(folder, values, digests=None, **fingerprint):
    """A float32 cache of given values [n, L, D]."""
    keys = [f"{row}.jpg" for row in range(len(values))]
    (folder / SHARDS).mkdir(parents=True)
    made = {**fingerprint_of("float32"), **fingerprint}
    spec = ShardSpec(values.shape[1:], "float32", made, {})
    writer = ShardWriter(folder / SHARDS / "shard-000000.h5", keys, spec)
    digests = digests or [sha256(key.encode()) for key in keys]
    writer.append(values.astype("<f4"), [(1, digest) for digest in digests])
    write(folder, [writer.seal()], "float32", fingerprint=made)
    return folder


def random_values(count=20, tokens=9, width=32, seed=0):
    return np.random.default_rng(seed).standard_normal((count, tokens, width)).astype(np.float32)


def stats(cache, *flags, expect=0):
    return json.loads(run(["python", SCRIPT, "stats", cache, "--json", *flags], expect=expect).stdout)


def test_statistics_are_those_of_the_values(tmp_path):
    stored = random_values() * 2 + 1
    values = stats(cache_of(tmp_path / "cache", stored))
    norms = np.linalg.norm(stored, axis=-1)
    expected = {
        "mean": stored.mean(dtype=np.float64),
        "std": stored.std(dtype=np.float64),
        "min": stored.min(),
        "max": stored.max(),
        "token_norm": norms.mean(),
        "channel_rms": np.sqrt(np.square(stored, dtype=np.float64).mean((0, 1))),
        "token_norms": norms.mean(0),
        "token_norm_percentiles": np.percentile(norms, (1, 50, 99)),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-5, err_msg=name)
    assert (values["rows"], values["of"], values["seed"], values["non_finite"]) == (20, 20, 0, 0)
    assert values["outlier_channels"] == values["dead_channels"] == values["constant_images"] == []


def test_a_sample_is_seeded(tmp_path):
    cache = cache_of(tmp_path / "cache", random_values(60))
    first, again, other = (stats(cache, "--n", "10", "--seed", seed) for seed in ("3", "3", "4"))
    assert first == again and first["mean"] != other["mean"] and first["rows"] == 10


def test_what_stands_out_is_named(tmp_path):
    stored = random_values()
    stored[3, 4] *= 50  # a massive token
    stored[5] = stored[5, :1]  # an image of equal tokens
    stored[6] = 0
    stored[9] = stored[8]
    digests = [sha256(b"%d" % (row if row != 9 else 8)) for row in range(20)]
    values = stats(cache_of(tmp_path / "cache", stored, digests))
    assert values["outlier_token_places"] == [[4, 1]] and values["outlier_token_images"] == 1
    assert values["constant_images"] == ["5.jpg", "6.jpg"]
    assert [pair[:2] for pair in values["nearly_equal_images"]] == [["8.jpg", "9.jpg"]]
    assert (values["equal_pictures_compared"], values["equal_pictures_apart"]) == (1, 0.0)


def test_channels_that_stand_out(tmp_path):
    stored = random_values()
    stored[:, :, 7] *= 30
    stored[:, :, 11] = 0.25
    values = stats(cache_of(tmp_path / "cache", stored))
    assert values["dead_channels"] == [11]
    assert [(channel, round(times)) for channel, times in values["outlier_channels"]] == [(7, pytest.approx(30, abs=4))]


def test_equal_pictures_with_other_features_are_measured(tmp_path):
    stored = random_values()
    stored[9] = stored[8]
    stored[9, 0, 0] += 2
    digests = [sha256(b"%d" % (row if row != 9 else 8)) for row in range(20)]
    assert Measured(Rows(cache_of(tmp_path / "cache", stored, digests)), 256, 0).values()[
        "equal_pictures_apart"
    ] == pytest.approx(2, rel=1e-6)


def test_adjacent_patches_are_more_alike_where_pictures_are_smooth(tmp_path):
    ramp = np.linspace(0, 3, 36).reshape(1, 36, 1)
    stored = np.concatenate([np.cos(ramp), np.sin(ramp), 0 * ramp], axis=-1).repeat(3, axis=0)
    values = Measured(Rows(cache_of(tmp_path / "cache", stored)), 256, 0).values()
    assert values["adjacent_patch_cosine"] > values["distant_patch_cosine"]


def test_values_that_are_not_finite_exit_with_1(tmp_path):
    # The writer refuses them, as another program's shard might not.
    from cache.make import reseal, set_row

    cache, _, stored = make_cache(tmp_path / "cache", dtype="float32")
    bad = stored[2].copy()
    bad[1, :3] = [np.inf, -np.inf, np.nan]
    reseal(cache, 0, lambda data, header: set_row(data, header, 2, bad))
    values = stats(cache, expect=1)
    assert values["non_finite"] == 3 and values["non_finite_images"] == ["00000/éépicture 2.jpg"]
    finite = np.concatenate([stored[:2].ravel(), stored[3:].ravel()])
    assert values["min"] == finite.min() or values["min"] >= stored.min()


def test_one_image_and_one_token(tmp_path):
    values = stats(cache_of(tmp_path / "cache", random_values(1, 1, 32)))
    assert values["nearest_image_cosine"] is None and values["adjacent_patch_cosine"] is None
    assert "images" in run(["python", SCRIPT, "stats", tmp_path / "cache"]).stdout


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_statistics_of_every_storage(dtype, tmp_path):
    assert stats(make_cache(tmp_path / "cache", dtype=dtype)[0])["rows"] == 8


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plots_are_drawn(suffix, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plot.{suffix}"
    run(["python", SCRIPT, "stats", cache_of(tmp_path / "cache", random_values()), "--plot", path])
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(start) and len(list(tmp_path.iterdir())) == 2


def test_without_matplotlib_the_error_says_what_to_install(tmp_path):
    cache = cache_of(tmp_path / "cache", random_values())
    hidden = tmp_path / "hidden" / "matplotlib"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('hidden')", encoding="utf-8")
    from helpers import ROOT

    environment = {"PYTHONPATH": f"{hidden.parent}:{ROOT}"}
    result = run(["python", SCRIPT, "stats", cache, "--plot", tmp_path / "p.png"], expect=1, **environment)
    assert result.stderr == "error: plots need matplotlib: pip install 'llava-twophase[plots]'\n"
    report = run(["python", SCRIPT, "report", cache, "-o", tmp_path / "r.html"], **environment)
    assert "warning: the report has no plots" in report.stderr
    assert "No plots" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_cache_compared_with_itself(tmp_path):
    cache = cache_of(tmp_path / "cache", random_values())
    values = compare(Rows(cache), Rows(cache), 256, 0)
    assert values["fingerprint"] == [] and values["equal_images"] == 20 and values["worst"] == []
    assert values["cosine"] == {"mean": 1.0, "min": 1.0} and values["max_error"] == 0
    assert values["cka"] == pytest.approx(1)


def test_a_comparison_measures_and_names_the_worst(tmp_path):
    stored = random_values()
    other = stored.copy()
    other[4] *= 1.5
    other[7] *= 1.01
    one = cache_of(tmp_path / "one", other, select_layer=-3)
    two = cache_of(tmp_path / "two", stored)
    result = run(["python", SCRIPT, "compare", one, two, "--json"])
    values = json.loads(result.stdout)
    assert [key for key, _, _ in values["worst"]] == ["4.jpg", "7.jpg"]
    assert values["relative_error"]["max"] == pytest.approx(0.5) and values["equal_images"] == 18
    assert values["fingerprint"] == ["select_layer: the first has -3, the second -2"]
    assert "select_layer: the first has -3, the second -2" in run(["python", SCRIPT, "compare", one, two]).stdout


def test_other_shapes_have_a_cka(tmp_path):
    stored = random_values(20, 9, 32)
    rotated = stored @ np.linalg.qr(random_values(1, 32, 32)[0])[0]
    one, two = cache_of(tmp_path / "one", stored), cache_of(tmp_path / "two", rotated[:, :4])
    three = cache_of(tmp_path / "three", rotated)
    values = compare(Rows(one), Rows(two), 256, 0)
    assert "cosine" not in values and values["shapes"] == [[9, 32], [4, 32]]
    assert compare(Rows(one), Rows(three), 256, 0)["cka"] == pytest.approx(1, abs=1e-6)
    assert "only for CKA" in run(["python", SCRIPT, "compare", one, two]).stdout


def test_caches_without_a_common_image(tmp_path):
    one = cache_of(tmp_path / "one", random_values(2))
    two, _, _ = make_cache(tmp_path / "two")
    assert "no image key in common" in run(["python", SCRIPT, "compare", one, two], expect=1).stderr


def test_distances():
    one = np.array([[[3.0, 4.0], [0.0, 0.0]]], np.float32)
    found = distance(one, np.array([[[4.0, 3.0], [0.0, 0.0]]], np.float32))
    assert found["cosine"][0] == pytest.approx((24 / 25 + 1) / 2)
    assert found["relative_error"][0] == pytest.approx(2**0.5 / 5) and found["max_error"][0] == 1


def test_int8_is_nearer_than_int4(tmp_path):
    """The codec's own rounding, by the command that is there to show it."""
    torch = pytest.importorskip("torch")
    from cache.make import channels_of
    from llava_twophase.cache.codec import Codec

    values = random_values()
    exact = cache_of(tmp_path / "exact", values)
    errors = {}
    for dtype in ("int8", "int4"):
        stored = Codec(dtype, (9, 32), channels_of(32)).to_rows(torch.from_numpy(values)).numpy()
        (tmp_path / dtype / SHARDS).mkdir(parents=True)
        keys = [f"{row}.jpg" for row in range(20)]
        write(tmp_path / dtype, [make_shard(tmp_path / dtype / SHARDS / "shard-000000.h5", keys, stored, dtype)], dtype)
        errors[dtype] = compare(Rows(tmp_path / dtype), Rows(exact), 256, 0)["relative_error"]["mean"]
    assert 0 < errors["int8"] < 0.02 < errors["int4"] < 0.2


def test_rows_are_compared_in_their_own_order(tmp_path):
    cache, keys, stored = make_cache(tmp_path / "one", counts=(5,))
    (tmp_path / "two" / SHARDS).mkdir(parents=True)
    entry = make_shard(tmp_path / "two" / SHARDS / "shard-000000.h5", keys[::-1], stored[::-1].copy())
    write(tmp_path / "two", [entry])
    assert compare(Rows(cache), Rows(tmp_path / "two"), 256, 0)["equal_images"] == 5
