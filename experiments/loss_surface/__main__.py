"""python -m experiments.loss_surface."""

import sys

from bn_research.lab.launch import main
from experiments.loss_surface import EXPERIMENT

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
