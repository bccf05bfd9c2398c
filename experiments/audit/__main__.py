"""python -m experiments.audit."""

from bn_research.lab import main
from experiments.audit import EXPERIMENT

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
