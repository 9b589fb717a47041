"""llava-inspect-cache as a user runs it: a process, its exit code, its output, and its picture."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from cache.make import FINGERPRINT, STORAGES, fingerprint_of, make_cache, make_shard, rows, write
from helpers import ROOT, process_environment, run
from llava_twophase.cache.format import SHARDS
from llava_twophase.cache.shard_writer import sha256
from llava_twophase.errors import UserError
from llava_twophase.inspection import pictures
from llava_twophase.inspection.cli import SUBCOMMANDS

SCRIPT = "pipelines/inspect_cache.py"
SHARD = "shards/shard-000000.h5"


def inspect(*arguments, **options):
    return run(["python", SCRIPT, *arguments], **options)


@pytest.fixture
def cache(tmp_path):
    return make_cache(tmp_path / "cache")[0]


@pytest.fixture
def damaged(cache):
    """A cache with one flipped bit in a row and a shard that is missing."""
    with (cache / SHARD).open("r+b") as file:
        file.seek(-3000, os.SEEK_END)
        file.write(b"\xab")
    (cache / SHARDS / "shard-000001.h5").unlink()
    return cache


def photo(path, size=(80, 40)):
    """A picture whose left half is red and whose right half is blue."""
    width, height = size
    picture = Image.new("RGB", size, (220, 30, 30))
    picture.paste((30, 30, 220), (width // 2, 0, width, height))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path


@pytest.mark.parametrize("subcommand", [[], *([name] for name in SUBCOMMANDS)], ids=str)
def test_help_ends_with_an_example(subcommand):
    lines = inspect(*subcommand, "--help").stdout.splitlines()
    assert lines[-2] == "example:" and lines[-1].startswith("  llava-inspect-cache ")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["summary"],
        ["summary", "c", "--no-such-flag"],
        ["show", "c", "k"],
        ["verify", "c", "extra"],
        ["show", "c", "k", "-o", "o", "--image_folder", "i", "--patch", "3"],
        ["export", "c", "k", "-o", "k.txt"],
        ["stats", "c", "--n", "0"],
        ["stats", "c", "--plot", "p.txt"],
        ["report", "c"],
        ["compare", "c"],
        ["coverage", "c"],
    ],
    ids=str,
)
def test_wrong_usage_exits_with_2(arguments):
    result = inspect(*arguments, expect=2)
    assert result.stdout == "" and "usage: llava-inspect-cache" in result.stderr


@pytest.mark.parametrize("size", ["0", "1.5", "many", "100000"])
def test_a_size_that_makes_no_picture_is_wrong_usage(size):
    assert "--size" in inspect("show", "c", "k", "-o", "o", "--image_folder", "i", "--size", size, expect=2).stderr


@pytest.mark.parametrize("subcommand", ["summary", "verify"])
def test_what_is_no_cache_is_one_error(subcommand, tmp_path):
    result = inspect(subcommand, tmp_path / "nothing", expect=1)
    assert result.stdout == "" and result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1


def test_inspection_loads_no_torch(cache):
    code = (
        "import sys\n"
        "from llava_twophase.inspection.cli import main\n"
        "codes = [main([command, sys.argv[1]]) for command in ('summary', 'verify', 'repair', 'stats')]\n"
        "print(codes, sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))\n"
    )
    assert run(["python", "-c", code, cache]).stdout.splitlines()[-1] == "[0, 0, 0, 0] []"


@pytest.mark.parametrize("dtype", STORAGES)
def test_summary_as_json(dtype, tmp_path):
    cache, _, stored = make_cache(tmp_path / "cache", dtype=dtype)
    result = inspect("summary", cache, "--json")
    values = json.loads(result.stdout)
    assert len(result.stdout.splitlines()) == 1
    expected = {
        "schema": 1,
        "complete": True,
        "images": 8,
        "shards": 2,
        "bytes": sum(path.stat().st_size for path in (cache / SHARDS).iterdir()),
        "bytes_per_image": stored[0].nbytes,
        "storage_dtype": dtype,
        "tokens": 9,
        "width": 32,
        "quarantined": 0,
        "fingerprint": fingerprint_of(dtype),
    }
    assert {name: values[name] for name in expected} == expected
    assert values["made_by"].startswith("A CLIP tower of 4 layers saw the centre square")
    assert values["of_bfloat16"] == pytest.approx(stored[0].nbytes / (2 * 9 * 32), abs=1e-4)


@pytest.mark.parametrize(("created", "text"), [("2020-01-01T00:00:00+00:00", " days"), ("never", "less than a minute")])
def test_summary_says_how_old_it_is(created, text, cache):
    manifest = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))
    manifest["provenance"]["created"] = created
    (cache / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (line,) = [line for line in inspect("summary", cache).stdout.splitlines() if line.startswith("  age ")]
    assert line.endswith(text)


def test_summary_says_what_a_codec_saves(tmp_path):
    cache, _, _ = make_cache(tmp_path / "cache", dtype="int8")
    assert "int8 with scales, 53% of bfloat16's size" in inspect("summary", cache).stdout


def test_summary_for_people(cache):
    text = inspect("summary", cache).stdout
    for part in ("without the CLS token", "9 tokens x 32, bfloat16", "the tower's values bit for bit", "fingerprint"):
        assert part in text
    assert all(line == line.rstrip() for line in text.splitlines())
    assert "\x1b" not in text


def test_summary_counts_the_quarantine(cache):
    line = json.dumps({"key": "x.jpg", "reason": "empty", "source_size": 0, "source_sha256": None})
    (cache / "quarantine.jsonl").write_text(f"{line}\n", encoding="utf-8")
    assert json.loads(inspect("summary", cache, "--json").stdout)["quarantined"] == 1


def test_summary_of_an_incomplete_cache_says_so(tmp_path):
    cache, _, _ = make_cache(tmp_path / "cache", complete=False)
    assert "INCOMPLETE" in inspect("summary", cache).stdout
    assert json.loads(inspect("summary", cache, "--json").stdout)["complete"] is False


def test_verify_of_a_good_cache_is_one_line(cache):
    result = inspect("verify", cache)
    assert result.stdout == f"{cache}: 8 images in 2 shards, every bit as it was written\n"
    assert result.stderr == ""
    assert json.loads(inspect("verify", cache, "--json").stdout) == {"path": str(cache), "ok": True, "problems": []}


def test_verify_names_every_problem(damaged):
    result = inspect("verify", damaged, expect=1)
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("shards/shard-000001.h5: it is missing; ")
    assert lines[1].startswith("shards/shard-000000.h5: ")
    assert lines[2] == f"{damaged}: 2 problems found"
    values = json.loads(inspect("verify", damaged, "--json", expect=1).stdout)
    assert values["ok"] is False
    assert [problem["file"] for problem in values["problems"]] == ["shards/shard-000001.h5", "shards/shard-000000.h5"]


def test_a_note_is_no_problem(cache):
    (cache / SHARDS / "shard-000002.h5.0a1b2c3d.tmp").touch()
    lines = inspect("verify", cache).stdout.splitlines()
    assert lines[0].startswith("note: shards/shard-000002.h5.0a1b2c3d.tmp: ") and "every bit" in lines[1]
    assert json.loads(inspect("verify", cache, "--json").stdout)["ok"] is True


def test_summary_of_a_damaged_cache_is_one_error(damaged):
    result = inspect("summary", damaged, expect=1)
    assert result.stdout == "" and result.stderr.startswith("error: ") and "shard-000001.h5" in result.stderr


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
        {"COLUMNS": "20"},
        {"COLUMNS": None, "TERM": "dumb", "NO_COLOR": "1"},
    ],
    ids=["ascii", "narrow", "dumb"],
)
def test_output_survives_its_surroundings(environment, tmp_path):
    cache = tmp_path / "cache"
    (cache / SHARDS).mkdir(parents=True)
    made = {**FINGERPRINT, "note": "größer → 大"}
    entry = make_shard(cache / SHARD, ["größer/大.jpg", "b.jpg"], rows(2), fingerprint=made)
    write(cache, [entry], fingerprint=made)
    text = "".join(inspect("summary", cache, **environment).stdout.split())
    assert ("gr\\xf6\\xdfer\\u2192\\u5927" if "LC_ALL" in environment else "größer→大") in text
    assert json.loads(inspect("summary", cache, "--json", **environment).stdout)["fingerprint"] == made
    with (cache / SHARD).open("r+b") as file:
        file.seek(-2500, os.SEEK_END)
        file.write(b"\xab\xcd")
    assert "1 problem found" in inspect("verify", cache, expect=1, **environment).stdout


def test_a_hostile_key_cannot_talk_to_the_terminal(tmp_path):
    cache = tmp_path / "cache"
    (cache / SHARDS).mkdir(parents=True)
    write(cache, [make_shard(cache / SHARD, ["a.jpg", "../\x1b[31mred [bold]x[/bold].jpg"], rows(2))])
    text = inspect("verify", cache, expect=1).stdout
    assert "\x1b" not in text and "[31mred [bold]x[/bold].jpg" in text


def test_a_closed_pipe_is_no_traceback(cache):
    command = [sys.executable, SCRIPT, "summary", str(cache)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=process_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait()


@pytest.fixture
def shown(tmp_path):
    """A cache over one real picture, and the picture's folder."""
    folder = tmp_path / "images"
    data = photo(folder / "00" / "a b.png").read_bytes()
    (folder / "00" / "gone.png").write_bytes(b"")
    cache = tmp_path / "cache"
    (cache / SHARDS).mkdir(parents=True)
    from cache import make

    writer = make.ShardWriter(
        cache / SHARD,
        ["00/a b.png", "00/gone.png"],
        make.ShardSpec(make.SHAPE, "bfloat16", fingerprint_of("bfloat16"), {}),
    )
    writer.append(rows(2), [(len(data), sha256(data)), (0, sha256(b""))])
    write(cache, [writer.seal()])
    return cache, folder


