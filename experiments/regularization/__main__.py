"""python -m experiments.regularization."""

from bn_research.lab import main
from experiments.regularization import EXPERIMENT

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
