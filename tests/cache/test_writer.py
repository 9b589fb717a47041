"""CacheWriter: rows from anywhere become a cache, interrupted or not, and wrong input is refused by key."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from helpers import process_environment, run
from llava_twophase import CacheWriter, FeatureCache
from llava_twophase.cache.check.verify import verify
from llava_twophase.cache.codec import Channels
from llava_twophase.cache.manifest import read_manifest
from llava_twophase.cache.session import CacheSession
from llava_twophase.errors import UserError

SHAPE = (4, 32)
FINGERPRINT = {"tower": {"name": "my ViT", "revision": "3f2a"}}
CHANNELS = Channels(np.linspace(-1, 1, 32, dtype="f4"), np.linspace(0.5, 2, 32, dtype="f4"))
STORAGES = ["float32", "float16", "bfloat16", "int8", "int4"]


def row(number):
    return np.random.default_rng(number).standard_normal(SHAPE, np.float32)


def keys(count, first=0):
    return [f"{number % 3}/{number}.jpg" for number in range(first, first + count)]


def open_writer(path, dtype="float32", fingerprint=None, **options):
    channels = CHANNELS if dtype in ("int8", "int4") else None
    options = {"images_per_shard": 4, "channels": channels, "shape": SHAPE, **options}
    return CacheWriter(path, dtype=dtype, fingerprint=FINGERPRINT if fingerprint is None else fingerprint, **options)


def write(path, count=10, dtype="float32", **options):
    with open_writer(path, dtype, **options) as cache:
        for number, key in enumerate(keys(count)):
            cache.add(key, row(number))
    return path


def files(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def times(path):
    return {file: file.stat().st_mtime_ns for file in path.rglob("*")}


def test_cache_is_complete_where_the_manifest_was_seldom_written(tmp_path, monkeypatch):
    expected = files(write(tmp_path / "often"))
    monkeypatch.setattr("llava_twophase.cache.session._CHEAP", -1.0)
    monkeypatch.setattr("llava_twophase.cache.session._SHARE", 1e9)
    assert files(write(tmp_path / "seldom")) == expected
    with open_writer(tmp_path / "seldom") as cache:
        for number, key in enumerate(keys(30)):
            cache.add(key, row(number))
        listed = len(read_manifest(tmp_path / "seldom").shards)
    assert listed < len(read_manifest(tmp_path / "seldom").shards) == 8
    assert FeatureCache(tmp_path / "seldom").missing(keys(30)) == []


def test_the_documented_example_works_without_torch(tmp_path):
    code = """
import sys
import numpy as np
from llava_twophase import CacheWriter, FeatureCache

my_features = [("a.jpg", np.full((576, 1024), 1.5, np.float32)), ("b.jpg", np.zeros((576, 1024), np.float32))]
fingerprint = {"tower": {"name": "my ViT", "revision": "3f2a"}}
with CacheWriter("caches/mine", shape=(576, 1024), dtype="bfloat16", fingerprint=fingerprint) as cache:
    for key, features in my_features:
        cache.add(key, features)
