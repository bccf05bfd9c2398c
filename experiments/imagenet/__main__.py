"""python -m experiments.imagenet."""

from bn_research.lab import main
from experiments.imagenet import EXPERIMENT

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
