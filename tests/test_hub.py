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


def test_download_advice_is_for_names_that_are_not_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    advice = download_advice("llms/vicuna")
    assert (
        f"there is no folder llms/vicuna in {tmp_path}; a relative path, also one that the config.json of a run has"
        in advice
    )
    assert advice.endswith("if it is a hub id, download it: hf download llms/vicuna")
    assert download_advice(str(tmp_path)) == ""
