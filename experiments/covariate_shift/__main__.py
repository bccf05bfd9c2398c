"""python -m experiments.covariate_shift."""

from bn_research.lab import main
from experiments.covariate_shift import EXPERIMENT

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