def test_show_draws_a_picture(shown, tmp_path):
    cache, folder = shown
    output = tmp_path / "out.png"
    result = inspect("show", cache, "00/a b.png", "-o", output, "--image_folder", folder, "--size", "90")
    assert result.stdout == f"wrote {output}: 00/a b.png\n" and result.stderr == ""
    with Image.open(output) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        assert picture.width == 3 * 90 + 4 * 12
        # The crop is the centre square: half red, half blue.
        assert picture.getpixel((12 + 20, 12 + 45)) == (220, 30, 30)
        assert picture.getpixel((12 + 70, 12 + 45)) == (30, 30, 220)


def test_show_warns_of_a_picture_that_changed(shown, tmp_path):
    cache, folder = shown
    photo(folder / "00" / "a b.png", (60, 40))
    result = inspect("show", cache, "00/a b.png", "-o", tmp_path / "o.png", "--image_folder", folder)
    assert "warning: 00/a b.png is not the file that the features were made from" in result.stderr


@pytest.mark.parametrize(
    ("key", "output", "message"),
    [
        ("x/a b.png", "o.png", r"perhaps '00/a b.png'"),
        ("nothing.png", "o.png", "such as '00/a b.png'"),
        ("00/gone.png", "o.png", "the file is empty"),
        ("00/a b.png", "no/such/folder/o.png", "cannot be written"),
    ],
)
def test_show_says_what_is_wrong(key, output, message, shown, tmp_path):
    cache, folder = shown
    result = inspect("show", cache, key, "-o", tmp_path / output, "--image_folder", folder, expect=1)
    assert result.stderr.startswith("error: ") and message in result.stderr


