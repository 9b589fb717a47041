"""An unreachable hub is asked once."""

import pytest
from huggingface_hub import constants
from transformers import AutoConfig

from llava_twophase.hub import download_advice, use_cache_if_unreachable


@pytest.fixture
def unreachable(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there


def test_unreachable_hub_is_reported_once_and_not_asked_again(unreachable, caplog):
    use_cache_if_unreachable(["owner/name"])
    use_cache_if_unreachable(["owner/other"])
    (record,) = caplog.records
    assert "http://127.0.0.1:9 cannot be reached" in record.getMessage()
    caplog.clear()
    with pytest.raises(OSError):
        AutoConfig.from_pretrained("owner/name")
    assert not [record for record in caplog.records if "Retrying" in record.getMessage()]


def test_hub_is_not_asked_for_local_folders(unreachable, tmp_path, caplog):
    use_cache_if_unreachable([str(tmp_path)])
    assert not caplog.records and not constants.HF_HUB_OFFLINE


def test_download_advice_is_for_names_on_the_hub_only(tmp_path):
    assert download_advice("owner/name").endswith("hf download owner/name")
    assert download_advice(str(tmp_path)) == ""
