"""Fixtures of the training tests."""

import pytest

from cache.make import make_cache
from commands import extract_command, train_command
from drawn import make_record, write_records
from helpers import run


@pytest.fixture(scope="session")
def plain_cache(plain_set, tiny_clip, tmp_path_factory):
    """A cache of the plain scenes from a float32 tower, made by command 1."""
    folder = tmp_path_factory.mktemp("plain_cache") / "cache"
    images = {"data_path": plain_set.json, "image_folder": plain_set.folder}
    run(["python", *extract_command(**images, vision_tower=tiny_clip, feature_cache=folder)])
    return folder


@pytest.fixture
def arguments_of(tiny_llama, tmp_path):
    """Return the parsed arguments of a run from a small cache, and the cache's keys.

    `image_of` gives the image path of each record by its key.
    """
    from llava_twophase.train.command_line import parse_arguments

    cache, keys, _ = make_cache(tmp_path / "cache")

    def parse(image_of=str, **changes):
        records = [make_record(key, str(image_of(key)), "a red circle") for key in keys]
        command = train_command(
            data_path=write_records(records, tmp_path / "records.json"),
            vision_tower="my/tower",
            output_dir=tmp_path / "out",
            **{"model_name_or_path": tiny_llama, "feature_cache": cache, **changes},
        )
        return parse_arguments(command[1:])

    parse.keys = keys
    return parse


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
            model_name_or_path=tiny_llama,
            output_dir=tmp_path / name,
            **{"data_path": plain_set.json, "vision_tower": tiny_clip, "feature_cache": plain_cache, **flags},
        )
        with caplog.at_level("INFO"):
            return main(command[1:]), bool(loads)

    start.folder = tmp_path
    return start
