"""The three commands as processes, from images to mm_projector.bin."""

import json
import shutil
from importlib.util import find_spec

import pytest

from commands import (
    assert_same_outcome,
    deepspeed,
    extract_command,
    inspect_command,
    outcome,
    torchrun,
    train_command,
)
from helpers import needs_compiler, run

trackio_is_absent = pytest.mark.skipif(find_spec("trackio") is not None, reason="trackio is installed")
STEPS = 6  # twelve plain scenes, batches of four, two epochs


@pytest.fixture(scope="module")
def features(plain_set, tiny_clip, tmp_path_factory):
    """A cache of the plain scenes from a float32 tower."""
    cache = tmp_path_factory.mktemp("features") / "cache"
    run(["python", *extract_plain(plain_set, tiny_clip, cache)])
    return cache


@pytest.fixture(scope="module")
def tower_gone(tiny_clip, features, tmp_path_factory):
    """The path of a tower that is no longer on the disk, and its cache."""
    root = tmp_path_factory.mktemp("gone")
    shutil.copytree(features, root / "cache")
    manifest = root / "cache" / "manifest.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    content["provenance"]["vision_tower"] = str(root / "tower")
    manifest.write_text(json.dumps(content), encoding="utf-8")
    return root / "tower", root / "cache"


def extract_plain(pictures, tower, cache):
    return extract_command(
        data_path=pictures.json, image_folder=pictures.folder, vision_tower=tower, feature_cache=cache, num_workers=1
    )


def train_plain(pictures, llm, tower, output, **changes):
    inputs = {"data_path": pictures.json, "model_name_or_path": llm, "vision_tower": tower, "output_dir": output}
    return train_command(**inputs, **changes)


def test_cached_equals_on_the_fly_and_needs_no_tower(plain_set, tiny_llama, tiny_clip, tower_gone, tmp_path):
    """Same features, losses and projector bit for bit, with the tower off the disk and the hub out of reach."""
    tower, cache = tower_gone
    assert not tower.exists()
    live, cached = tmp_path / "live", tmp_path / "cached"
    command = train_plain(plain_set, tiny_llama, tiny_clip, live, image_folder=plain_set.folder, compute_dtype="fp32")
    run(["python", *command])
    run(["python", *train_plain(plain_set, tiny_llama, tower, cached, feature_cache=cache)], HF_HUB_OFFLINE="1")
    losses = outcome(live).losses
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    assert_same_outcome(outcome(live), outcome(cached))
    config = json.loads((cached / "config.json").read_text(encoding="utf-8"))
    assert config["mm_vision_tower"] == str(tower)
    assert config["mm_hidden_size"] == 32


def test_workers_and_activation_checkpointing_change_no_loss(plain_set, tiny_llama, tiny_clip, features, tmp_path):
    plain, other = tmp_path / "plain", tmp_path / "other"
    run(["python", *train_plain(plain_set, tiny_llama, tiny_clip, plain, feature_cache=features)])
    switches = {"dataloader_num_workers": 2, "gradient_checkpointing": True}
    run(["python", *train_plain(plain_set, tiny_llama, tiny_clip, other, feature_cache=features, **switches)])
    assert outcome(plain).losses == outcome(other).losses


