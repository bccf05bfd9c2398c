"""python -m experiments.scale_invariance."""

import sys

from bn_research.lab.launch import main
from experiments.scale_invariance import EXPERIMENT

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
