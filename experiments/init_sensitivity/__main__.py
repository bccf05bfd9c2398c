"""python -m experiments.init_sensitivity."""

from bn_research.lab import main
from experiments.init_sensitivity import EXPERIMENT

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
