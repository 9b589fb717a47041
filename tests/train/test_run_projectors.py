"""Training with projectors that LLaVA does not have: a user's own file, and those that change the number of tokens."""

import json
import shutil
import sys

import pytest
import torch

from cache.make import make_cache
from commands import assert_same_outcome, checkpoint_command, deepspeed, outcome
from helpers import ROOT, fenced_blocks, needs_compiler, run
from llava_twophase.deploy import captioner
from llava_twophase.deploy.cli import main as use_projector
from llava_twophase.deploy.trained_projector import find_projector, load_projector

OWN = {"mm_projector_type": "my_projectors:StridedConv", "mm_projector_kwargs": '{"hidden": 24}'}
(EXAMPLE,) = fenced_blocks((ROOT / "docs" / "projectors.md").read_text(encoding="utf-8"), "python")


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    """The example of docs/projectors.md in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "my_projectors.py"
    path.write_text(EXAMPLE, encoding="utf-8")
    yield path
    sys.modules.pop("my_projectors", None)


def interrupt(finished, copy):
    """Copy a run as if it had been interrupted after checkpoint-4."""
    shutil.copytree(finished, copy, ignore=shutil.ignore_patterns("checkpoint-6", "finished.json", "mm_projector.bin"))
    return copy


def test_projector_of_a_users_own_file_trains_captions_and_resumes(
    own_file, train_in_process, plain_set, plain_cache, tiny_llama, caplog, capsys
):
    folder = own_file.parent
    captions = {
        "eval_data_path": plain_set.json,
        "eval_strategy": "epoch",
        "sample_captions": 12,
        "save_total_limit": 5,
    }
    assert train_in_process("run", **OWN, **captions) == (0, True)
    assert "my_projectors:StridedConv: 4 image tokens from 16 patch features" in caplog.text
    finished = folder / "run"
    config = json.loads((finished / "config.json").read_text(encoding="utf-8"))
    assert (config["mm_projector_input"], config["mm_projector_output"]) == ([16, 32], [4, 64])
    assert config["mm_projector_kwargs"] == {"hidden": 24} and list(config["mm_projector_source"]) == ["my_projectors"]
    shapes = {name: list(tensor.shape) for name, tensor in outcome(finished).projector.items()}
    assert shapes["model.mm_projector.conv.weight"] == [24, 32, 3, 3] and len(shapes) == 4

    interrupted = interrupt(finished, folder / "interrupted")
    own_file.write_text(EXAMPLE.replace("gelu(tokens)", "relu(tokens)"), encoding="utf-8")
    assert train_in_process("interrupted", **OWN, **captions) == (1, False)
    assert "mm_projector_source.my_projectors: the checkpoint has" in (text := capsys.readouterr().err)
    assert "(the source file of --mm_projector_type; restore it to resume)" in text
    own_file.write_text(EXAMPLE, encoding="utf-8")
    other = {**OWN, "mm_projector_kwargs": '{"hidden": 25}'}
    assert train_in_process("interrupted", **other, **captions) == (1, False)
    assert "mm_projector_kwargs.hidden: the checkpoint has 24, this run 25" in capsys.readouterr().err
    assert train_in_process("interrupted", **OWN, **captions) == (0, True)
    assert_same_outcome(outcome(interrupted), outcome(finished))

    page = (finished / "samples" / "step-000006.html").read_text(encoding="utf-8")
    flags = ["--feature_cache", str(plain_cache), "--model_name_or_path", str(tiny_llama)]
    assert use_projector(["caption", str(finished), str(plain_set.json), "--json", *flags]) == 0
    written = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"] for line in written] == plain_set.keys
    words = [word for line in written for word in line["caption"].split()]
    assert words and all(word in page for word in words)
    data = ["--data_path", str(plain_set.json), "--limit", "4", "--json"]
    assert use_projector(["evaluate", str(finished), *data, *flags]) == 0
    assert json.loads(capsys.readouterr().out)["evaluated_records"] == 4


STATEFUL = """
import torch
from torch import nn
class Stateful(nn.Module):
    def __init__(self, tower_width, llm_width, grid):
        super().__init__()
        self.scale = nn.Parameter(torch.full((tower_width,), 0.5), requires_grad=False)
        self.norm, self.drop = nn.BatchNorm1d(tower_width), nn.Dropout(0.1)
        self.layer = nn.Linear(tower_width, llm_width)
    def forward(self, features):
        normed = self.norm((features * self.scale).transpose(1, 2)).transpose(1, 2)
        return self.layer(self.drop(normed))
