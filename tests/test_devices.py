"""The device of ``--device``."""

import pytest
import torch

from llava_twophase.devices import choose_device
from llava_twophase.errors import UserError


def test_choose_device_auto_is_a_gpu_or_the_cpu():
    assert choose_device("auto", local_rank=0).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["nonsense", "cuda:99"])
def test_choose_device_refuses_a_device_that_does_not_work(name):
    with pytest.raises(UserError, match=f"--device {name} cannot be used: ") as caught:
        choose_device(name)
    assert "\n" not in str(caught.value)
