"""python -m experiments.learning_rate."""

import sys

from bn_research.lab.launch import main
from experiments.learning_rate import EXPERIMENT

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
