"""python -m experiments.population_stats."""

from bn_research.lab import main
from experiments.population_stats import EXPERIMENT

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