def test_show_without_the_images(shown, tmp_path):
    shutil.rmtree(shown[1])
    result = inspect("show", shown[0], "00/a b.png", "-o", tmp_path / "o.png", "--image_folder", shown[1], expect=1)
    assert result.stderr.startswith("error: ") and "--image_folder" in result.stderr


@pytest.mark.parametrize(
    ("tokens", "select_feature", "side"), [(9, "patch", 3), (10, "cls_patch", 3), (9, "cls_patch", 3)]
)
def test_the_grid_leaves_out_the_cls_token(tokens, select_feature, side):
    features = np.arange(tokens * 2, dtype=np.float32).reshape(tokens, 2)
    grid = pictures.patch_grid(features, select_feature)
    assert grid.shape == (side, side, 2)
    np.testing.assert_array_equal(grid.reshape(-1, 2), features[tokens - side * side :])


def test_tokens_that_form_no_square_are_refused():
    with pytest.raises(UserError, match="10 tokens form no square"):
        pictures.patch_grid(np.zeros((10, 2), np.float32), "patch")


def test_equal_patches_get_equal_colours_and_others_do_not():
    features = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    grid = features[np.arange(16).reshape(4, 4) % 4]
    colours = pictures.pca_colours(grid)
    assert len({tuple(colours[0, column]) for column in range(4)}) == 4
    assert all((colours[row] == colours[0]).all() for row in range(4))


