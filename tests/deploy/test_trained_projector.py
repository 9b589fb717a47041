"""Which projector, models and settings a user's RUN means."""

import json
import shutil

import pytest
import torch

from llava_twophase.deploy.trained_projector import find_projector
from llava_twophase.errors import UserError
from llava_twophase.train.model.projector import read_projector


def test_find_projector_reads_the_settings_of_an_output_dir(trained):
    projector = find_projector(trained.run)
    assert projector.path == trained.run / "mm_projector.bin"
    assert (projector.llm, projector.vision_towers) == (str(trained.llm), (str(trained.tower),))
    assert (projector.projector_type, projector.select_layer, projector.select_feature) == ("mlp2x_gelu", -2, "patch")
    assert (projector.llm_dtype, projector.tower_dtypes) == ("float32", ("float32",))


def test_find_projector_prefers_given_models(trained):
    assert find_projector(trained.run, llm="other/llm", select_layer=-1).llm == "other/llm"
    assert find_projector(trained.run, select_layer=-1).select_layer == -1


def test_find_projector_of_a_bare_file_needs_the_models(trained, tmp_path):
    bare = shutil.copy(trained.run / "mm_projector.bin", tmp_path / "mm_projector.bin")
    with pytest.raises(UserError, match="there is no .*config.json .*; give --model_name_or_path and --vision_tower"):
        find_projector(bare)
    projector = find_projector(bare, llm="a", vision_tower="b")
    assert (projector.projector_type, projector.select_layer, projector.llm_dtype) == ("mlp2x_gelu", -2, None)


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp3x_gelu"])
def test_find_projector_infers_the_type_from_the_weights(kind, tmp_path):
    layers = [""] if kind == "linear" else [f"{2 * i}." for i in range(int(kind[3]))]
    state = {f"model.mm_projector.{name}{part}": torch.zeros(2, 2) for name in layers for part in ("weight", "bias")}
    torch.save(state, tmp_path / "p.bin")
    assert find_projector(tmp_path / "p.bin", llm="a", vision_tower="b").projector_type == kind


def test_find_projector_reads_the_weights_of_a_stage_2_checkpoint(trained, tmp_path):
    weights = read_projector(trained.run / "mm_projector.bin")
    prefixed = {f"base_model.model.model.mm_projector.{name}": tensor for name, tensor in weights.items()}
    torch.save({**prefixed, "lm_head.weight": torch.zeros(1)}, tmp_path / "non_lora_trainables.bin")
    found = read_projector(tmp_path / "non_lora_trainables.bin")
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


def test_find_projector_refuses_a_folder_without_projector(tmp_path):
    with pytest.raises(UserError, match=r"has no mm_projector\.bin; expected the --output_dir of a training run"):
        find_projector(tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    for run in (tmp_path, tmp_path / "checkpoint-3"):
        with pytest.raises(UserError, match="its training has not finished; run the same training command again"):
            find_projector(run)
    with pytest.raises(UserError, match="absent does not exist; expected the --output_dir"):
        find_projector(tmp_path / "absent")


def test_find_projector_refuses_a_file_without_projector(tmp_path):
    torch.save({"lm_head.weight": torch.zeros(1)}, tmp_path / "p.bin")
    with pytest.raises(UserError, match="has no mm_projector weights"):
        find_projector(tmp_path / "p.bin", llm="a", vision_tower="b")
    (tmp_path / "q.bin").write_bytes(b"<html>")
    with pytest.raises(UserError, match="cannot be read as a projector file"):
        find_projector(tmp_path / "q.bin", llm="a", vision_tower="b")


def test_find_projector_reports_a_damaged_config(trained, tmp_path):
    shutil.copy(trained.run / "mm_projector.bin", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({})[:1], encoding="utf-8")
    with pytest.raises(UserError, match="config.json cannot be read"):
        find_projector(tmp_path)


@pytest.mark.parametrize(
    ("bf16", "compute_dtype", "expected"),
    [(True, None, "bfloat16"), (False, None, "float16"), (True, "fp32", "float32"), (False, "bf16", "bfloat16")],
)
def test_find_projector_knows_the_tower_dtype_of_an_on_the_fly_run(bf16, compute_dtype, expected, trained, tmp_path):
    run = shutil.copytree(trained.run, tmp_path / "run")
    (run / "feature_cache.json").unlink()
    arguments = json.loads((run / "arguments.json").read_text(encoding="utf-8"))
    arguments["training"]["bf16"] = bf16
    arguments["model"]["compute_dtype"] = compute_dtype
    (run / "arguments.json").write_text(json.dumps(arguments), encoding="utf-8")
    assert find_projector(run).tower_dtypes == (expected,)
