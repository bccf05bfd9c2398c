"""python -m experiments.transform."""

import sys

from bn_research.lab.launch import main
from experiments.transform import EXPERIMENT

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
