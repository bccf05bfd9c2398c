"""An experiment, as its package or file describes it."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what a run needs takes seconds to import
    from bn_research.claims.claim import Claim
    from bn_research.claims.figures import Figure
    from bn_research.claims.finding import Finding

_FILES = {  # of a room, where it does not hold them itself
    "prepare": ("measurements", "training"),
    "measure": ("measurements", "training"),
    "CLAIMS": ("verdicts",),
    "judge": ("verdicts",),
    "draw": ("figures",),
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A question with its presets, and the room where the rest is found when it is needed.

    The room holds, in itself or in the file named:

        measurements.py (or training.py)
            prepare(config) -> data         checks the config against the data that it fetches, and
                                            writes nothing into the workdir. A ValueError becomes
                                            one line for the user. In a job of several processes
                                            process 0 calls it first.
            measure(config, data, path) -> records      resumable; `path` is the workdir
        verdicts.py
            CLAIMS
            judge(config, records) -> findings          one for each claim
        figures.py
            draw(config, records, folder) -> figures

    Attributes:
      room: `__name__` of the package or file.
      presets: name -> Config, a frozen dataclass with at least `dataset` and `seeds`.
      title: of the report; where none is given, the first line of the docstring.
      distributed: whether its run can span devices and processes. It then takes the flags for
        that, and `measure` the keyword `parallel`: auto, jit, pmap or shard_map. The records of
        process 0 are judged.
    """

    room: str
    presets: Mapping[str, Any]
    title: str = ""
    distributed: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for what would show itself only at the end of a run."""
        for name, config in self.presets.items():
            fields = {field.name for field in dataclasses.fields(config)}
            if not {"dataset", "seeds"} <= fields:
                raise ValueError(
                    f"{self.room}: the config of preset {name!r} must have the fields dataset and "
                    f"seeds, it has {', '.join(sorted(fields))}"
                )
        if not self.title:
            object.__setattr__(self, "title", self.question.partition("\n")[0])

    @property
    def question(self) -> str:
        """What it asks: the docstring of its room."""
        return inspect.cleandoc(importlib.import_module(self.room).__doc__ or self.room)

    @property
    def command(self) -> str:
        """``python -m experiments.NAME``, or however the room is started."""
        module = importlib.import_module(self.room)
        if module.__spec__ is None:
            return f"python {Path(str(module.__file__)).name}"
        return f"python -m {module.__spec__.name}"

    @functools.cached_property
    def name(self) -> str:
        """That of the package or file."""
        module = importlib.import_module(self.room)
        if module.__spec__ is None:
            return Path(str(module.__file__)).stem
        return module.__spec__.name.rpartition(".")[2]

    @functools.cached_property
    def claims(self) -> Sequence[Claim]:
        """With their criteria, as they stand before the run."""
        from bn_research.claims.claim import check_unique

        claims = tuple(self._door("CLAIMS"))
        check_unique(claims)
        return claims

    @property
    def prepare(self) -> Callable[[Any], Any]:
        """Config -> data."""
        return self._door("prepare")

    @property
    def measure(self) -> Callable[..., Any]:
        """(config, data, path of the workdir) -> records."""
        return self._door("measure")

    @property
    def judge(self) -> Callable[[Any, Any], Sequence[Finding]]:
        """(config, records) -> a finding for each claim."""
        return self._door("judge")

    @property
    def draw(self) -> Callable[[Any, Any, Path], Sequence[Figure]]:
        """(config, records, folder) -> figures."""
        return self._door("draw")

    def _door(self, name: str) -> Any:
        room = importlib.import_module(self.room)
        if hasattr(room, name):
            return getattr(room, name)
        for file in _FILES[name] if hasattr(room, "__path__") else ():
            if importlib.util.find_spec(f"{self.room}.{file}") is not None:
                return getattr(importlib.import_module(f"{self.room}.{file}"), name)
        places = " or ".join(f"{file}.py" for file in _FILES[name])
        raise AttributeError(f"experiment {self.name}: {self.room} has no {name} ({places})")
