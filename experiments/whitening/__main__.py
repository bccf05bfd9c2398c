"""python -m experiments.whitening."""

from bn_research.lab import main
from experiments.whitening import EXPERIMENT

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
