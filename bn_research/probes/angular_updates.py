"""How far a step turns weights whose scale does not matter, and where weight decay takes that.

Weights w in front of BN are scale-invariant: the function depends on their direction alone, and a
step of rate η moves it as one of rate η/‖w‖² would at ‖w‖ = 1. With weight decay λ (L2, added to
the gradient) ‖w‖ settles where its growth by steps and its decay balance. For gradients g that are
not correlated from step to step, of mean square G, momentum α gives v = Σ αᵏ·g a mean square of
G/(1 − α²); ‖w‖² grows by η²G/(1 − α)² a step and decays by 2ηλ/(1 − α) of itself, so that
‖w‖² = ηG/(2λ(1 − α)), and the mean square angle between w before and after a step is

    η²·G/(1 − α²)/‖w‖² = 2ηλ/(1 + α)

whatever the layer, the gradient and the loss.

Source: R. Wan, Z. Zhu, X. Zhang, J. Sun, "Spherical motion dynamics", NeurIPS 2021, arXiv
2006.08419; the derivation is ours.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Groups = Sequence[str | Sequence[str]]


class AngularUpdate(NamedTuple):
    """What a step does to groups of weights, each taken as one vector; [groups] each."""

    norm: Float[Array, "groups"]  # ‖w‖ before the step
    gradient_norm: Float[Array, "groups"] | None  # None without gradients
    angle: Float[Array, "groups"]  # between w before and after, radians; 0 where ‖w‖ is 0


def angular_update(params: Any, grads: Any, new_params: Any, *, groups: Groups) -> AngularUpdate:
    """Norms and angles of a step, accurate for small angles and whatever decay does to the norm.

    With s = ⟨w, w⁺⟩/‖w‖², tan(angle) = ‖w⁺ − s·w‖/(s·‖w‖). Rounding leaves about 1e-7 in float32.

    Args:
      params: before the step.
      grads: like params; or None, which saves a pass over memory.
      new_params: after the step.
      groups: paths of leaves as `jax.tree_util.keystr` prints them; a path alone, or the paths of
        weights that are invariant only together.

    Raises:
      ValueError: no groups, an empty group, or a path that params do not have.
    """
    before, after = _by_path(params), _by_path(new_params)
    gradient = None if grads is None else _by_path(grads)
    norms, gradient_norms, angles = [], [], []
    for group in _checked(groups, before):
        w, new = _wide(before, group), _wide(after, group)
        squared = _dot(w, w)
        # Not by d = w⁺ − w, which two sums would share: XLA would write it to memory in between.
        share = _dot(w, new) / jnp.where(squared > 0, squared, 1)
        across = [y - share * x for x, y in zip(w, new, strict=True)]
        norm = jnp.sqrt(squared)
        angle = jnp.arctan2(jnp.sqrt(_dot(across, across)), share * norm)
        norms.append(norm)
        angles.append(jnp.where(squared > 0, angle, 0))
        if gradient is not None:
            g = _wide(gradient, group)
            gradient_norms.append(jnp.sqrt(_dot(g, g)))
    gradient_norm = jnp.stack(gradient_norms) if gradient_norms else None
    return AngularUpdate(jnp.stack(norms), gradient_norm, jnp.stack(angles))


def equilibrium_angle(learning_rate: float, weight_decay: float, momentum: float = 0.0) -> float:
    """√(2ηλ/(1 + α)): root mean square angle per step in equilibrium, in radians.

    Raises:
      ValueError: a negative rate or decay, or momentum outside [0, 1).
    """
    for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value!r} is not allowed: it must be ≥ 0 and finite")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum!r} is not allowed: it must lie in [0, 1)")
    return math.sqrt(2 * learning_rate * weight_decay / (1 + momentum))


class ScaleLog:
    """Logs norm, angle, effective rate and equilibrium of groups of weights, step by step.

        log = ScaleLog(groups, learning_rate=0.1, weight_decay=5e-4, path="scale.jsonl")
        train_step = make_train_step(apply_fn, optimizer, observe=log.observe)
        train(..., on_metrics=log)

    The file holds a line of JSON for each step: `step`, and lists with an entry for each group,
    `group`, `norm`, `angle`, `effective_rate` and `equilibrium`; null (NaN) for what is not
    finite, such as the rate at ‖w‖ = 0. Numbers have the precision of float32. When a run is
    resumed, what it had logged of steps that it takes again is dropped, so that the log ends as
    that of an undisturbed run. Of several processes, one should log.

    Attributes:
      groups: see `angular_update`.
    """

    FIELDS = ("norm", "angle", "effective_rate", "equilibrium")

    def __init__(
        self,
        groups: Groups,
        *,
        learning_rate: float | Callable[[Any], Any],
        weight_decay: float,
        momentum: float = 0.0,
        path: str | Path | None = None,
    ):
        """Nothing is logged yet; a file from before stays until the first call.

        Args:
          groups: see `angular_update`.
          learning_rate: η, or a schedule of it by step, of JAX operations as optax has them.
          weight_decay: λ.
          momentum: α.
          path: of the file; None keeps the log in memory alone.

        Raises:
          ValueError: as `equilibrium_angle`.
        """
        self.groups = tuple(groups)
        schedule = learning_rate if callable(learning_rate) else lambda step: learning_rate
        equilibrium_angle(float(schedule(0)), weight_decay, momentum)
        self._unit = equilibrium_angle(1.0, weight_decay, momentum)
        # Compiled for all steps of a dispatch: operation by operation takes longer than a step.
        self._rates = jax.jit(jax.vmap(lambda step: jnp.asarray(schedule(step), float)))
        self._path = None if path is None else Path(path)
        self._rows: list[tuple[int, Float[np.ndarray, "fields groups"]]] = []
        self._next: int | None = None  # the step that goes on from what is logged

        names = json.dumps([group if isinstance(group, str) else [*group] for group in self.groups])
        numbers = ", ".join(["%.9g"] * len(self.groups))  # tells float32 apart
        lists = "".join(f', "{field}": [{numbers}]' for field in self.FIELDS)
        self._line = f'{{"step": %d, "group": {names.replace("%", "%%")}', f"{lists}}}\n"

    def observe(self, params: Any, grads: Any, new_params: Any) -> AngularUpdate:
        """Give this to `make_train_step`."""
        return angular_update(params, None, new_params, groups=self.groups)

    def __call__(self, steps: int, metrics: Any) -> None:
        """Give this to `train` as on_metrics.

        Args:
          steps: taken before those of the metrics.
          metrics: with an `AngularUpdate` of each step as `observed`.

        Raises:
          ValueError: the file goes on from a log of other groups.
        """
        shape = (-1, len(self.groups))
        norm = np.asarray(metrics.observed.norm, np.float32).reshape(shape)
        angle = np.asarray(metrics.observed.angle, np.float32).reshape(shape)
        taken = range(steps, steps + len(norm))
        rates = np.asarray(self._rates(np.arange(taken.start, taken.stop)), np.float64)[:, None]
        squared = np.square(norm, dtype=np.float64)
        effective = rates / np.where(squared > 0, squared, np.nan)
        equilibrium = np.broadcast_to(self._unit * np.sqrt(rates), norm.shape)
        with np.errstate(over="ignore"):
            table = np.stack([norm, angle, effective, equilibrium], axis=1).astype(np.float32)
        table[~np.isfinite(table)] = np.nan
        if self._next != steps:
            self._go_back(steps)
        self._next = taken.stop
        self._rows += zip(taken, table, strict=True)
        if self._path is not None:
            rows = table.reshape(len(table), -1).tolist()
            with self._path.open("a") as file:
                file.writelines(map(self._written, taken, rows))

    @property
    def steps(self) -> np.ndarray:
        """The steps that are logged, from 0."""
        return np.array([step for step, _ in self._logged()], int)

    def __getitem__(self, field: str) -> Float[np.ndarray, "steps groups"]:
        """One of FIELDS, float64, at every step that is logged."""
        column = self.FIELDS.index(field)
        rows = [row[column] for _, row in self._logged()]
        return np.array(rows, np.float64).reshape(len(rows), len(self.groups))

    def _logged(self) -> list[tuple[int, Float[np.ndarray, "fields groups"]]]:
        """What is logged; of a run that was stopped after its last step, by the file alone."""
        if self._next is None and self._path is not None and self._path.exists():
            self._go_back(sys.maxsize)
            self._next = self._rows[-1][0] + 1 if self._rows else 0
        return self._rows

    def _written(self, step: int, row: list[float]) -> str:
        head, lists = self._line
        return head % step + (lists % tuple(row)).replace("nan", "null")

    def _go_back(self, steps: int) -> None:
        """To what is logged of the first steps, by the file if there is one; drops the rest."""
        self._rows = [(step, row) for step, row in self._rows if step < steps]
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.touch()
        self._rows, end = [], 0
        with self._path.open("rb") as file:
            for line in file:
                record = json.loads(line) if line.endswith(b"\n") else None  # cut short by a kill
                if record is None or record["step"] >= steps:
                    break
                self._check(record["group"])
                values = [record[field] for field in self.FIELDS]
                self._rows.append((record["step"], np.array(values, np.float32)))
                end += len(line)
        os.truncate(self._path, end)

    def _check(self, logged: list) -> None:
        ours = [group if isinstance(group, str) else [*group] for group in self.groups]
        if logged != ours:
            raise ValueError(f"path={str(self._path)!r} holds a log of {logged}, not of {ours}")


def _wide(leaves: dict[str, Array], group: Sequence[str]) -> list[Array]:
    """Leaves of a group, in float32 or wider."""
    found = (leaves[path] for path in group)
    return [leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in found]


def _dot(a: list[Array], b: list[Array]) -> Array:
    return sum((jnp.sum(x * y) for x, y in zip(a, b, strict=True)), start=jnp.zeros(()))


def _by_path(tree: Any) -> dict[str, Array]:
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _checked(groups: Groups, leaves: dict[str, Array]) -> list[Sequence[str]]:
    """Groups as sequences of paths, all of which exist."""
    if not groups:
        raise ValueError("groups is empty: give at least one path of a leaf")
    found = [(group,) if isinstance(group, str) else group for group in groups]
    for group in found:
        if not group:
            raise ValueError(f"groups={groups!r} holds an empty group: give each at least one path")
        for path in group:
            if path not in leaves:
                raise ValueError(f"groups names {path!r}, which is not among {', '.join(leaves)}")
    return found
