"""python -m experiments.scale_invariance."""

from bn_research.lab import main
from experiments.scale_invariance import EXPERIMENT

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
