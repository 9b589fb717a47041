"""A run with evaluation and trackers, the check of its first step, and the warning about a starved CPU."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from helpers import run
from llava_twophase.cpu import CpuUsage
from llava_twophase.errors import UserError
from llava_twophase.train.loop import trainer
from llava_twophase.train.loop.metrics import RATES, GradientProbe
from llava_twophase.train.loop.trainer import ProjectorTrainer, require_learning


class FakeCpuMeter:
    """Returns the given usage; counts the meters that were made."""

    made = 0
    result = CpuUsage()

    def __init__(self):
        FakeCpuMeter.made += 1

    def usage(self, idle, threads):
        self.idle = idle
        return FakeCpuMeter.result


@pytest.fixture
def cpu_trainer(monkeypatch):
    """A trainer without a model, whose CPU meter is a `FakeCpuMeter`."""
    monkeypatch.setattr(trainer, "CpuMeter", FakeCpuMeter)
    monkeypatch.setattr(FakeCpuMeter, "made", 0)
    made = ProjectorTrainer.__new__(ProjectorTrainer)
    made._meter = SimpleNamespace(waited=2.0)
    made._cpu, made._waited = FakeCpuMeter(), 0.0
    made.args = SimpleNamespace(dataloader_num_workers=2)
    return made


def test_log_warns_once_about_a_starved_cpu(cpu_trainer, monkeypatch, caplog):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(FakeCpuMeter, "result", CpuUsage(wall=10, received=2, waited=18))
    for _ in range(3):
        cpu_trainer._warn_if_cpu_is_starved()
    (message,) = caplog.messages
    assert "received 10% of the CPU time" in message
    assert "set OMP_NUM_THREADS=1" in message and "lower --dataloader_num_workers" in message
    cpu_trainer.args.dataloader_num_workers, cpu_trainer._cpu = 0, FakeCpuMeter()
    cpu_trainer._warn_if_cpu_is_starved()
    assert "OMP_WAIT_POLICY=passive, or use a machine with free CPUs" in caplog.messages[1]


def test_log_counts_all_waiting_for_data_and_judges_each_part_of_a_run(cpu_trainer, monkeypatch, caplog):
    monkeypatch.setattr(FakeCpuMeter, "result", CpuUsage(wall=10, received=9, waited=1))
    for _ in range(3):
        cpu_trainer._warn_if_cpu_is_starved()
    assert cpu_trainer._cpu.idle == 6 and FakeCpuMeter.made == 1
    monkeypatch.setattr(FakeCpuMeter, "result", CpuUsage(wall=200, received=190, waited=10))
    cpu_trainer._warn_if_cpu_is_starved()
    assert cpu_trainer._waited == 0 and FakeCpuMeter.made == 2 and not caplog.messages


@pytest.fixture(scope="module")
def evaluated(plain_set, tiny_llama, tiny_clip, tmp_path_factory):
    """A run from a cache with a held-out part, evaluated at each epoch, captions written."""
    root = tmp_path_factory.mktemp("evaluated")
    common = ["--data_path", plain_set.json, "--image_folder", plain_set.folder, "--vision_tower", tiny_clip]
    cache, output = root / "cache", root / "out"
    run(["python", "pipelines/extract_features.py", *common, "--feature_cache", cache, "--num_workers", "1"])
    train = ["--model_name_or_path", tiny_llama, "--feature_cache", cache, "--tune_mm_mlp_adapter", "True"]
    train += ["--output_dir", output, "--num_train_epochs", "2", "--per_device_train_batch_size", "2"]
    train += ["--eval_fraction", "0.25", "--evaluation_strategy", "epoch", "--sample_captions", "2"]
    train += ["--logging_steps", "1", "--learning_rate", "1e-3", "--bf16", "True"]
    train += ["--report_to", "all"]  # of tensorboard and wandb, those that are installed
    trackers = {
        "TENSORBOARD_LOGGING_DIR": root / "tensorboard",
        "WANDB_MODE": "offline",
        "WANDB_DIR": root,
    }
    result = run(["python", "pipelines/train_projector.py", *common, *train], **trackers)
    return output, result


def history(output):
    return json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def test_held_out_records_are_evaluated_at_each_epoch(evaluated):
    output, result = evaluated
    assert "9 records, 3 held out" in result.stderr
    losses = [entry["eval_loss"] for entry in history(output) if "eval_loss" in entry]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)


def test_rates_are_logged_beside_each_loss(evaluated):
    steps = [entry for entry in history(evaluated[0]) if "loss" in entry]
    assert steps
    for entry in steps:
        assert all(entry[name] >= 0 for name in RATES)
        assert entry["samples_per_second"] > 0
        assert entry["tokens_per_second"] > 16 * entry["samples_per_second"]
    assert steps[0]["eta_seconds"] > 0
    assert steps[-1]["eta_seconds"] == 0


def test_log_on_stderr_has_one_readable_line_for_each_log(evaluated):
    output, result = evaluated
    lines = [line for line in result.stderr.splitlines() if line.startswith("step ")]
    logged = history(output)
    assert len(lines) == len(logged)
    for line, entry in zip(lines, logged, strict=True):
        assert line.startswith(f"step {entry['step']} of {logged[-1]['step']} (epoch {entry['epoch']:.2f}): ")
        assert entry.get("loss") is None or f": loss {entry['loss']:.4f}, gradient norm " in line
    assert "'loss'" not in result.stderr + result.stdout and "step " not in result.stdout


def test_tensorboard_has_losses_and_captions(evaluated):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output, _ = evaluated
    found = EventAccumulator(str(output.parent / "tensorboard")).Reload()
    losses = [entry["loss"] for entry in history(output) if "loss" in entry]
    assert [event.value for event in found.Scalars("train/loss")] == pytest.approx(losses)
    assert len(found.Scalars("eval/loss")) == 2 and len(found.Scalars("train/tokens_per_second")) == len(losses)
    captions = found.Tensors("samples/text_summary")
    assert len(captions) == 2 and b"| generated |" in captions[0].tensor_proto.string_val[0]
    pictures = found.Tags()["images"]
    assert len(pictures) == 2 and all(len(found.Images(tag)) == 2 for tag in pictures)


def test_wandb_has_losses_and_captions(evaluated):
    """Offline: its file is a sequence of records, which has the name of each logged value."""
    pytest.importorskip("wandb")
    output, _ = evaluated
    (logged,) = (output.parent / "wandb").glob("offline-run-*/run-*.wandb")
    content = logged.read_bytes()
    assert content.count(b"train/loss") >= 6 and b"eval/loss" in content
    assert content.count(b"html-file") >= 2


def test_finished_run_has_all_of_its_files(evaluated):
    output = evaluated[0]
    for name in (
        "mm_projector.bin",
        "config.json",
        "arguments.json",
        "feature_cache.json",
        "trainer_state.json",
        "loss.png",
        "held_out.json",
    ):
        assert (output / name).is_file(), name
    arguments = json.loads((output / "arguments.json").read_text(encoding="utf-8"))
    assert arguments["data"]["eval_fraction"] == 0.25
    assert arguments["training"]["learning_rate"] == 1e-3
    made = json.loads((output / "feature_cache.json").read_text(encoding="utf-8"))
    assert made["fingerprint"]["select_layer"] == -2


def test_require_learning_refuses_losses_and_gradients_that_teach_nothing():
    layer = torch.nn.Linear(2, 2)
    probe = GradientProbe(layer)
    layer(torch.ones(1, 2)).sum().backward()
    require_learning(1.0, probe)
    probe.close()
    probe = GradientProbe(layer)
    (layer(torch.ones(1, 2)) * 0).sum().backward()
    with pytest.raises(UserError, match="got no gradient at the first step"):
        require_learning(1.0, probe)
    with pytest.raises(UserError, match="first loss is nan"):
        require_learning(math.nan, probe)
    probe.largest["weight"] = math.inf
    with pytest.raises(UserError, match="not finite"):
        require_learning(1.0, probe)
    with pytest.raises(UserError, match="no gradient"):
        require_learning(1.0, GradientProbe(layer))
