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
    gradient_norm: Float[Array, "groups"]
    angle: Float[Array, "groups"]  # between w before and after, radians; 0 where ‖w‖ is 0


def angular_update(params: Any, grads: Any, new_params: Any, *, groups: Groups) -> AngularUpdate:
    """Norms and angles of a step; accurate for small angles, in one pass over the weights.

    With d = w⁺ − w, tan(angle) = ‖d⊥‖·‖w‖/(‖w‖² + ⟨w, d⟩), where ‖d⊥‖² = ‖d‖² − ⟨w, d⟩²/‖w‖².

    Args:
      params: before the step.
      grads: like params.
      new_params: after the step.
      groups: paths of leaves as `jax.tree_util.keystr` prints them; a path alone, or the paths of
        weights that are invariant only together.

    Raises:
      ValueError: no groups, or a path that params do not have.
    """
    trees = [_by_path(tree) for tree in (params, grads, new_params)]
    rows = []
    for group in _checked(groups, trees[0]):
        squared = gradient_squared = moved = along = jnp.zeros(())
        for path in group:
            w, g, new = (tree[path].astype(_wide(tree[path])) for tree in trees)
            d = new - w
            squared += jnp.sum(w * w)
            gradient_squared += jnp.sum(g * g)
            moved += jnp.sum(d * d)
            along += jnp.sum(w * d)
        across = jnp.maximum(moved - along**2 / jnp.where(squared > 0, squared, 1), 0)
        angle = jnp.arctan2(jnp.sqrt(across * squared), squared + along)
        rows.append((jnp.sqrt(squared), jnp.sqrt(gradient_squared), angle))
    return AngularUpdate(*(jnp.stack(column) for column in zip(*rows, strict=True)))


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

    The file holds a line of JSON for each step: the step, and lists with an entry for each group.
    When a run is resumed, what it had logged of steps that it takes again is dropped.

    Attributes:
      groups: see `angular_update`.
    """

    FIELDS = ("norm", "gradient_norm", "angle", "effective_rate", "equilibrium")

    def __init__(
        self,
        groups: Groups,
        *,
        learning_rate: float | Callable[[int], float],
        weight_decay: float,
        momentum: float = 0.0,
        path: str | Path | None = None,
    ):
        """Nothing is logged yet; a file from before stays until the first call.

        Args:
          groups: see `angular_update`.
          learning_rate: η, or a schedule of it by step.
          weight_decay: λ.
          momentum: α.
          path: of the file; None keeps the log in memory alone.

        Raises:
          ValueError: as `equilibrium_angle`.
        """
        self.groups = groups
        self._rate = learning_rate if callable(learning_rate) else lambda step: learning_rate
        self._decay, self._momentum = weight_decay, momentum
        equilibrium_angle(float(self._rate(0)), weight_decay, momentum)
        self._path = None if path is None else Path(path)
        self._rows: list[tuple[int, np.ndarray]] = []  # step, [fields, groups]
        self._begun = False

    def observe(self, params: Any, grads: Any, new_params: Any) -> AngularUpdate:
        """Give this to `make_train_step`."""
        return angular_update(params, grads, new_params, groups=self.groups)

    def __call__(self, steps: int, metrics: Any) -> None:
        """Give this to `train` as on_metrics.

        Args:
          steps: taken before those of the metrics.
          metrics: with `observed` of each step.
        """
        norm, gradient_norm, angle = (
            np.asarray(field, np.float64).reshape(-1, len(self.groups))
            for field in metrics.observed
        )
        taken = range(steps, steps + len(norm))
        rates = np.array([float(self._rate(step)) for step in taken])[:, None]
        with np.errstate(divide="ignore"):
            effective = rates / np.square(norm)
        predicted = [equilibrium_angle(rate, self._decay, self._momentum) for rate in rates[:, 0]]
        equilibrium = np.broadcast_to(np.array(predicted)[:, None], norm.shape)
        table = np.stack([norm, gradient_norm, angle, effective, equilibrium], axis=1)
        if not self._begun:
            self._begun = True
            self._resume(steps)
        self._rows += zip(taken, table, strict=True)
        if self._path is not None:
            with self._path.open("a") as file:
                file.writelines(_line(step, row) for step, row in zip(taken, table, strict=True))

    @property
    def steps(self) -> np.ndarray:
        """The steps that are logged, from 0."""
        return np.array([step for step, _ in self._rows], int)

    def __getitem__(self, field: str) -> Float[np.ndarray, "steps groups"]:
        """One of FIELDS, at every step that is logged."""
        column = self.FIELDS.index(field)
        rows = [row[column] for _, row in self._rows]
        return np.array(rows).reshape(len(rows), len(self.groups))

    def _resume(self, steps: int) -> None:
        """Takes from the file what was logged of the steps before, and drops the rest."""
        if self._path is None:
            return
        lines = self._path.read_text().splitlines(keepends=True) if self._path.exists() else []
        kept = []
        for line in lines[:steps]:
            if not line.endswith("\n"):
                break  # cut short by a kill
            record = json.loads(line)
            values = [record[field] for field in self.FIELDS]
            self._rows.append((record["step"], np.array(values, np.float64)))
            kept.append(line)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("".join(kept))


def _line(step: int, row: np.ndarray) -> str:
    record: dict[str, Any] = {"step": step}
    for field, values in zip(ScaleLog.FIELDS, row, strict=True):
        record[field] = [float(value) if math.isfinite(value) else None for value in values]
    return json.dumps(record) + "\n"


def _wide(x: Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def _by_path(tree: Any) -> dict[str, Array]:
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _checked(groups: Groups, leaves: dict[str, Array]) -> list[Sequence[str]]:
    """Groups as sequences of paths, all of which exist."""
    if not groups:
        raise ValueError("groups is empty: give at least one path of a leaf")
    found = [(group,) if isinstance(group, str) else group for group in groups]
    for path in (path for group in found for path in group):
        if path not in leaves:
            raise ValueError(f"groups names {path!r}, which is not among {', '.join(leaves)}")
    return found