"""


def test_projector_with_buffers_dropout_and_a_frozen_part_resumes(own_file, train_in_process):
    own_file.write_text(STATEFUL, encoding="utf-8")
    flags = {"mm_projector_type": "my_projectors:Stateful", "save_total_limit": 5}
    assert train_in_process("run", **flags) == (0, True)
    finished = own_file.parent / "run"
    interrupted = interrupt(finished, own_file.parent / "interrupted")
    assert train_in_process("interrupted", **flags) == (0, True)
    assert_same_outcome(outcome(interrupted), outcome(finished))
    state = outcome(finished).projector
    assert (state["model.mm_projector.scale"] == 0.5).all() and state["model.mm_projector.norm.running_mean"].any()
    module, features = load_projector(finished), torch.ones(1, 16, 32)
    assert torch.equal(module(features), module(features)) and module.norm.num_batches_tracked == 6


def test_use_projector_warns_if_the_source_has_changed(own_file, train_in_process, caplog):
    assert train_in_process("run", **OWN, max_steps=2)[0] == 0
    load_projector(own_file.parent / "run")
    assert "another version of the source" not in caplog.text
    own_file.write_text(EXAMPLE + "\n", encoding="utf-8")
    module = load_projector(own_file.parent / "run")
    assert "was trained with another version of the source of my_projectors" in caplog.text
    assert module(torch.zeros(1, 16, 32)).shape == (1, 4, 64) and not module.training


def test_a_config_of_another_project_with_an_unknown_type_is_refused(own_file, train_in_process):
    assert train_in_process("run", **OWN, max_steps=2)[0] == 0
    path = own_file.parent / "run" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["mm_projector_input"]
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="has mm_projector_type my_projectors:StridedConv without mm_projector_input"):
        find_projector(path.parent)


def test_handover_and_exports_refuse_a_projector_that_other_systems_do_not_have(train_in_process, tmp_path, capsys):
    assert train_in_process("run", mm_projector_type="pixel_shuffle", max_steps=1)[0] == 0
    run_folder = str(tmp_path / "run")
    assert use_projector(["handover", run_folder]) == 1
    text = capsys.readouterr().out
    assert "PROBLEM  projector: pixel_shuffle; LLaVA has linear and mlpNx_gelu only and refuses others" in text
    assert "train_mem.py" not in text
    assert use_projector(["handover", run_folder, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["command"] is None
    for kind, what in (
        ("hf", "transformers' LLaVA has mlp2x_gelu only"),
        ("gguf", "llama.cpp's type 'mlp' is mlp2x_gelu"),
    ):
        assert use_projector(["export", run_folder, str(tmp_path / "out"), "--to", kind]) == 1
        error = capsys.readouterr().err
        assert "the projector is pixel_shuffle" in error and what in error
        assert "llava-use-projector caption and evaluate run it" in error
    assert not (tmp_path / "out").exists()


def test_captioner_refuses_features_of_another_shape_before_the_llm_loads(train_in_process, tmp_path, monkeypatch):
    """A ldpv2 of 16 patches with a cache of nine; without it a convolution would fail."""
    assert train_in_process("run", mm_projector_type="ldpv2", max_steps=1)[0] == 0
    other, _, _ = make_cache(tmp_path / "other", fingerprint={"made": "elsewhere"})
    monkeypatch.setattr(captioner, "read_causal_lm", None)
    with pytest.raises(ValueError, match="takes 16 patch features of width 32, found 9 of width 32; give the vision t"):
        captioner.Captioner.load(tmp_path / "run", feature_cache=other)


def test_weights_of_another_projector_are_refused_with_those_that_differ(train_in_process, tmp_path, capsys):
    assert train_in_process("run", mm_projector_type="ldpv2", max_steps=1)[0] == 0
    adapter = {"pretrain_mm_mlp_adapter": tmp_path / "run" / "mm_projector.bin"}
    assert train_in_process("next", mm_projector_type="ldpv2", max_steps=1, **adapter) == (0, True)
    assert train_in_process("other", mm_projector_type="avgpool_mlp", **adapter) == (1, False)
    text = capsys.readouterr().err
    assert "holds another projector: it has {'pointwise.0.weight': [64, 32]" in text
    assert "this run needs {'mlp.0.weight': [64, 32]" in text


def test_llava_types_write_the_config_that_they_always_wrote(train_in_process, tmp_path):
    assert train_in_process("run", max_steps=1)[0] == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert [name for name in config if name.startswith("mm_projector_")] == ["mm_projector_lr", "mm_projector_type"]
    identity = json.loads((tmp_path / "run" / "finished.json").read_text(encoding="utf-8"))["identity"]
    assert [name for name in identity if name.startswith("mm_projector_")] == ["mm_projector_type"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"mm_projector_type": "no_such_module:Mine"}, "there is no module no_such_module"),
        ({"mm_projector_type": "my_projectors:Absent"}, "the module my_projectors has no Absent"),
        ({**OWN, "mm_projector_kwargs": "hidden=3"}, "--mm_projector_kwargs hidden=3: Expecting value"),
        ({**OWN, "mm_projector_kwargs": '{"width": 3}'}, "unexpected keyword argument 'width'"),
        ({**OWN, "mm_projector_kwargs": '{"hidden": "3"}'}, "cannot be built: TypeError"),
        ({"mm_projector_type": "pixel_shuffle", "mm_projector_kwargs": '{"factor": 3}'}, "blocks of 3 x 3"),
    ],
)
def test_projector_that_cannot_be_used_is_refused_before_the_llm_loads(
    flags, message, own_file, train_in_process, capsys
):
    assert train_in_process(**flags) == (1, False)
    assert message in capsys.readouterr().err


def test_wrong_projector_type_is_reported_with_other_problems(own_file, train_in_process, capsys):
    assert train_in_process(mm_projector_type="my_projectors:Absent", feature_cache="no/such") == (1, False)
    text = capsys.readouterr().err
    assert "2 problems were found" in text and "has no Absent" in text and "no/such" in text


def test_cls_token_is_refused_by_a_type_with_a_grid(train_in_process, plain_set, capsys):
    source = {"feature_cache": None, "image_folder": plain_set.folder, "mm_vision_select_feature": "cls_patch"}
    assert train_in_process(mm_projector_type="ldpv2", **source) == (1, False)
    assert "ldpv2 needs a square grid of patches" in capsys.readouterr().err


def test_truncation_counts_image_tokens_and_not_patches(train_in_process, capsys):
    """Sixteen patches leave no room for a caption in twelve positions; four tokens do."""
    assert train_in_process(mm_projector_type="mlp2x_gelu", model_max_length=12) == (1, False)
    assert "after the image's 16 positions" in capsys.readouterr().err
    assert train_in_process(mm_projector_type="avgpool_mlp", model_max_length=12, max_steps=1)[0] == 0


def test_micro_batch_estimate_counts_image_tokens(train_in_process, caplog):
    def positions(kind):
        caplog.clear()
        assert train_in_process(kind, mm_projector_type=kind, max_steps=1, micro_batch_size=2)[0] == 0
        return int(caplog.text.partition(" positions)")[0].rpartition("(")[2])

    assert positions("mlp2x_gelu") - positions("pixel_shuffle") == 12


def test_training_on_the_fly_equals_training_from_the_cache(train_in_process, plain_set):
    """With a convolution, and captions grouped by length."""
    flags = {"mm_projector_type": "ldpv2", "group_by_modality_length": True, "max_steps": 4}
    assert train_in_process("cached", **flags)[0] == 0
    source = {"feature_cache": None, "image_folder": plain_set.folder, "compute_dtype": "fp32"}
    assert train_in_process("fly", **flags, **source)[0] == 0
    folder = train_in_process.folder
    assert_same_outcome(outcome(folder / "cached"), outcome(folder / "fly"))


@needs_compiler
def test_zero3_gathers_the_parameters_of_any_module(plain_set, tiny_llama, tiny_clip, plain_cache, tmp_path):
    """Also those that no submodule owns, such as the queries of a perceiver, in two ranks and while it captions."""
    kwargs = '{"queries": 3, "depth": 1, "heads": 2, "head_width": 8, "positions": true}'
    command = checkpoint_command(
        *(plain_set.json, tiny_llama, tiny_clip, plain_cache, tmp_path / "run"),
        deepspeed="pipelines/zero3.json",
        bf16=True,
        mm_projector_type="perceiver",
        mm_projector_kwargs=kwargs,
        max_steps=3,
        eval_fraction=0.25,
        eval_strategy="steps",
        eval_steps=3,
        sample_captions=2,
    )
    run([*deepspeed(), *command])
    state = outcome(tmp_path / "run").projector
    assert state["model.mm_projector.queries"].shape == (3, 32)
    assert load_projector(tmp_path / "run")(torch.zeros(1, 16, 32).bfloat16()).shape == (1, 3, 64)
    assert (tmp_path / "run" / "samples" / "step-000003.html").is_file()
