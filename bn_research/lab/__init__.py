"""The machinery of an experiment: it knows no question."""

from bn_research.lab.experiment import Experiment
from bn_research.lab.launch import main
from bn_research.lab.workdir import Ledger

__all__ = ["Experiment", "Ledger", "main"]
