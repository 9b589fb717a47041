"""What to do with a trained ``mm_projector.bin``: captions, evaluation, export to other systems."""
