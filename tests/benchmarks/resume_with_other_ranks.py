"""Time and disk space to carry the optimizer's state of the 13B projector over to another number of ranks.

    python tests/benchmarks/resume_with_other_ranks.py [--width 5120] [--stage 2]

One rank writes a ZeRO checkpoint, reads it by names of parameters, and loads it into a new engine.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29519"}

import deepspeed
import torch

from llava_twophase.train.compat import load_zero_optimizer, read_zero_checkpoint


def make_engine(width, stage):
    module = torch.nn.Sequential(torch.nn.Linear(1024, width), torch.nn.GELU(), torch.nn.Linear(width, width))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": stage},
    }
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    return deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]


def timed(action):
    started = time.perf_counter()
    result = action()
    return result, round(time.perf_counter() - started, 2)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=5120)
    parser.add_argument("--stage", type=int, default=2)
    arguments = parser.parse_args()
    engine = make_engine(arguments.width, arguments.stage)
    engine.backward(engine(torch.randn(1, 1024).bfloat16()).float().square().mean())
    engine.step()
    with tempfile.TemporaryDirectory() as folder:
        _, save = timed(lambda: engine.save_checkpoint(folder))
        checkpoint = Path(folder, "global_step1")
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
        (tensors, step), read = timed(lambda: read_zero_checkpoint(checkpoint, Path(folder, "work")))
    shapes = {name: getattr(value, "ds_shape", value.shape) for name, value in engine.module.named_parameters()}
    tensors = {name: {key: value.view(shapes[name]) for key, value in one.items()} for name, one in tensors.items()}
    engine.destroy()
    other = make_engine(arguments.width, arguments.stage)
    _, load = timed(lambda: load_zero_optimizer(other, tensors, step))
    figures = {"checkpoint_gb": round(size / 1e9, 3), "save_s": save, "read_s": read, "load_s": load}
    for name, value in figures.items():
        print(f"{name:>14}  {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
