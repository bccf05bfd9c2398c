"""python -m experiments.training_steps."""

import sys

from bn_research.lab.launch import main
from experiments.training_steps import EXPERIMENT

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