@pytest.mark.parametrize("width", [1, 2, 5])
def test_constant_and_narrow_features_are_drawn(width):
    grid = np.ones((3, 3, width), np.float32)
    assert pictures.pca_colours(grid).shape == (3, 3, 3)
    assert (pictures.norm_colours(np.linalg.norm(grid, axis=-1)) == (0, 32, 77)).all()


def test_norms_go_from_dark_to_bright():
    colours = pictures.norm_colours(np.arange(9, dtype=np.float32).reshape(3, 3)).astype(int).sum(axis=-1).ravel()
    assert (np.diff(colours) > 0).all()


def test_a_picture_is_padded_as_the_tower_saw_it():
    picture = Image.new("RGB", (80, 40), (220, 30, 30))
    padded = pictures.crop(picture, {**FINGERPRINT, "image_aspect_ratio": "pad"}, 64)
    assert padded.getpixel((32, 4)) == padded.getpixel((32, 60)) == (127, 127, 127)
    assert padded.getpixel((2, 32)) == (220, 30, 30)


def test_a_smaller_crop_leaves_out_the_border():
    picture = Image.new("RGB", (100, 100), "white")
    picture.paste("red", (25, 25, 75, 75))
    made = {"processor": {"size": {"shortest_edge": 60}, "crop_size": {"height": 30, "width": 30}}}
    assert pictures.crop(picture, made, 50).getpixel((3, 3)) == (255, 0, 0)
    assert pictures.crop(picture, {}, 50).getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 3)])
@pytest.mark.parametrize("ratio", ["square", "pad"])
def test_odd_pictures_are_drawn(size, ratio):
    picture = Image.new("RGB", size, "red")
    assert pictures.crop(picture, {**FINGERPRINT, "image_aspect_ratio": ratio}, 48).size == (48, 48)


def test_features_that_are_not_finite_are_not_drawn():
    with pytest.raises(UserError, match="not finite"):
        pictures.draw_maps(np.full((1, 9, 4), np.nan, np.float32), {})


def test_several_images_share_one_basis_and_one_scale():
    features = np.random.default_rng(0).standard_normal((2, 16, 8)).astype(np.float32)
    features[1, :8] = features[0, :8]
    maps = pictures.draw_maps(features, {})
    np.testing.assert_array_equal(maps.pca[0].reshape(16, 3)[:8], maps.pca[1].reshape(16, 3)[:8])
    np.testing.assert_array_equal(maps.norms[0].reshape(16, 3)[:8], maps.norms[1].reshape(16, 3)[:8])


def test_similarity_is_largest_at_the_chosen_patch():
    features = np.random.default_rng(0).standard_normal((2, 16, 8)).astype(np.float32)
    maps = pictures.draw_maps(features, {}, (2, 1))
    brightness = maps.similarity.astype(int).sum(-1)
    assert brightness[0, 2, 1] == brightness.max() == sum((255, 234, 70))
    assert -1 <= maps.similarity_range[0] < maps.similarity_range[1] < 1


@pytest.mark.parametrize("patch", [(4, 0), (0, 4), (-1, 0)])
def test_a_patch_outside_the_grid_is_refused(patch):
    with pytest.raises(UserError, match="outside the grid of 4 x 4"):
        pictures.draw_maps(np.ones((1, 16, 8), np.float32), {}, patch)


def test_show_draws_several_images_and_a_patch(original, tmp_path):
    output = tmp_path / "out.png"
    flags = ["-o", output, "--image_folder", original.images, "--size", "90", "--patch", "1,2"]
    inspect("show", original.cache, *original.keys[:3], *flags)
    with Image.open(output) as picture:
        assert picture.size == (4 * (90 + 12) + 12, 3 * (90 + 22 + 12) + 12)