DYING = """\
import os, signal, sys
from llava_twophase.train.loop import trainer
from llava_twophase.train.cli import main

step = trainer.ProjectorTrainer.training_step

def dying(self, *args, **kwargs):
    if os.environ["RANK"] == "1" and self.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)

trainer.ProjectorTrainer.training_step = dying
sys.exit(main())
"""


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=needs_compiler)])
def test_killed_rank_stops_the_other_and_the_same_command_resumes(
    plain_set, tiny_llama, tiny_clip, features, tmp_path, launcher
):
    """Killed in its fifth step, with a checkpoint at the third; under torchrun without DeepSpeed's engine."""
    uninterrupted, killed, script = tmp_path / "uninterrupted", tmp_path / "killed", tmp_path / "dying.py"
    script.write_text(DYING, encoding="utf-8")

    def start(program, output, expect=0):
        common = {"feature_cache": features, "per_device_train_batch_size": 2, "save_strategy": "steps"}
        if launcher == "deepspeed":
            common |= {"deepspeed": "pipelines/zero2.json", "bf16": True}
        ranks = torchrun() if launcher == "torchrun" else deepspeed()
        _, *flags = train_plain(plain_set, tiny_llama, tiny_clip, output, save_steps=3, **common)
        return run([*ranks, program, *flags], expect=expect)

    assert start(script, killed, expect=None).returncode != 0
    assert not (killed / "mm_projector.bin").exists()
    assert f"resuming from {killed / 'checkpoint-3'}" in start("pipelines/train_projector.py", killed).stderr
    assert len(outcome(killed).losses) == STEPS
    if launcher == "torchrun":  # under DeepSpeed, train/test_run_resume.py compares
        start("pipelines/train_projector.py", uninterrupted)
        assert_same_outcome(outcome(killed), outcome(uninterrupted))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mm_vision_select_layer": -1}, "select_layer: the cache has -2, this run -1"),
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio: the cache has 'square', this run 'pad'"),
        ({"mm_vision_select_feature": "cls_patch"}, "select_feature"),
        ({"model_max_length": 16}, "--model_max_length 16 leaves no room"),
        ({"mm_projector_type": "identity"}, "nothing to train"),
        ({"model_name_or_path": "/nowhere"}, "--model_name_or_path /nowhere"),
        ({"data_path": "/nowhere.json"}, "--data_path /nowhere.json does not exist"),
        ({"eval_data_path": "/no.json", "evaluation_strategy": "epoch"}, "--eval_data_path /no.json does not exist"),
        ({"optim": "galore_adamw"}, "--optim galore_adamw: You need to install `galore_torch`"),
        ({"torch_compile": True, "torch_compile_backend": "inducktor"}, "--torch_compile_backend inducktor: torch has"),
        pytest.param({"report_to": "trackio"}, "pip install trackio", marks=trackio_is_absent),
    ],
)
def test_misuse_is_one_error(plain_set, tiny_llama, tiny_clip, features, tmp_path, changes, named):
    inputs = {"data_path": plain_set.json, "model_name_or_path": tiny_llama, "vision_tower": tiny_clip}
    inputs |= {"feature_cache": features, "output_dir": tmp_path / "out"}
    result = run(["python", *train_command(**inputs | changes)], expect=1)
    assert named in result.stderr
    assert "Traceback" not in result.stderr


def test_records_without_features_are_reported_before_the_llm_loads(
    image_set, tiny_llama, tiny_clip, features, tmp_path
):
    command = train_plain(image_set, tiny_llama, tiny_clip, tmp_path / "out", feature_cache=features)
    result = run(["python", *command], expect=1)
    assert "17 of 29 images have no features" in result.stderr
    assert "odd/transparent.png" in result.stderr


@pytest.mark.parametrize("tower", ["tiny_siglip", "tiny_dinov2", "tiny_clip_full"])
def test_extraction_and_training_accept_other_towers(request, tower, plain_set, tiny_llama_no_bos, tmp_path):
    """SigLIP, DINOv2 and a complete CLIPModel; the LLM's tokenizer adds no BOS."""
    folder = request.getfixturevalue(tower)
    cache, output = tmp_path / "cache", tmp_path / "out"
    run(["python", *extract_plain(plain_set, folder, cache)])
    flags = {"feature_cache": cache, "mm_projector_type": "linear"}
    run(["python", *train_plain(plain_set, tiny_llama_no_bos, folder, output, **flags)])
    losses = outcome(output).losses
    assert losses[-1] < losses[0]
    assert json.loads(run(["python", *inspect_command("summary", cache, "--json")]).stdout)["images"] == 12
    run(["python", *inspect_command("verify", cache)])
