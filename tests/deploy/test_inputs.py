"""Images for captions: which ones a path gives."""

from drawn import make_record, write_records
from llava_twophase.deploy.inputs import list_images


def test_list_images_lists_an_archive_that_does_not_exist_as_missing(tmp_path):
    (image,) = list_images([str(tmp_path / "nope.zip")])
    assert image.name == str(tmp_path / "nope.zip") and not image.exists


def test_list_images_makes_absolute_image_paths_relative_to_the_image_folder(image_set, tmp_path):
    key = image_set.keys[0]
    data = write_records([make_record("1", str(image_set.folder / key), "x")], tmp_path / "records.json")
    (image,) = list_images([str(data)], str(image_set.folder))
    assert image.name == key
