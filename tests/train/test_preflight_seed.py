"""The projector's initial weights depend on the seed alone."""

import pytest
import torch

from commands import flag_list
from llava_twophase.train.command_line import parse_arguments
from llava_twophase.train.preflight import prepare_inputs


@pytest.fixture
def initial_weights(plain_set, plain_cache, tiny_llama, tiny_clip, tmp_path):
    """The projector's first weights, of a run from the cache or on the fly."""

    def prepare(**source):
        flags = {
            "model_name_or_path": tiny_llama,
            "data_path": plain_set.json,
            "vision_tower": tiny_clip,
            "tune_mm_mlp_adapter": True,
            "output_dir": tmp_path / "out",
            "report_to": "none",
            "use_cpu": True,
            **source,
        }
        return prepare_inputs(parse_arguments(flag_list(flags))).projector.state_dict()

    return lambda: prepare(feature_cache=plain_cache), lambda: prepare(image_folder=plain_set.folder)


def test_prepare_inputs_draws_the_same_weights_whatever_was_loaded_before(initial_weights):
    cached, on_the_fly = initial_weights
    expected = cached()
    torch.rand(5)
    for weights in (cached(), on_the_fly()):
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
