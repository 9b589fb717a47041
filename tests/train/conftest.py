"""Fixtures of the training tests."""

import pytest

from commands import extract_command, train_command
from helpers import run


@pytest.fixture(scope="session")
def plain_cache(plain_set, tiny_clip, tmp_path_factory):
    """A cache of the plain scenes from a float32 tower, made by command 1."""
    folder = tmp_path_factory.mktemp("plain_cache") / "cache"
    images = {"data_path": plain_set.json, "image_folder": plain_set.folder}
    run(["python", *extract_command(**images, vision_tower=tiny_clip, feature_cache=folder)])
    return folder


@pytest.fixture
def train_in_process(plain_set, tiny_llama, tiny_clip, plain_cache, tmp_path, monkeypatch, caplog):
    """Run the training command in this process; returns its exit code and whether it loaded the LLM.

    The run's folder is `train_in_process.folder / name`. A checkpoint is written after every second step.
    """
    from llava_twophase.train import run as run_module
    from llava_twophase.train.cli import main

    load_llm, loads = run_module.load_llm, []
    monkeypatch.setattr(run_module, "load_llm", lambda arguments: loads.append(1) or load_llm(arguments))

    def start(name="out", **changes):
        loads.clear()
        flags = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 2, **changes}
        command = train_command(
            data_path=plain_set.json,
            model_name_or_path=tiny_llama,
            vision_tower=tiny_clip,
            output_dir=tmp_path / name,
            **{"feature_cache": plain_cache, **flags},
        )
        with caplog.at_level("INFO"):
            return main(command[1:]), bool(loads)

    start.folder = tmp_path
    return start
