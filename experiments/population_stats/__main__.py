"""python -m experiments.population_stats."""

import sys

from bn_research.lab.launch import main
from experiments.population_stats import EXPERIMENT

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
