"""python -m experiments.regularization."""

import sys

from bn_research.lab.launch import main
from experiments.regularization import EXPERIMENT

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
