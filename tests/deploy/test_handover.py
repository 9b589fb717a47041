"""What LLaVA's stage 2 needs, checked in the base LLM's and the tower's own files."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from commands import use_command
from helpers import run
from llava_twophase.deploy.handover import run_checks
from llava_twophase.deploy.trained_projector import find_projector


def checks(trained, **models):
    projector = find_projector(trained.run, **{name: str(path) for name, path in models.items()})
    return {check.what: check for check in run_checks(projector)}


def edited(folder, target, name="config.json", **fields):
    shutil.copytree(folder, target)
    content = json.loads((target / name).read_text(encoding="utf-8"))
    content.update(fields)
    content = {key: value for key, value in content.items() if value != "remove"}
    (target / name).write_text(json.dumps(content), encoding="utf-8")
    return target


def test_handover_accepts_a_llama_base(trained):
    found = checks(trained)
    assert found["projector"].found == "mlp2x_gelu, 32 -> 64" and not found["projector"].fix
    assert "LLaVA 1.2" in found["base LLM"].found and not found["base LLM"].fix


def test_handover_reports_weights_of_another_projector_type(trained, tmp_path):
    run = shutil.copytree(trained.run, tmp_path / "run")
    content = json.loads((run / "config.json").read_text(encoding="utf-8"))
    (run / "config.json").write_text(json.dumps({**content, "mm_projector_type": "linear"}), encoding="utf-8")
    check = next(run_checks(find_projector(run)))
    assert check.found.startswith("linear") and "holds a mlp2x_gelu; correct mm_projector_type" in check.fix


@pytest.mark.parametrize(("kind", "text"), [("qwen2", "LLaVA-NeXT"), ("gpt2", "export --to hf")])
def test_handover_says_which_llava_loads_the_base(kind, text, trained, tmp_path):
    base = edited(trained.llm, tmp_path / "llm", model_type=kind)
    check = checks(trained, llm=base)["base LLM"]
    assert text in check.found + check.fix


def test_handover_reports_rope_that_only_transformers_5_reads(trained, tmp_path):
    rope = {"rope_theta": 1e6, "rope_type": "default"}
    base = edited(trained.llm, tmp_path / "a", rope_parameters=rope, rope_theta="remove")
    assert 'add "rope_theta": 1000000.0' in checks(trained, llm=base)["rope"].fix
    base = edited(trained.llm, tmp_path / "b", rope_parameters=rope, rope_theta=1e6)
    assert not checks(trained, llm=base)["rope"].fix


def test_handover_reports_rope_scaling_that_transformers_4_does_not_read(trained, tmp_path):
    scaled = {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}
    base = edited(trained.llm, tmp_path / "a", rope_parameters=scaled, rope_theta=1e4)
    assert '"rope_scaling": {"type": "linear", "factor": 4.0}' in checks(trained, llm=base)["rope"].fix
    three = {"type": "linear", "factor": 4.0, "rope_type": "linear"}
    base = edited(trained.llm, tmp_path / "b", rope_scaling=three)
    assert 'make it {"type": "linear", "factor": 4.0}' in checks(trained, llm=base)["rope"].fix
    base = edited(trained.llm, tmp_path / "c", rope_scaling={"type": "linear", "factor": 4.0})
    assert not checks(trained, llm=base)["rope"].fix
    base = edited(trained.llm, tmp_path / "d", rope_parameters={"rope_type": "llama3", "rope_theta": 1e4})
    assert "llama3 rope scaling" in checks(trained, llm=base)["rope"].found


def test_handover_reports_a_contradictory_generation_config(trained, tmp_path):
    folder = shutil.copytree(trained.llm, tmp_path / "llm")
    vicuna = {"temperature": 0.9, "top_p": 0.6, "do_sample": False, "transformers_version": "4.31.0"}
    (folder / "generation_config.json").write_text(json.dumps(vicuna), encoding="utf-8")
    assert "do_sample" in checks(trained, llm=folder)["generation_config.json"].fix


def test_handover_reports_a_tower_saved_by_transformers_5(trained, tmp_path):
    assert "random weights" in checks(trained)["vision tower"].found
    folder = shutil.copytree(trained.tower, tmp_path / "tower")
    state = load_file(folder / "model.safetensors")
    renamed = {f"vision_model.{name.removeprefix('vision_model.')}": tensor for name, tensor in state.items()}
    save_file(renamed, folder / "model.safetensors")
    assert not checks(trained, vision_tower=folder)["vision tower"].fix
    siglip = edited(folder, tmp_path / "siglip", model_type="siglip_vision_model")
    assert "LLaVA 1.2 loads CLIP towers only" in checks(trained, vision_tower=siglip)["vision tower"].found


def test_handover_reports_a_tower_that_llava_does_not_load(trained, tmp_path):
    tower = edited(trained.tower, tmp_path / "tower", model_type="dinov2")
    check = checks(trained, vision_tower=tower)["vision tower"]
    assert check.found == "dinov2" and "export --to hf" in check.fix
    other = edited(trained.tower, tmp_path / "other", model_type="vit_msn")
    assert checks(trained, vision_tower=other)["vision tower"].fix.endswith("use: llava-use-projector caption")


def test_handover_command_prints_checks_and_the_stage_2_command(trained):
    done = run(["python", *use_command("handover", trained.run)], expect=1)  # the tiny tower has transformers 5's names
    assert f"--pretrain_mm_mlp_adapter {trained.run / 'mm_projector.bin'}" in done.stdout
    report = json.loads(run(["python", *use_command("handover", trained.run, "--json")], expect=1).stdout)
    assert {check["what"] for check in report["checks"]} >= {"projector", "rope", "vision tower"}
