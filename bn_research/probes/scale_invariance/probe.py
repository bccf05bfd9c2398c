"""The audit: a loss, its slopes at random points, and the losses of scaled leaves."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from bn_research.claims.figures import Figure
from bn_research.probes.one_device import with_axis_told
from bn_research.probes.scale_invariance.figure import draw
from bn_research.probes.scale_invariance.groups import smallest_groups
from bn_research.probes.scale_invariance.rows import Row, Rows
from bn_research.probes.scale_invariance.table import as_table

LossFn = Callable[[Any], Float[Array, ""]]

_ROWS = 16  # scaled losses of one compiled call, one after the other
_NEARLY = 10  # times the tolerance: what is left out of groups
_DEVIATION, _SHARE = 1e-4, 2e-3  # default limits; rounding raises them where it is coarse,
_ROUNDING = 2  # times what is measured of the share; scales of two leave less of the loss's
_TWINS = 4  # points that are measured again next to themselves,
_NEXT = 1e-3  # relative: far enough for bfloat16 to round in another way
_SPREAD = 0.5  # of the random points, relative to a leaf's root mean square
_SUBSTITUTE = 0.1  # standard deviation of what stands in for a leaf of zeros


class Audit(Rows):
    """What `audit` found out, as numbers, as a table and as a figure."""

    def __repr__(self) -> str:
        return self.table()

    def table(self, learning_rate: float = 1.0) -> str:
        """All rows, the groups and what weight decay does, as text for a terminal."""
        return as_table(self, learning_rate)

    def figure(self, path: str | Path, learning_rate: float = 1.0) -> Figure:
        """Radial share and effective learning rate of every leaf, as a PNG file."""
        return draw(self, path, learning_rate)


def audit(
    loss_fn: LossFn,
    params: Any,
    *,
    scales: Sequence[float] = (0.5, 2.0),
    tolerance: float | None = None,
) -> Audit:
    """Finds out to which of its leaves' scales a loss is invariant.

    An invariant leaf w passes two tests: |L(a·w) − L(w)| ≤ δ·|L| for every scale a, and
    |⟨w, g⟩| ≤ s·‖w‖·‖g‖ over random points around params, in root mean square. A leaf that hardly
    moves the loss, such as a small bias, passes the first and not the second. |L| is the larger of
    the loss at params and the median over the points, because a loss fitted to 1e-6 consists of
    rounding. Leaves of zeros, which no factor changes, are given small random values for both
    tests; norms and radial share are those at params. Groups are proposed by the null space of
    ⟨w, g⟩ over the points, and kept when both tests hold for them.

    An ε in BN gives deviations of the order of ε/σ², σ² the variance of what is normalized. Shares
    are larger still, by the ratio of what the scale of BN's output moves to ‖w‖·‖g‖: tenfold, where
    a mean over many positions follows. By default δ = 1e-4 and s = 2e-3, which is more than
    ε = 1e-5 gives and less than leaves that are not invariant have, about 1/√(elements). For
    ε = 1e-3 give tolerance=1e-2.

    Where the loss rounds more coarsely, as in bfloat16, δ is raised to the rounding of the loss and
    s to twice the rounding of the share. Both are measured between points and their neighbours at a
    relative distance of 1e-3: that of the loss is the part of its change that the gradients do not
    explain, that of ⟨w, g⟩ its second difference, leaf by leaf.

    Cost: each leaf takes a forward pass for every scale and one more, at most twice that when there
    are groups, and a backward pass; rounding takes eight passes. All run one after the other in two
    compiled programs, in the memory of one training step.

    Args:
      loss_fn: params -> scalar loss, traceable and deterministic. A network with BN in training
        mode, on a batch that the function holds.
      params: a pytree of floating-point arrays.
      scales: positive factors other than 1. Powers of two are exact in floating point, so that what
        is left of the loss is the network's.
      tolerance: δ and s, in (0, 1); None for those above.

    Raises:
      ValueError: no leaves, or one that is not floating-point or not finite; a loss that is not a
        floating-point scalar, not finite or not differentiable, with the leaf at fault; bad scales
        or tolerance.
    """
    _check_options(scales, tolerance)
    loss_fn = with_axis_told(loss_fn)
    paths, leaves, treedef = _checked_leaves(params)

    def loss_of(leaves: Sequence[Array]) -> Array:
        return loss_fn(jax.tree.unflatten(treedef, leaves))

    _check_loss(loss_of, leaves)
    key = jax.random.key(0)
    tested, random = _stand_ins(key, leaves)

    slopes = jax.jit(functools.partial(_slopes, loss_of))
    try:
        here = jax.device_get(slopes(leaves, leaves))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise _not_differentiable(loss_of, leaves, paths, error) from error
    _check_finite(here, paths)
    twins: list[tuple[_Slopes, _Slopes, _Slopes]] = []
    around = []
    for i in range(1, max(len(leaves), 1 if tolerance else 1 + _TWINS)):
        point = _point(jax.random.fold_in(key, i), tested)
        step = _step(jax.random.fold_in(key, len(leaves) + _TWINS + i), point)
        around.append(jax.device_get(slopes(point, step)))
        if tolerance is None and i <= _TWINS:
            beside = [[w + sign * d for w, d in zip(point, step, strict=True)] for sign in (1, -1)]
            ahead, behind = jax.device_get([slopes(at, step) for at in beside])
            if all(map(_is_finite, (around[-1], ahead, behind))):
                twins.append((around[-1], ahead, behind))
    points = [point for point in [here, *around] if _is_finite(point)]
    reference = max(abs(float(here.loss)), float(np.median([abs(p.loss) for p in points]))) or 1.0
    deviation_limit = tolerance or max(
        [_DEVIATION, *(_loss_rounding(a, b) / reference for a, b, _ in twins)]
    )

    def rounding(group: Sequence[int]) -> float:
        # Second differences: what changes steadily is no rounding.
        changes = [
            a._replace(share=(b.share + c.share - 2 * a.share) / 6**0.5) for a, b, c in twins
        ]
        return _ROUNDING * _pooled_share(changes, group) if changes else 0.0

    def pooled_limit(group: Sequence[int]) -> float:
        return tolerance or max(_SHARE, rounding(group))

    scaled = jax.jit(functools.partial(_scaled_losses, loss_of))
    count = len(leaves)
    factors = np.ones((1 + count * (len(scales) + 1), count))
    replaced = np.full(len(factors), -1)
    for i in range(count):
        first = 1 + i * (len(scales) + 1)
        factors[first : first + len(scales), i] = scales
        replaced[first + len(scales)] = i
    losses = _in_chunks(scaled, tested, random, factors, replaced)
    base, table = losses[0], losses[1:].reshape(count, -1)
    _check_scaled(base, table[:, :-1], scales, paths)
    scaling = np.abs(table[:, :-1] - base).max(axis=1) / reference
    influence = np.max([point.influence for point in points], axis=0)
    effect = np.maximum(np.abs(table[:, -1] - base), influence) / reference

    shares = [_pooled_share(points, [i]) for i in range(count)]
    limits = [pooled_limit([i]) for i in range(count)]
    rows = []
    for i, path in enumerate(paths):
        kind, degree = _classify(
            base,
            table[i, :-1],
            scales,
            deviation_limit,
            scaling[i],
            effect[i],
            radial=shares[i] > limits[i],
        )
        rows.append(
            Row(
                path=path,
                kind=kind,
                degree=degree,
                deviation=float(scaling[i]),
                radial_share=float(here.share[i]),
                pooled_share=shares[i],
                norm=float(here.norm[i]),
                gradient_norm=float(here.gradient_norm[i]),
                size=leaves[i].size,
                pooled_limit=limits[i],
            )
        )

    # A leaf that BN's ε alone keeps from being invariant would hide the groups below it.
    nearly = _NEARLY * deviation_limit
    rest = [
        i
        for i, row in enumerate(rows)
        if not row.scale_invariant
        and (row.deviation > nearly or row.pooled_share > max(nearly, rounding([i])))
    ]
    groups = [
        group
        for group in _proposed_groups(points, rest)
        if _pooled_share(points, group) <= pooled_limit(group)
    ]
    if groups:
        factors = np.ones((len(groups), len(scales), count))
        for i, group in enumerate(groups):
            factors[i, :, group] = scales
        factors = factors.reshape(-1, count)
        losses = _in_chunks(scaled, tested, random, factors, np.full(len(factors), -1))
        off = np.abs(losses - base).reshape(len(groups), -1).max(axis=1) / reference
        groups = _smallest(
            [group for group, at in zip(groups, off, strict=True) if at <= deviation_limit]
        )
    together = [tuple(paths[i] for i in group) for group in groups]
    return Audit(
        rows,
        together,
        loss=float(here.loss),
        scales=scales,
        tolerance=deviation_limit,
        pooled_limit=tolerance or _SHARE,
    )


class _Slopes(NamedTuple):
    """Loss and gradient at a point, without underflow; [leaves] each but loss and along."""

    loss: Array
    share: Array  # ⟨w, g⟩/(‖w‖·‖g‖)
    norm: Array
    gradient_norm: Array
    finite: Bool[Array, "leaves"]
    along: Array  # Σ ⟨d, g⟩ along a step d

    @property
    def influence(self) -> np.ndarray:
        """‖w‖·‖g‖: how much a change of a leaf as large as itself can move the loss."""
        return np.asarray(self.norm, np.float64) * np.asarray(self.gradient_norm, np.float64)


def _slopes(
    loss_of: Callable[..., Array], leaves: Sequence[Array], step: Sequence[Array]
) -> _Slopes:
    loss, gradient = jax.value_and_grad(loss_of)(leaves)
    share, norm, gradient_norm = [], [], []
    for w, g in zip(leaves, gradient, strict=True):
        (w_max, w_unit), (g_max, g_unit) = _normalized(w), _normalized(g)
        w_norm, g_norm = jnp.linalg.norm(w_unit), jnp.linalg.norm(g_unit)
        both = w_norm * g_norm
        share.append(jnp.vdot(w_unit, g_unit) / jnp.where(both > 0, both, 1))
        norm.append(w_max * w_norm)
        gradient_norm.append(g_max * g_norm)
    finite = jnp.stack([jnp.all(jnp.isfinite(g)) for g in gradient])
    wide = jnp.promote_types(loss.dtype, jnp.float32)
    products = [
        jnp.vdot(d.astype(wide), g.astype(wide)) for d, g in zip(step, gradient, strict=True)
    ]
    along = jnp.sum(jnp.stack(products))
    return _Slopes(loss, jnp.stack(share), jnp.stack(norm), jnp.stack(gradient_norm), finite, along)


def _loss_rounding(a: _Slopes, b: _Slopes) -> float:
    """What is left of a small change of the loss that the slopes at both ends do not explain."""
    change = np.float64(b.loss) - np.float64(a.loss)
    return float(abs(change - (np.float64(a.along) + np.float64(b.along)) / 2))


def _normalized(x: Array) -> tuple[Array, Array]:
    """Largest magnitude, and x over it: squares of 1e-20 underflow in float32."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32)).ravel()
    largest = jnp.max(jnp.abs(x), initial=0)
    return largest, x / jnp.where(largest > 0, largest, 1)


