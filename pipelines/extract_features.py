"""Command 1, phase one: run the vision tower once over every image and write the feature cache."""

import sys

from llava_twophase.extract.cli import main

if __name__ == "__main__":
    sys.exit(main())
