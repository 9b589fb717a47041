"""The training loop: trainer, checkpoints, metrics, files of a run."""