def _size(w: Array) -> Array:
    """Root mean square."""
    largest, unit = _normalized(w)
    return (largest * jnp.linalg.norm(unit) / max(w.size, 1) ** 0.5).astype(w.dtype)


def _noise_like(key: Array, leaves: Sequence[Array]) -> list[Array]:
    # One draw for all: XLA takes seconds to compile one for each leaf.
    dtype = jnp.result_type(jnp.float32, *leaves)
    flat = jax.random.normal(key, (sum(w.size for w in leaves),), dtype)
    parts = jnp.split(flat, np.cumsum([w.size for w in leaves])[:-1])
    return [part.reshape(w.shape).astype(w.dtype) for part, w in zip(parts, leaves, strict=True)]


@jax.jit
def _stand_ins(key: Array, leaves: Sequence[Array]) -> tuple[list[Array], list[Array]]:
    """The leaves with noise for those of zeros; and noise of each leaf's size, or of 1."""
    noise = _noise_like(key, leaves)
    tested = [
        jnp.where(jnp.any(w != 0), w, _SUBSTITUTE * n) for w, n in zip(leaves, noise, strict=True)
    ]
    return tested, [jnp.maximum(_size(w), 1) * n for w, n in zip(leaves, noise, strict=True)]


@jax.jit
def _point(key: Array, leaves: Sequence[Array]) -> list[Array]:
    """A random point around leaves: each turned, and scaled by a factor from 1/2 to 2."""
    scale_key, noise_key = jax.random.split(key)
    factors = jnp.exp2(jax.random.uniform(scale_key, (len(leaves),), minval=-1.0, maxval=1.0))
    noise = _noise_like(noise_key, leaves)
    return [
        factor.astype(w.dtype) * (w + _SPREAD * _size(w) * n)
        for factor, w, n in zip(factors, leaves, noise, strict=True)
    ]


