"""python -m experiments.batch_noise."""

import sys

from bn_research.lab.launch import main
from experiments.batch_noise import EXPERIMENT

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
