"""python -m experiments.learning_rate."""

from bn_research.lab import main
from experiments.learning_rate import EXPERIMENT

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