@jax.jit
def _step(key: Array, leaves: Sequence[Array]) -> list[Array]:
    """A small random step from leaves."""
    noise = _noise_like(key, leaves)
    return [(_NEXT * w * n).astype(w.dtype) for w, n in zip(leaves, noise, strict=True)]


def _scaled_losses(
    loss_of: Callable[..., Array],
    leaves: Sequence[Array],
    random: Sequence[Array],
    factors: Float[Array, "rows leaves"],
    replaced: Array,
) -> Float[Array, "rows"]:
    """Loss with every leaf times its factor, and leaf number `replaced` random instead."""

    def loss(row):
        factor, chosen = row
        return loss_of(
            [
                jnp.where(chosen == i, r, factor[i].astype(w.dtype) * w)
                for i, (w, r) in enumerate(zip(leaves, random, strict=True))
            ]
        )

    return jax.lax.map(loss, (factors, replaced))


def _in_chunks(program, leaves, random, factors, replaced) -> np.ndarray:
    """Losses of any number of rows by a program of fixed shape; float64."""
    short = -len(factors) % _ROWS
    factors = np.pad(factors, [(0, short), (0, 0)], mode="edge")
    replaced = np.pad(replaced, (0, short), mode="edge")
    chunks = [
        program(leaves, random, factors[i : i + _ROWS], replaced[i : i + _ROWS])
        for i in range(0, len(factors), _ROWS)
    ]
    losses = np.concatenate([np.asarray(chunk, np.float64) for chunk in chunks])
    return losses[: len(losses) - short]


