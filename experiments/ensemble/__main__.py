"""python -m experiments.ensemble."""

import sys

from bn_research.lab.launch import main
from experiments.ensemble import EXPERIMENT

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
