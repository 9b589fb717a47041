"""What HF Trainer loads can be replaced; DeepSpeed's checkpoints are in test_run_resume_ranks.py."""

from types import ModuleType

from llava_twophase.train.compat import load_best_instead, load_instead


def test_load_instead_replaces_what_trainer_loads():
    from transformers import Trainer

    assert {"_prepare_for_training", "_load_from_checkpoint", "_load_best_model"} <= vars(Trainer).keys()
    calls = []
    trainer = ModuleType("trainer")
    trainer._prepare_for_training = lambda steps, loader, checkpoint: calls.append(checkpoint) or (steps, loader)
    trainer._load_best_model = lambda: calls.append("best")
    load_instead(trainer, lambda: calls.append("load"))
    assert trainer._prepare_for_training(3, "loader", "checkpoint-1") == (3, "loader")
    for loaded in (True, False):
        load_best_instead(trainer, lambda loaded=loaded: calls.append("other") or loaded)
        trainer._load_best_model()
        if loaded:
            assert calls == [None, "load", "other"]