def _pooled_share(points: Sequence[_Slopes], leaves: Sequence[int]) -> float:
    """Root mean square of ⟨w, g⟩ of some leaves together over that of ‖w‖·‖g‖; 0 without one."""
    influence = np.stack([point.influence[leaves] for point in points])
    influence /= influence.max(initial=0) or 1
    radial = influence * np.stack([point.share[leaves] for point in points])
    size = np.linalg.norm(influence)
    return float(np.linalg.norm(radial.sum(axis=1)) / size) if size else 0.0


def _proposed_groups(points: Sequence[_Slopes], rest: Sequence[int]) -> list[list[int]]:
    """Of the leaves that are left those that may be invariant only together, by their slopes."""
    slopes = np.stack([point.share[rest] * point.influence[rest] for point in points])
    return [[rest[i] for i in group] for group in smallest_groups(slopes)]


def _smallest(groups: Sequence[list[int]]) -> list[list[int]]:
    """Those that hold no other."""
    return [group for group in groups if not any(set(other) < set(group) for other in groups)]


def _classify(base, losses, scales, tolerance, scaling, effect, *, radial):
    """Kind and degree of a leaf; radial: whether its gradient has a part along it."""
    if effect <= tolerance:  # its gradient is rounding, without a direction
        return "no effect", 0.0
    if scaling <= tolerance and not radial:
        return "invariant", 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        degrees = np.log(losses / base) / np.log(scales)
    degree = float(np.mean(degrees))
    if np.all(np.abs(degrees - degree) <= tolerance * abs(degree)) and abs(degree) > tolerance:
        return "homogeneous", degree
    return "none", float("nan")


