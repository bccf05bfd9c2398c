"""python -m experiments.batch_noise."""

from bn_research.lab import main
from experiments.batch_noise import EXPERIMENT

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
