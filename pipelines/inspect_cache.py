"""Command 3: look at a feature cache without changing it."""

import sys

from llava_twophase.inspection.cli import main

if __name__ == "__main__":
    sys.exit(main())