found = FeatureCache("caches/mine").read(["a.jpg"])
print(found.dtype, found.shape, found.min(), found.max(), "torch" in sys.modules)
"""
    assert run(["python", "-c", code], cwd=tmp_path).stdout == "float32 (1, 576, 1024) 1.5 1.5 False\n"


@pytest.mark.parametrize("dtype", STORAGES)
def test_rows_are_read_back_as_the_codec_stores_them(tmp_path, dtype):
    cache = FeatureCache(write(tmp_path / "cache", dtype=dtype))
    values = torch.from_numpy(np.stack([row(number) for number in range(10)]))
    expected = cache.codec.to_numpy(cache.codec.to_rows(values).numpy())
    np.testing.assert_array_equal(cache.read(keys(10)), expected)
    assert list(cache.keys()) == keys(10)
    assert [entry.rows for entry in cache.manifest.shards] == [4, 4, 2]
    assert verify(cache.path) == []


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_torch_and_numpy_inputs_give_the_same_files(tmp_path, kind, dtype):
    tensors = [torch.from_numpy(row(number)).to(getattr(torch, kind)) for number in range(3)]
    with open_writer(tmp_path / "torch", dtype) as cache:
        for key, tensor in zip(keys(3), tensors, strict=True):
            cache.add(key, torch.nn.Parameter(tensor).t().contiguous().t())
    with open_writer(tmp_path / "numpy", dtype) as cache:
        for key, tensor in zip(keys(3), tensors, strict=True):
            cache.add(key, tensor.float().numpy().astype("f2" if kind == "float16" else ">f4"))
    assert files(tmp_path / "torch") == files(tmp_path / "numpy")


def test_float32_is_rounded_to_the_nearest_even_bfloat16(tmp_path):
    values = np.zeros(SHAPE, np.float32)
    values.reshape(-1)[:6] = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, 1e-45, 3.3895e38]
    with open_writer(tmp_path / "cache", "bfloat16") as cache:
        cache.add("a", values)
    np.testing.assert_array_equal(
        FeatureCache(tmp_path / "cache").read(["a"])[0], torch.from_numpy(values).bfloat16().float().numpy()
    )


def test_running_again_on_a_complete_cache_changes_no_file(tmp_path):
    path = write(tmp_path / "cache")
    before = times(path)
    write(path)
    assert times(path) == before


def test_new_keys_go_into_new_shards(tmp_path):
    path = write(tmp_path / "cache", 6)
    before = files(path)
    with open_writer(path) as cache:
        assert read_manifest(path).complete
        for number, key in enumerate(keys(9)):
            if key not in cache:
                cache.add(key, row(number))
        assert not read_manifest(path).complete
    after = files(path)
    assert {name: after[name] for name in before if name.endswith(".h5")} == {
        name: content for name, content in before.items() if name.endswith(".h5")
    }
    assert [entry.rows for entry in read_manifest(path).shards] == [4, 2, 3]
    assert list(FeatureCache(path).keys()) == keys(9)
    assert verify(path) == []


def test_a_sealed_key_is_in_the_cache_and_skipped_by_add(tmp_path):
    path = write(tmp_path / "cache", 4)
    with open_writer(path) as cache:
        assert keys(1)[0] in cache and "other" not in cache
        cache.add(keys(1)[0], row(99))
        cache.add("other", row(4))
        assert "other" in cache
    np.testing.assert_array_equal(FeatureCache(path).read(keys(1))[0], row(0))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_killed_loop_that_is_run_again_ends_with_the_same_bytes(tmp_path):
    """Killed before every step that makes something durable; each child dies in its own process, forked from one."""
    expected = files(write(tmp_path / "complete"))
    crash, killed = 1, 0
    while True:
        path = tmp_path / f"killed-{crash}"
        pid = os.fork()
        if pid == 0:
            try:
                crash_before(crash)
                write(path)
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == 0:
            break
        assert code == -signal.SIGKILL
        killed += 1
        before = {file: changed for file, changed in times(path).items() if file.suffix == ".h5"}
        write(path)
        assert {file: times(path)[file] for file in before} == before
        assert files(path) == expected, f"killed before step {crash}"
        shutil.rmtree(path)
        crash += 2
    assert killed > 25


def crash_before(number):
    taken = 0

    def counted(call):
        def step(*arguments, **options):
            nonlocal taken
            taken += 1
            if taken == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return step

    for name in ("pwrite", "fsync", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))


def test_an_exception_in_the_block_does_not_complete_the_cache(tmp_path):
    path = tmp_path / "cache"
    with pytest.raises(KeyError), open_writer(path) as cache:
        for number, key in enumerate(keys(6)):
            cache.add(key, row(number))
        raise KeyError
    manifest = read_manifest(path)
    assert not manifest.complete and [entry.rows for entry in manifest.shards] == [4]
    assert [file.name for file in (path / "shards").iterdir()] == ["shard-000000.h5"]
    assert files(write(path)) == files(write(tmp_path / "other"))


@pytest.mark.parametrize(
    ("key", "features", "expected"),
    [
        ("x", np.zeros((4, 31), np.float32), r"features of 'x' have shape \(4, 31\), expected \(4, 32\)"),
        ("x", np.zeros((1, 4, 32), np.float32), r"have shape \(1, 4, 32\), expected \(4, 32\)"),
        ("x", np.zeros(SHAPE), "have dtype float64, expected float32, float16 or bfloat16"),
        ("x", torch.zeros(SHAPE, dtype=torch.int32), "have dtype int32, expected float32"),
        ("x", None, "have dtype object"),
        ("x", np.full(SHAPE, np.nan, np.float32), "'x' are not finite: they hold inf or NaN"),
        ("x", np.full(SHAPE, 3.4e38, np.float32), "'x' are not finite in bfloat16: the largest is 3.4e"),
        ("0/0.jpg", np.zeros(SHAPE, np.float32), "key '0/0.jpg' was added twice"),
        *((key, row(0), "is not valid; expected a relative path") for key in
          ("", ".", "..", "../a", "/a", "a//b", "./a", "a/../b", "a/", "a\0b", "\ud800", "a" * 70000, 7, b"a")),
    ],
    ids=lambda value: repr(value)[:20] if isinstance(value, (str, bytes, int)) else None,
)  # fmt: skip
def test_add_refuses_wrong_input_and_keeps_what_is_sealed(tmp_path, key, features, expected):
    path = tmp_path / "cache"
    with pytest.raises(UserError, match=expected), open_writer(path, "bfloat16") as cache:
        for number, good in enumerate(keys(5)):
            cache.add(good, row(number))
        cache.add(key, features)
    manifest = read_manifest(path)
    assert not manifest.complete and [entry.rows for entry in manifest.shards] == [4]


def test_a_refused_row_can_be_skipped_by_the_caller(tmp_path):
    with open_writer(tmp_path / "cache") as cache:
        cache.add("a", row(0))
        with pytest.raises(UserError):
            cache.add("b", row(1)[:2])
        cache.add("b", row(1))
    np.testing.assert_array_equal(FeatureCache(tmp_path / "cache").read(["b"])[0], row(1))


def test_float16_refuses_values_that_overflow(tmp_path):
    with (
        pytest.raises(UserError, match="not finite in float16: the largest is 70000"),
        open_writer(tmp_path / "cache", "float16") as cache,
    ):
        cache.add("a", np.full(SHAPE, 70000, np.float32))


@pytest.mark.parametrize("made", [False, True])
def test_a_cache_without_rows_is_an_error(tmp_path, made):
    if made:
        with pytest.raises(KeyError), open_writer(tmp_path / "cache"):
            raise KeyError
    with pytest.raises(UserError, match="holds no features"), open_writer(tmp_path / "cache"):
        pass
    assert not read_manifest(tmp_path / "cache").complete


@pytest.mark.parametrize("complete", [True, False])
def test_different_settings_are_refused_field_by_field(tmp_path, complete):
    path = tmp_path / "cache"
    write(path, 4)
    if not complete:
        with pytest.raises(KeyError), open_writer(path) as cache:
            cache.add("new", row(9))
            raise KeyError
    before = times(path)
    changed = {"tower": {"name": "my ViT", "revision": "9999"}, "select_layer": -1}
    with pytest.raises(UserError) as caught, open_writer(path, "float16", changed, shape=(4, 64)):
        pass
    for line in (
        "tower.revision: the cache has '3f2a', this run '9999'",
        "select_layer: the cache has '(absent)', this run -1",
        "shape: the cache has (4, 32), this run (4, 64)",
        "dtype: the cache has 'float32', this run 'float16'",
    ):
        assert line in str(caught.value)
    absent = r"tower\.name: the cache has 'my ViT', this run '\(absent\)'"
    with pytest.raises(UserError, match=absent), open_writer(path, fingerprint={}):
        pass
    assert times(path) == before


def test_other_channels_are_refused(tmp_path):
    write(tmp_path / "cache", 4, "int8")
    other = Channels(CHANNELS.mean + 1, CHANNELS.std)
    with pytest.raises(UserError, match=r"channels\.sha256"), open_writer(tmp_path / "cache", "int8", channels=other):
        pass


def test_a_second_writer_is_refused_until_the_first_ends(tmp_path):
    path = tmp_path / "cache"
    with open_writer(path) as cache:
        cache.add("a", row(0))
        with pytest.raises(UserError, match="another process is writing to"), open_writer(path):
            pass
        with pytest.raises(UserError, match="another process is writing to"), CacheSession(path):
            pass
    write(path, 4)


def test_a_folder_that_is_not_a_cache_is_left_unchanged(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious", encoding="utf-8")
    with pytest.raises(UserError, match="is not a feature cache; give a new or empty folder"), open_writer(tmp_path):
        pass
    assert files(tmp_path) == {"thesis.tex": b"precious"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dtype": "bf16"}, "dtype is 'bf16', expected one of bfloat16, float16"),
        ({"shape": (4,)}, "expected the tokens and the width"),
        ({"shape": (4, 0)}, "expected the tokens and the width"),
        ({"images_per_shard": 0}, "images_per_shard is 0, expected a positive integer"),
        ({"fingerprint": {"tower": object()}}, "fingerprint cannot be written as JSON"),
        ({"fingerprint": {"scale": float("nan")}}, "fingerprint cannot be written as JSON"),
        ({"fingerprint": ["a"]}, "fingerprint is a list, expected a dict"),
        ({"channels": CHANNELS}, "channels are for int8 and int4 only"),
        ({"dtype": "int8", "channels": None}, "int8 needs the mean and std of 32 channels"),
        ({"dtype": "int8", "channels": Channels(CHANNELS.mean, -CHANNELS.std)}, "every std positive"),
        ({"dtype": "int4", "shape": (4, 48)}, "int4"),
    ],
)
def test_arguments_are_checked_before_anything_is_written(tmp_path, options, expected):
    with pytest.raises(UserError, match=expected):
        open_writer(tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


def test_any_json_fingerprint_is_kept(tmp_path):
    fingerprint = {"a": [1, None, {"b": (2, 3)}], "é": 1.5}
    write(tmp_path / "cache", 4, fingerprint=fingerprint)
    assert FeatureCache(tmp_path / "cache").fingerprint == {"a": [1, None, {"b": [2, 3]}], "é": 1.5}


def test_sources_are_recorded_if_given_and_zero_otherwise(tmp_path):
    picture = tmp_path / "a.jpg"
    picture.write_bytes(b"picture")
    digest = hashlib.sha256(b"picture").digest()
    with open_writer(tmp_path / "cache") as cache:
        cache.add("path", row(0), source=picture)
        cache.add("text", row(1), source=str(picture))
        cache.add("bytes", row(2), source=b"picture")
        cache.add("pair", row(3), source=(7, digest))
        cache.add("none", row(4))
        for wrong in ((7, b"short"), (-1, digest), ("7", digest)):
            with pytest.raises(UserError, match="source of 'x' is"):
                cache.add("x", row(5), source=wrong)
        with pytest.raises(UserError, match="source of 'x' cannot be read"):
            cache.add("x", row(5), source=tmp_path / "gone.jpg")
    found = FeatureCache(tmp_path / "cache")
    assert found.column("source_size").tolist() == [7, 7, 7, 7, 0]
    assert [bytes(value) for value in found.column("source_sha256")] == [digest] * 4 + [bytes(32)]


def test_a_lost_shard_is_replaced_by_its_keys_in_a_new_shard(tmp_path, caplog):
    path = write(tmp_path / "cache")
    (path / "shards" / "shard-000001.h5").unlink()
    write(path)
    assert "shard-000001.h5 is missing" in caplog.text
    assert sorted(FeatureCache(path).keys()) == sorted(keys(10))
    assert [entry.file[6:12] for entry in read_manifest(path).shards] == ["000000", "000002", "000003"]


def test_shards_record_the_software_that_wrote_them(tmp_path, caplog):
    path = tmp_path / "cache"
    write(path, 4, provenance={"software": {"my framework": "1"}})
    with open_writer(path, provenance={"software": {"my framework": "2"}}) as cache:
        cache.add("new", row(9))
    assert "my framework 1 -> 2; new shards record the latter" in caplog.text
    recorded = [json.loads(attributes(path, number)["provenance"]) for number in (0, 1)]
    assert recorded == [{"my framework": "1"}, {"my framework": "2"}]
    assert verify(path) == []


def attributes(path, number):
    import h5py

    with h5py.File(path / "shards" / f"shard-{number:06d}.h5") as file:
        return dict(file.attrs)


def test_a_writer_outside_a_with_statement_is_refused(tmp_path):
    with pytest.raises(ValueError, match="with statement"):
        open_writer(tmp_path / "cache").add("a", row(0))


def test_a_full_disk_is_explained_and_the_loop_can_be_run_again(small_disk, tmp_path):
    disk = small_disk("size=160k")
    with pytest.raises(UserError, match="is full: free some space, then run the same program again"):
        write(disk / "cache", 200, images_per_shard=16)
    sealed = len(list(disk.glob("cache/shards/*.h5")))
    assert sealed and not read_manifest(disk / "cache").complete
    subprocess.run(["mount", "-o", "remount,size=3m", disk], check=True)
    write(disk / "cache", 200, images_per_shard=16)
    assert files(disk / "cache") == files(write(tmp_path / "other", 200, images_per_shard=16))


def test_importing_the_package_loads_neither_numpy_nor_torch():
    code = """
import sys
import llava_twophase as package
print({"CacheWriter", "FeatureCache", "load_records"} <= set(dir(package)), {"numpy", "torch"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], env=process_environment(), capture_output=True, text=True)
    assert done.stdout == "True set()\n"


def test_writer_refuses_a_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="then run: llava-inspect-cache push FOLDER s3://bucket/cache"):
        open_writer("s3://bucket/cache")
    assert list(tmp_path.iterdir()) == []
