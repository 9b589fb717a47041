"""Command 4: use a trained projector: captions, evaluation, export to other systems."""

import sys

from llava_twophase.deploy.cli import main

if __name__ == "__main__":
    sys.exit(main())
