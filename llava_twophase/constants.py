"""Values that LLaVA checkpoints and code depend on; they never change here.

Source: LLaVA v1.2.2, ``llava/constants.py`` (values only).
"""

IGNORE_INDEX = -100
"""Label of a position that does not count in the loss (torch's cross entropy uses the same)."""

IMAGE_TOKEN_INDEX = -200
"""Id of the one image token in ``input_ids``; no tokenizer can produce it."""

IMAGE_TOKEN = "<image>"
"""How the image token is written in a record's text."""
