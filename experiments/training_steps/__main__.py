"""python -m experiments.training_steps."""

from bn_research.lab import main
from experiments.training_steps import EXPERIMENT

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
