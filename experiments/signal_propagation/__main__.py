"""python -m experiments.signal_propagation."""

from bn_research.lab import main
from experiments.signal_propagation import EXPERIMENT

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
