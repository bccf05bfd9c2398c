"""Which experiments there are."""

import importlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from bn_research.claims.claim import check_unique
from bn_research.lab.experiment import Experiment
from bn_research.lab.flags import UsageError

PACKAGE = "experiments"  # imported from where Python is started; it is not installed


def reading_order(names: Iterable[str]) -> list[str]:
    """Experiments as a reader wants them; new ones at the end."""
    order = importlib.import_module(PACKAGE).READING_ORDER
    known = {name: place for place, name in enumerate(order)}
    return sorted(names, key=lambda name: (known.get(name, len(known)), name))


def experiment_names() -> list[str]:
    """Packages and files of `PACKAGE` that define an EXPERIMENT, in the order of the report."""
    folder = Path(importlib.import_module(PACKAGE).__path__[0])
    found = {path.stem: path for path in folder.glob("*.py")}
    found |= {path.parent.name: path for path in folder.glob("*/__init__.py")}
    return reading_order(name for name, path in found.items() if _defines_experiment(path))


def _defines_experiment(path: Path) -> bool:
    return re.search(r"^EXPERIMENT = ", path.read_text(encoding="utf-8"), re.MULTILINE) is not None


def load(name: str) -> Experiment:
    """The experiment of a room, with its claims."""
    experiment = importlib.import_module(f"{PACKAGE}.{name}").EXPERIMENT
    check_unique(experiment.claims)
    return experiment


def load_all(names: Sequence[str]) -> dict[str, Experiment | Exception]:
    """Experiments by name; for one that cannot be loaded the error.

    Raises:
      UsageError: two claims share an id, by which pages link to them.
    """
    loaded: dict[str, Experiment | Exception] = {}
    for name in names:
        try:
            loaded[name] = load(name)
        except Exception as error:  # of any kind: it is somebody's module
            loaded[name] = error
    try:
        check_unique(claim for each in loaded.values() for claim in getattr(each, "claims", ()))
    except ValueError as error:
        raise UsageError(str(error)) from error
    return loaded
