"""python -m experiments.loss_surface."""

from bn_research.lab import main
from experiments.loss_surface import EXPERIMENT

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
