"""python -m experiments.signal_propagation."""

import sys

from bn_research.lab.launch import main
from experiments.signal_propagation import EXPERIMENT

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
