"""python -m experiments.audit."""

import sys

from bn_research.lab.launch import main
from experiments.audit import EXPERIMENT

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
