"""Records with absolute image paths: training finds the keys that phase one gave them."""

import pytest

from cache.make import make_cache
from commands import flag_list
from drawn import make_record, write_records
from llava_twophase.errors import UserError
from llava_twophase.train.command_line import parse_arguments
from llava_twophase.train.preflight import prepare_inputs


@pytest.fixture
def check(tiny_llama, tmp_path):
    """Checks a run on a cache whose records have absolute image paths."""
    cache, keys, _ = make_cache(tmp_path / "cache")
    images = tmp_path / "images"
    records = write_records([make_record(key, str(images / key), "a red circle") for key in keys], tmp_path / "r.json")
    flags = {
        "model_name_or_path": tiny_llama,
        "data_path": records,
        "vision_tower": "my/tower",
        "feature_cache": cache,
        "tune_mm_mlp_adapter": True,
        "output_dir": tmp_path / "out",
        "report_to": "none",
        "use_cpu": True,
    }
    return keys, images, lambda **changes: prepare_inputs(parse_arguments(flag_list(flags | changes)))


def test_check_inputs_makes_absolute_image_paths_relative_to_the_image_folder(check):
    keys, images, prepare_inputs = check
    assert [record.image for record in prepare_inputs(image_folder=images).records] == keys


def test_check_inputs_asks_for_the_image_folder_of_absolute_paths(check):
    with pytest.raises(UserError, match=r"is absolute: give --image_folder"):
        check[2]()
