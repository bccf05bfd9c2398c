"""python -m experiments.covariate_shift."""

import sys

from bn_research.lab.launch import main
from experiments.covariate_shift import EXPERIMENT

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
