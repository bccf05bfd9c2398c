"""python -m experiments.ensemble."""

from bn_research.lab import main
from experiments.ensemble import EXPERIMENT

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
