"""Readable log lines in place of HF Trainer's dicts."""

import logging

import pytest
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from llava_twophase.train.loop.log_lines import log_line, use_log_lines
from llava_twophase.train.loop.metrics import RATES

STEP = {
    "loss": 5.96812,
    "grad_norm": 5.0349,
    "learning_rate": 0.00077778,
    "samples_per_second": 41.256,
    "tokens_per_second": 1031.4,
    "tflops_per_device": 0.0003,
    "data_wait_percent": 1.92,
    "memory_gb": 0.448,
    "eta_seconds": 3725.4,
    "epoch": 1.0,
}


def test_log_line_of_a_step_has_units_and_rounded_numbers():
    assert log_line(STEP, 3, 9) == (
        "step 3 of 9 (epoch 1.00): loss 5.9681, gradient norm 5.03, learning rate 0.000778, 41.3 samples/s, "
        "1,031 tokens/s, 0.0003 TFLOP/s, data wait 1.9 %, 0.4 GB, 1:02:05 left"
    )


def test_log_line_shows_every_rate():
    assert set(RATES) < set(STEP) and all(name not in log_line(STEP, 3, 9) for name in RATES)


def test_log_line_of_an_evaluation():
    logs = {"eval_loss": 5.1, "eval_runtime": 12.3, "eval_samples_per_second": 0.81, "eval_steps_per_second": 0.4}
    assert log_line(logs, 3, 9) == "step 3 of 9: eval loss 5.1000, evaluated in 0:00:12, 0.81 samples/s"


def test_log_line_of_the_end_has_no_mean_over_resumed_parts():
    logs = {"train_runtime": 61.2, "train_loss": 5.6, "train_samples_per_second": 2.0, "total_flos": 0.0, "epoch": 3.0}
    assert log_line(logs, 9, 9) == "step 9 of 9 (epoch 3.00): finished, 0:01:01 in this process"


def test_log_line_keeps_values_it_does_not_know():
    assert log_line({"loss": 1.0, "entropy": 0.5}, 1, 2) == "step 1 of 2: loss 1.0000, entropy 0.5"


class FakeTrainer:
    """Has the callbacks of HF Trainer and the methods that change them."""

    def __init__(self, *callbacks):
        self.callbacks = list(callbacks)

    def add_callback(self, callback):
        self.callbacks.append(callback())

    def pop_callback(self, kind):
        found = [callback for callback in self.callbacks if type(callback) is kind]
        self.callbacks = [callback for callback in self.callbacks if type(callback) is not kind]
        return found[0] if found else None

    remove_callback = pop_callback


@pytest.mark.parametrize("printer", [ProgressCallback, PrinterCallback])
def test_use_log_lines_writes_one_line_and_prints_no_dict(printer, capsys, caplog):
    trainer = FakeTrainer(TrainerCallback(), printer())
    use_log_lines(trainer)
    assert sum(isinstance(callback, ProgressCallback) for callback in trainer.callbacks) == (
        printer is ProgressCallback
    )
    state = type("State", (), {"is_world_process_zero": True, "global_step": 3, "max_steps": 9})
    caplog.set_level(logging.INFO)
    for callback in trainer.callbacks:
        callback.training_bar = None
        callback.on_log(None, state, None, logs=dict(STEP))
    assert caplog.messages == [log_line(STEP, 3, 9)] and capsys.readouterr().out == ""
