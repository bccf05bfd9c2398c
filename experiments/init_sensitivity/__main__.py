"""python -m experiments.init_sensitivity."""

import sys

from bn_research.lab.launch import main
from experiments.init_sensitivity import EXPERIMENT

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
