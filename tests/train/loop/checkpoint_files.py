"""Checkpoints without a training run."""

from llava_twophase.train.layout import Layout
from llava_twophase.train.loop.checkpoints import CheckpointRecord, write_marker
from llava_twophase.train.loop.checksums import file_checksums

IDENTITY = {"global_batch_size": 8, "features": {"select_layer": -2}}
LAYOUT = Layout(world_size=2, batch_size=2, accumulation=2)
FILES = ("model.safetensors", "optimizer.pt", "trainer_state.json")


def write(folder, step, identity=IDENTITY, complete=True, steps_per_epoch=10, layout=LAYOUT, origin=LAYOUT):
    """A checkpoint of three small files, with or without its marker."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in FILES:
        (checkpoint / name).write_bytes(f"{name} of step {step}".encode())
    if complete:
        files = file_checksums(checkpoint, [checkpoint / name for name in FILES])
        write_marker(checkpoint, CheckpointRecord(identity, steps_per_epoch, layout, origin, files))
    return checkpoint
