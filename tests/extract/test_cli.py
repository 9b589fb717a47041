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
        (["--batch_size", "0"], "--batch_size 0: expected a whole number of at least 1"),
        (
            ["--batchsize", "4", "--workers=2"],
            "--batchsize is not a flag; did you mean --batch_size?\n"
            "  --workers is not a flag; did you mean --num_workers?",
        ),
        (["--feature-cache", "c"], "--feature-cache is not a flag; did you mean --feature_cache?"),
        (
            ["--mm_vision_select_feature", "cls"],
            "--mm_vision_select_feature cls: expected one of patch, cls_patch",
        ),
        (["--json"], "--json needs --plan"),
        (["--llm", "13B"], "--llm needs --plan"),
        (["--plan", "--runs", "3"], "--runs needs --llm"),
        (["--num_workers", "-1"], "--num_workers -1: expected a whole number of at least 0"),
    ],
)
def test_main_exits_with_2_on_wrong_usage(capsys, image_set, tmp_path, flags, message):
    inputs = {
        "--data_path": image_set.json,
        "--image_folder": image_set.folder,
        "--vision_tower": "owner/tower",
        "--feature_cache": tmp_path / "cache",
    }
    assert main([*(str(part) for flag in inputs.items() for part in flag), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ")
    *_, usage = lines = error.splitlines()
    assert len(lines) <= 4 and usage.startswith("usage: llava-extract-features --data_path RECORDS")


def test_main_reports_wrong_flags_and_wrong_inputs_in_one_message(capsys, tmp_path):
    (tmp_path / "tower").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    inputs = {
        "--data_path": "/no.json",
        "--image_folder": "/no/images",
        "--vision_tower": tmp_path / "tower",
        "--feature_cache": tmp_path / "other",
    }
    flags = ["--batchsize", "4", "--num_workers", "-1", "--compute_dtype", "fp8", "--images_per_shard", "many"]
    flags += ["--mm_vision_select_layer", "last", "--json", "--device", "cuda:x"]
    assert main([*(str(part) for flag in inputs.items() for part in flag), *flags]) == 2
    error = capsys.readouterr().err
    for problem in (
        "--batchsize is not a flag; did you mean --batch_size?",
        "--num_workers -1: expected a whole number of at least 0",
        "--compute_dtype fp8: expected one of bf16, fp16, fp32",
        "--images_per_shard many: expected a whole number of at least 1",
        "--mm_vision_select_layer last: expected a whole number",
        "--json needs --plan",
        "--device cuda:x cannot be used",
        "--data_path /no.json does not exist",
        "--image_folder /no/images does not exist; expected a folder, or",
        f"--vision_tower {tmp_path}/tower has no image processor",
        f"{tmp_path}/other exists and is not a feature cache",
    ):
        assert problem in error
    assert "error: 11 problems were found" in error and error.count("usage:") == 1


def test_main_reports_wrong_inputs_together_and_exits_with_1(capsys, image_set, tmp_path):
    (tmp_path / "file").touch()
    inputs = {"--data_path": image_set.json, "--image_folder": tmp_path, "--vision_tower": "./tower"}
    flags = ["--feature_cache", str(tmp_path / "file" / "cache"), "--storage_dtype", "fp16"]
    assert main([*(str(part) for flag in inputs.items() for part in flag), *flags]) == 1
    error = capsys.readouterr().err
    assert "4 problems were found" in error and "usage:" not in error
    assert "cannot hold bf16 features exactly" in error and "--vision_tower ./tower: there is no such folder" in error
    assert "cannot be written" in error and f"images is in --image_folder {tmp_path}" in error


def test_main_refuses_to_write_to_a_url(capsys, image_set, tiny_clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inputs = {"--data_path": image_set.json, "--image_folder": image_set.folder, "--vision_tower": tiny_clip}
    assert main([*(str(part) for flag in inputs.items() for part in flag), "--feature_cache", "s3://bucket/cache"]) == 1
    assert "then run: llava-inspect-cache push FOLDER s3://bucket/cache" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


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
