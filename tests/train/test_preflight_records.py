"""Records with absolute image paths: training finds the keys that phase one gave them."""

import pytest

from llava_twophase.errors import UserError
from llava_twophase.train.preflight import prepare_inputs


def test_prepare_inputs_makes_absolute_image_paths_relative_to_the_image_folder(arguments_of, tmp_path):
    images = tmp_path / "images"
    inputs = prepare_inputs(arguments_of(lambda key: images / key, image_folder=images))
    assert [record.image for record in inputs.records] == arguments_of.keys


def test_prepare_inputs_asks_for_the_image_folder_of_absolute_paths(arguments_of, tmp_path):
    arguments = arguments_of(lambda key: tmp_path / "images" / key)
    with pytest.raises(UserError, match=r"is absolute: give --image_folder"):
        prepare_inputs(arguments)
