"""python -m experiments.transform."""

from bn_research.lab import main
from experiments.transform import EXPERIMENT

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
