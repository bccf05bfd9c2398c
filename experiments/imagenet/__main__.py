"""python -m experiments.imagenet."""

import sys

from bn_research.lab.launch import main
from experiments.imagenet import EXPERIMENT

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
