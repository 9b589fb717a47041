"""The training command of the tests that save checkpoints; new tests call `commands.train_command` itself."""

from commands import CHECKPOINT_FLAGS, assert_same_outcome, deepspeed, outcome, train_command

__all__ = ["assert_equal", "command", "deepspeed", "outcome"]
assert_equal = assert_same_outcome


def command(records, llm, tower, cache, output, **changes):
    """Return command 2 without its launcher."""
    inputs = {"data_path": records, "model_name_or_path": llm, "vision_tower": tower, "feature_cache": cache}
    return train_command(**{**CHECKPOINT_FLAGS, **inputs, "output_dir": output, **changes})
