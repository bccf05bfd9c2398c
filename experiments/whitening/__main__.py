"""python -m experiments.whitening."""

import sys

from bn_research.lab.launch import main
from experiments.whitening import EXPERIMENT

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
