"""The extraction command's arguments and the settings that are made from them."""

from pathlib import Path

import pytest

from llava_twophase.errors import UserError
from llava_twophase.extract.cli import build_parser, choose_storage_dtype, main, make_config
from llava_twophase.extract.config import ExtractConfig

REQUIRED = ["--data_path", "r.json", "--image_folder", "i", "--vision_tower", "t", "--feature_cache", "c"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_size", "0"], "not positive"),
        (
            ["--batchsize", "4", "--workers=2"],
            "--batchsize is not a flag; did you mean --batch_size?\n  --workers is not",
        ),
        (["--feature-cache", "c"], "--feature-cache is not a flag; did you mean --feature_cache?"),
        (["--mm_vision_select_feature", "cls"], "invalid choice"),
        (["--json"], "--json needs --plan"),
        (["--llm", "13B"], "--llm needs --plan"),
        (["--plan", "--runs", "3"], "--runs needs --llm"),
        (["--num_workers", "-1"], "negative"),
    ],
)
def test_main_exits_with_2_on_wrong_usage(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        main([*REQUIRED, *flags])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 3 and error.startswith("usage: llava-extract-features --data_path RECORDS")


def test_make_config_uses_the_defaults_of_the_parser():
    config = make_config(build_parser().parse_args(REQUIRED))
    expected = ExtractConfig("r.json", "i", "t", Path("c"), num_workers=config.num_workers)
    assert config == expected
    assert 1 <= config.num_workers <= 8


@pytest.mark.parametrize(
    ("compute", "storage", "expected"),
    [
        ("bf16", "auto", "bfloat16"),
        ("fp16", "fp16", "float16"),
        ("bf16", "fp32", "float32"),
        ("fp32", "int8", "int8"),
        ("fp16", "int4", "int4"),
    ],
)
def test_choose_storage_dtype_never_rounds_without_scales(compute, storage, expected):
    assert choose_storage_dtype(compute, storage) == expected


@pytest.mark.parametrize(("compute", "storage"), [("fp32", "bf16"), ("fp16", "bf16"), ("bf16", "fp16")])
def test_choose_storage_dtype_refuses_to_round(compute, storage):
    with pytest.raises(UserError, match=f"--storage_dtype {storage} cannot hold {compute} features exactly"):
        choose_storage_dtype(compute, storage)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_main_explains_out_of_memory(monkeypatch, capsys, image_set, tmp_path, error):
    def run(config, records, ranks):
        raise error

    monkeypatch.setattr("llava_twophase.extract.run.run", run)
    flags = {"--data_path": image_set.json, "--image_folder": image_set.folder, "--feature_cache": tmp_path / "c"}
    assert main([str(part) for flag in flags.items() for part in flag] + ["--vision_tower", "t"]) == 1
    assert "error: out of memory (" in (said := capsys.readouterr().err) and "lower --num_workers" in said
