"""``caption`` as a process: images, folders, archives and records to text, JSON and a page."""

import json
import shutil
import zipfile

import pytest

from commands import use_command
from helpers import run
from llava_twophase.deploy import inputs
from llava_twophase.deploy.caption import CaptionOptions, caption
from llava_twophase.deploy.captioner import Placement
from llava_twophase.deploy.trained_projector import find_projector
from llava_twophase.errors import UserError


def test_caption_prints_a_line_per_image_and_a_page(trained, tmp_path):
    folder = tmp_path / "holiday"
    folder.mkdir()
    for key in trained.keys[:3]:
        shutil.copy(trained.images / key, folder)
    page = tmp_path / "captions.html"
    done = run(["python", *use_command("caption", trained.run, folder, html=page)])
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [name for name, _ in lines] == sorted(str(path) for path in folder.iterdir())
    text = page.read_text(encoding="utf-8")
    assert text.count('src="data:image/') == 3 and "http" not in text.split("</head>")[1]


def test_caption_reports_unusable_images_and_captions_the_others(trained, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"\xff\xd8\xff")
    good = trained.images / trained.keys[0]
    done = run(["python", *use_command("caption", trained.run, bad, good, "--json")], expect=1)
    first, second = map(json.loads, done.stdout.splitlines())
    assert "error" in first and "caption" not in first
    assert second == {"image": str(good), "caption": second["caption"]}


def test_caption_of_records_from_the_cache_needs_no_images(trained):
    command = use_command("caption", trained.run, trained.records, "--json", feature_cache=trained.cache)
    lines = [json.loads(line) for line in run(["python", *command]).stdout.splitlines()]
    assert [line["image"] for line in lines] == trained.keys and all("caption" in line for line in lines)


def test_caption_of_records_without_images_is_one_error(trained):
    options = {"batch_size": 4, "html": None, "json": False}
    projector = find_projector(trained.run)
    with pytest.raises(UserError, match="12 of 12 images not found; images of records need --image_folder"):
        caption(projector, [str(trained.records)], Placement(), CaptionOptions(None, None, **options))


def test_list_images_reads_archives(trained, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(trained.images / trained.keys[0], "in/one.png")
        archive.writestr("notes.txt", "no image")
    (image,) = inputs.list_images([str(tmp_path / "a.zip")])
    assert image.name.endswith("a.zip/in/one.png")
    assert image.read() == (trained.images / trained.keys[0]).read_bytes()


def test_list_images_refuses_a_folder_without_images(tmp_path):
    with pytest.raises(UserError, match="has no images"):
        inputs.list_images([str(tmp_path)])


def test_caption_reports_missing_images_before_the_llm_loads(trained, tmp_path):
    command = use_command("caption", trained.run, tmp_path / "a.jpg", trained.keys[0], feature_cache=trained.cache)
    done = run(["python", *command], expect=1)
    assert "1 of 2 images not found, neither as a file nor in" in done.stderr and done.stdout == ""
    assert "Loading weights" not in done.stderr and "--image_folder" not in done.stderr