def _check_options(scales: Sequence[float], tolerance: float | None) -> None:
    if not len(scales) or not all(0 < a < float("inf") and a != 1 for a in scales):
        raise ValueError(
            f"scales={tuple(scales)} is not allowed: give at least one positive factor, none of "
            "them 1"
        )
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(f"tolerance={tolerance!r} is not allowed: it must lie between 0 and 1")


def _checked_leaves(params: Any) -> tuple[list[str], list[Array], Any]:
    named, treedef = jax.tree_util.tree_flatten_with_path(params)
    if not named:
        raise ValueError("params has no leaves: give the parameters that loss_fn takes")
    paths = [jax.tree_util.keystr(path) for path, _ in named]
    leaves = []
    for path, (_, leaf) in zip(paths, named, strict=True):
        try:
            leaf = jnp.asarray(leaf)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"params{path} is a {type(leaf).__name__}: allowed are floating-point arrays"
            ) from error
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"params{path} has dtype {leaf.dtype}: allowed are floating-point arrays; let "
                "loss_fn hold what is not trained"
            )
        if not jnp.all(jnp.isfinite(leaf)):
            raise ValueError(f"params{path} holds values that are not finite")
        leaves.append(leaf)
    return paths, leaves, treedef


def _check_loss(loss_of: Callable[..., Array], leaves: Sequence[Array]) -> None:
    found = jax.tree.leaves(jax.eval_shape(loss_of, leaves))
    shapes = [getattr(leaf, "shape", None) for leaf in found]
    if shapes != [()]:
        what = f"an array of shape {shapes[0]}" if len(shapes) == 1 else f"{len(shapes)} arrays"
        raise ValueError(f"loss_fn returns {what}: it must return one scalar, the loss")
    if not jnp.issubdtype(found[0].dtype, jnp.floating):
        raise ValueError(f"loss_fn returns dtype {found[0].dtype}: the loss must be floating-point")


def _not_differentiable(loss_of, leaves, paths, error: Exception) -> ValueError:
    """The first leaf that the loss cannot be differentiated in, for the message."""
    reason = str(error).strip().split("\n")[0]
    for i, path in enumerate(paths):

        def loss_of_leaf(leaf, i=i):
            return loss_of([*leaves[:i], leaf, *leaves[i + 1 :]])

        try:
            jax.eval_shape(jax.grad(loss_of_leaf), leaves[i])
        except (TypeError, ValueError, NotImplementedError):
            return ValueError(f"loss_fn cannot be differentiated in params{path}: {reason}")
    return ValueError(f"loss_fn cannot be differentiated: {reason}")


def _is_finite(point: _Slopes) -> bool:
    return bool(np.isfinite(point.loss) and np.all(point.finite))


def _check_finite(here: _Slopes, paths: Sequence[str]) -> None:
    if not np.isfinite(here.loss):
        raise ValueError(
            f"loss_fn(params) is {here.loss}, and so for every leaf: it must be finite"
        )
    for path, finite in zip(paths, here.finite, strict=True):
        if not finite:
            raise ValueError(
                f"loss_fn is not differentiable at params{path}: its gradient there is not finite"
            )


def _check_scaled(base, losses, scales, paths) -> None:
    if not np.isfinite(base):
        raise ValueError(
            f"the loss is {base} when leaves of zeros are given small random values: give params "
            "without zeros"
        )
    for path, row in zip(paths, losses, strict=True):
        for scale, loss in zip(scales, row, strict=True):
            if not np.isfinite(loss):
                raise ValueError(
                    f"the loss is {loss} when params{path} is scaled by {scale:g}: give scales "
                    "nearer to 1"
                )
