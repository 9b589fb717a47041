"""Compare finished training runs: the arguments that differ, the losses at the end, and a plot."""

import sys

from llava_twophase.compare_runs import main

if __name__ == "__main__":
    sys.exit(main())
