"""Command 2, phase two: train mm_projector from a feature cache, or on the fly."""

import sys

from llava_twophase.train.cli import main

if __name__ == "__main__":
    sys.exit(main())
