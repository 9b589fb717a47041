"""What HF Trainer loads can be replaced; DeepSpeed's checkpoints are in test_run_resume_ranks.py."""

from types import ModuleType, SimpleNamespace

import torch

from llava_twophase.train import compat
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


def test_local_part_pads_the_last_rank(monkeypatch):
    """Five weights on two ranks: DeepSpeed gives each rank three, one of them padding."""
    value = torch.arange(5.0)
    parameter = SimpleNamespace(ds_tensor=torch.empty(3))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        parts.append(compat._local_part(parameter, value).tolist())
    assert parts == [[0, 1, 2], [3, 4, 0]]
