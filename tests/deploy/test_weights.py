"""Tensors of model folders, streamed and written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_twophase.deploy.weights import SafetensorsWriter, model_folder, stream_tensors, tensor_names, weight_files
from llava_twophase.errors import UserError


def write_pieces(folder, suffix):
    tensors = {f"t{i}": torch.full((3, 2), float(i)) for i in range(4)}
    name = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    weight_map = {}
    for piece in range(2):
        part = {key: tensors[key] for key in list(tensors)[2 * piece : 2 * piece + 2]}
        file = f"piece-{piece}.{suffix}"
        (save_file if suffix == "safetensors" else torch.save)(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return tensors


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_stream_tensors_reads_pieces(suffix, tmp_path):
    tensors = write_pieces(tmp_path, suffix)
    found = dict(stream_tensors(tmp_path))
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_weight_files_reports_a_missing_piece(tmp_path):
    write_pieces(tmp_path, "safetensors")
    (tmp_path / "piece-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"lists piece-1\.safetensors, which is missing"):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["llms/vicuna", "models/llms/vicuna"])
def test_model_folder_says_what_a_path_is_relative_to(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"--model_name_or_path {name}: (?s:.*)no folder {name} in {tmp_path}"):
        model_folder(name, "--model_name_or_path")


def test_weight_files_refuses_a_folder_without_weights(tmp_path):
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        weight_files(tmp_path)


def test_writer_splits_files_and_lists_all_tensors(tmp_path):
    writer = SafetensorsWriter(tmp_path, piece_bytes=100)
    tensors = {f"t{i}": torch.arange(10.0) + i for i in range(5)}  # 40 bytes each
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert index["metadata"]["total_size"] == 200
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


def test_stream_tensors_reads_the_format_of_torch_before_1_6(tmp_path):
    tensors = {f"t{i}": torch.full((3, 2), float(i)) for i in range(3)}
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    found = dict(stream_tensors(tmp_path))
    assert tensor_names(tmp_path) == list(tensors) == list(found)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("size", [0, 40, 300])
def test_stream_tensors_reports_a_truncated_file(suffix, size, tmp_path):
    write_pieces(tmp_path, suffix)
    path = tmp_path / f"piece-0.{suffix}"
    path.write_bytes(path.read_bytes()[:size] if size < path.stat().st_size else b"x" * size)
    with pytest.raises(UserError, match=rf"piece-0\.{suffix} cannot be read as weights: .*; download the model again"):
        list(stream_tensors(tmp_path))
