"""Internal covariate shift (ICS): how far training moves what a layer works on; both measures.

**Distribution drift** is what BN was invented against: the distribution of what a nonlinearity
receives changes while the layers below learn. Figure 1 of Ioffe & Szegedy shows it as the
{15, 50, 85} percentiles of one typical unit; `percentiles` gives those of all units at one time and
`distribution_drift` says how far they move, in widths of the distribution.

**Gradient shift** is what an optimizer would notice of it. Layer i takes its step along G, and the
layers below take theirs at the same time; by how much would that have changed G?

    G  = ∇_{W_i} L(W_1, …, W_k)
    G′ = ∇_{W_i} L(W⁺_1, …, W⁺_{i−1}, W_i, …, W_k)        ICS = ‖G − G′‖₂

W before the step and W⁺ after, on the batch of the step. Drift can be large where the gradient does
not turn, and small where it does: they are two measures, not two estimates of one.

Source: S. Ioffe, C. Szegedy, "Batch normalization: accelerating deep network training by reducing
internal covariate shift", ICML 2015, arXiv 1502.03167, section 4.1 and figure 1; S. Santurkar,
D. Tsipras, A. Ilyas, A. Madry, "How does batch normalization help optimization?", NeurIPS 2018,
arXiv 1805.11604, definition 2.1. The paper gives no number to figure 1; the one here is ours.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from bn_research.probes.one_device import with_axis_told
from bn_research.probes.perturbation import first_uses

LossFn = Callable[[Any], Float[Array, ""]]
Layers = Sequence[str | Sequence[str]]

# --- of the distribution ---


def percentiles(
    x: Float[Array, "batch ... units"], *, levels: Sequence[float] = (15.0, 50.0, 85.0)
) -> Float[Array, "levels units"]:
    """Percentiles of every unit over examples and positions, float32 or wider.

    With linear interpolation between order statistics, as numpy. Made to be called inside a jitted
    training program, on a measuring set that stays the same. NaN for a unit that holds a NaN.

    Args:
      x: pre-activations, what the nonlinearity receives: after BN and its scale and bias.
      levels: ascending, in percent; the first and the last define the width of a distribution.

    Raises:
      ValueError: x is not floating-point, has no unit axis beside the batch or no elements; no
        levels, or levels that do not ascend within [0, 100].
    """
    x = jnp.asarray(x)
    _check_floating("x", x.dtype)
    if x.ndim < 2 or not x.size:
        raise ValueError(f"x has shape {x.shape}: allowed is [batch, ..., units] with elements")
    ascending = all(a < b for a, b in zip(levels, levels[1:], strict=False))
    if not len(levels) or not ascending or not all(0 <= level <= 100 for level in levels):
        raise ValueError(
            f"levels={tuple(levels)} is not allowed: give at least one, ascending within [0, 100]"
        )
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(-1, x.shape[-1])
    return jnp.percentile(x, jnp.asarray(levels, x.dtype), axis=0)


class DistributionDrift(NamedTuple):
    """How far the distribution of each unit moved, in its own widths; float64.

    A unit has no width where its percentiles coincide, as those of a dead one do. Between two such
    times its movement is 0 where it stays and ∞ where it moves; `constant` marks it, so that it can
    be counted and a mean over units can say what it does with it. NaN as `percentile_distance`.
    """

    movement: Float[np.ndarray, "intervals units"]  # between successive times
    path: Float[np.ndarray, "units"]  # the sum of movement
    net: Float[np.ndarray, "units"]  # between the first and the last time
    constant: Bool[np.ndarray, "units"]  # without width at one time or more


def distribution_drift(percentiles: Float[np.ndarray, "times levels units"]) -> DistributionDrift:
    """Path and net displacement of every unit's distribution by `percentile_distance`, on the host.

    A path depends on how often it is measured, and noise of the measurement adds to each of its
    parts: compare paths of the same times and the same number of examples. The net displacement
    holds that noise once. The noise floor is `percentile_distance` between the percentiles of two
    disjoint halves of the measuring set at one time; halves are noisier than the whole by √2, and
    a set that stays the same over time shares its noise, so that the floor is on the safe side.

    Args:
      percentiles: of `percentiles`, at two times or more.

    Raises:
      ValueError: fewer than two times; as `percentile_distance`.
    """
    p = np.asarray(percentiles)
    if p.ndim != 3 or len(p) < 2:
        raise ValueError(
            f"percentiles has shape {p.shape}: allowed is [times, levels, units], 2 times or more"
        )
    movement = percentile_distance(p[:-1], p[1:])
    return DistributionDrift(
        movement=movement,
        path=movement.sum(axis=0),
        net=percentile_distance(p[0], p[-1]),
        constant=np.any(p[:, 0] == p[:, -1], axis=0),
    )


def percentile_distance(
    a: Float[np.ndarray, "... levels units"], b: Float[np.ndarray, "... levels units"]
) -> Float[np.ndarray, "... units"]:
    """How far apart two distributions of each unit are, in units of their mean width; float64.

        d = ⟨|b_l − a_l|⟩_l / ½(r_a + r_b)        r = p_last − p_first

    with ⟨·⟩_l the mean over levels. Symmetric, and the same after any affine map of both. A shift
    by s widths gives s; a change of the width alone by any factor, about a median halfway between
    15 and 85, gives at most 2/3. Without width at both, d is 0 where a = b and ∞ otherwise. NaN
    where a percentile is not finite.

    Args:
      a: percentiles at ascending levels.
      b: likewise, at the same levels.

    Raises:
      ValueError: arrays that are not floating-point, of two shapes, with fewer than two levels, or
        whose percentiles descend.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.ndim < 2 or a.shape[-2] < 2:
        raise ValueError(
            f"percentiles have shapes {a.shape} and {b.shape}: allowed is one shape "
            "[..., levels, units] with 2 levels or more"
        )
    _check_floating("percentiles", a.dtype)
    _check_floating("percentiles", b.dtype)
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        if any(np.any(np.diff(p, axis=-2) < 0) for p in (a, b)):
            raise ValueError("percentiles descend along their axis of levels: they must ascend")
        apart = np.mean(np.abs(b - a), axis=-2)
        width = (a[..., -1, :] - a[..., 0, :] + b[..., -1, :] - b[..., 0, :]) / 2
        return np.where((apart == 0) & (width == 0), 0.0, apart / width)


# --- of the gradient ---


class GradientShift(NamedTuple):
    """How far apart two gradients G and G′ are, by layer; [layers] each, float32 or wider.

    Where both are 0, relative is 0 and cosine 1: they are equal. Where one is, cosine is 0, and
    relative is ∞ if that one is G. NaN where a gradient is not finite.
    """

    relative: Float[Array, "layers"]  # ‖G − G′‖/‖G‖
    absolute: Float[Array, "layers"]  # ‖G − G′‖
    cosine: Float[Array, "layers"]  # ⟨G, G′⟩/(‖G‖·‖G′‖)
    norm: Float[Array, "layers"]  # ‖G‖


def gradient_shift(
    loss_fn: LossFn, params: Any, new_params: Any, layers: Layers | None = None
) -> GradientShift:
    """Gradient-based ICS of a step: definition 2.1 of Santurkar et al. (2018), by layer.

        gradient_shift(loss_fn, params, new_params)  # every layer, in the order of use
        layers = ["['dense1']", ("['dense2']", "['batch_norm2']"), "['dense3']"]
        jax.jit(lambda old, new: gradient_shift(loss_fn, old, new, layers))

    The first layer has none below: it is listed, and its shift is 0. Compare with `gradient_noise`.
    Cost: one gradient a layer, one by one in a loop: compiled once, in the memory of two. Jit it.

    Args:
      loss_fn: params -> scalar loss on the batch of the step, traceable. A network with BN in
        training mode: its statistics are then those of the batch under the mixed parameters, and
        are differentiated through.
      params: before the step; any pytree of floating-point arrays.
      new_params: after the step; like params.
      layers: bottom to top, each a path or several, as `jax.tree_util.keystr` prints them, of a
        leaf or of all leaves below it: "['dense1']" holds "['dense1']['kernel']". BN's scale and
        bias belong to their layer. Every leaf is in one layer: one left out would never move.
        None for `layers_of(loss_fn, params)`, where a BN is a layer of its own.

    Raises:
      ValueError: no layers, an empty one, a path that params do not have, a leaf in two layers or
        in none; params that are not floating-point, or new_params that are not like them.
    """
    loss_fn = with_axis_told(loss_fn)
    layers = layers_of(loss_fn, params) if layers is None else layers
    level, leaves, treedef = _checked(params, layers)
    new = _like(new_params, params)
    gradient = jax.grad(lambda leaves: loss_fn(jax.tree.unflatten(treedef, leaves)))

    def shift(first, i):
        mixed = [jnp.where(at < i, n, w) for at, n, w in zip(level, new, leaves, strict=True)]
        g = gradient(mixed)
        # G comes from the first round: a program of its own would round in its own way.
        first = [jnp.where(i == 0, x, y) for x, y in zip(g, first, strict=True)]
        found = _compare(first, g, [at == i for at in level])
        relative, absolute = (i > 0) * found.relative, (i > 0) * found.absolute
        return first, found._replace(relative=relative, absolute=absolute)

    start = [jnp.zeros_like(leaf) for leaf in leaves]
    return jax.lax.scan(shift, start, jnp.arange(len(layers)))[1]


def layers_of(loss_fn: LossFn, params: Any) -> list[str]:
    """Paths of the layers of params, in the order in which loss_fn uses them: bottom to top.

    A layer is what holds leaves, such as a Flax module: "['dense1']" of "['dense1']['kernel']", and
    a leaf that nothing but the whole tree holds is one by itself. Those that are not used at all
    come last.

    Raises:
      ValueError: as `gradient_shift`.
    """
    named = jax.tree_util.tree_leaves_with_path(params)
    order = sorted(enumerate(first_uses(loss_fn, params)), key=lambda pair: pair[1])
    names = []
    for i, _ in order:
        path = named[i][0]
        # nnx.State ends its paths in the attribute that holds a variable's array.
        path = path[:-1] if str(path[-1:]) == str((jax.tree_util.GetAttrKey("value"),)) else path
        names.append(jax.tree_util.keystr(path[:-1] or path))
    return list(dict.fromkeys(names))


def gradient_noise(
    loss_a: LossFn, loss_b: LossFn, params: Any, layers: Layers | None = None
) -> GradientShift:
    """The noise floor of `gradient_shift`: gradients of two disjoint batches at the same params.

    SGD follows gradients that sampling moves by this much from step to step: a shift well below it
    is invisible to it. With Σ the covariance of a batch's gradient, E‖G_a − G_b‖² = 2·tr Σ, so
    that a batch is off the mean gradient by 1/√2 of the distance that is reported.

    Args:
      loss_a: as loss_fn of `gradient_shift`; its gradient is G.
      loss_b: of another batch of the same size; its gradient is G′.
      params: as there.
      layers: as there.

    Raises:
      ValueError: as `gradient_shift`.
    """
    loss_a, loss_b = with_axis_told(loss_a), with_axis_told(loss_b)
    layers = layers_of(loss_a, params) if layers is None else layers
    level, leaves, treedef = _checked(params, layers)
    a, b = (
        jax.grad(lambda leaves, loss=loss: loss(jax.tree.unflatten(treedef, leaves)))(leaves)
        for loss in (loss_a, loss_b)
    )
    return jax.lax.map(lambda i: _compare(a, b, [at == i for at in level]), jnp.arange(len(layers)))


def _compare(g: Sequence[Array], other: Sequence[Array], member: Sequence[Array]) -> GradientShift:
    """Of the leaves that are members, taken as one vector; scalars."""
    wide = jnp.result_type(jnp.float32, *g)

    def unit(leaves):
        """Largest magnitude, the leaves over it and their norm: squares of 1e-20 underflow."""
        kept = [jnp.where(m, x.astype(wide), 0) for m, x in zip(member, leaves, strict=True)]
        largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in kept]))
        kept = [x / jnp.where(largest == 0, 1, largest) for x in kept]
        return largest, kept, jnp.sqrt(_dot(kept, kept))

    apart = [x.astype(wide) - y.astype(wide) for x, y in zip(g, other, strict=True)]
    (g_size, g, g_norm), (_, other, other_norm) = unit(g), unit(other)
    apart_size, _, apart_norm = unit(apart)
    relative = apart_size / g_size * (apart_norm / g_norm)
    both = g_norm * other_norm
    cosine = jnp.clip(_dot(g, other) / jnp.where(both == 0, 1, both), -1, 1)
    return GradientShift(
        relative=jnp.where(apart_norm == 0, 0, jnp.where(g_norm == 0, jnp.inf, relative)),
        absolute=apart_size * apart_norm,
        cosine=jnp.where((g_norm == 0) & (other_norm == 0), 1, cosine),
        norm=g_size * g_norm,
    )


def _dot(a: Sequence[Array], b: Sequence[Array]) -> Array:
    return jnp.sum(jnp.stack([jnp.sum(x * y) for x, y in zip(a, b, strict=True)]))


def _checked(params: Any, layers: Layers) -> tuple[list[int], list[Array], Any]:
    """The number of the layer of every leaf, the leaves, and the tree that they make."""
    named, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = [jnp.asarray(leaf) for _, leaf in named]
    holders = [{jax.tree_util.keystr(p[:n]) for n in range(len(p) + 1)} for p, _ in named]
    names = [jax.tree_util.keystr(path) for path, _ in named]
    for name, leaf in zip(names, leaves, strict=True):
        _check_floating(f"params{name}", leaf.dtype)
    if not layers:
        raise ValueError("layers is empty: give at least one path")
    level: dict[int, int] = {}
    for i, layer in enumerate(layers):
        if not layer and layer != "":
            raise ValueError(f"layers={layers!r} holds an empty layer: give each at least one path")
        for path in (layer,) if isinstance(layer, str) else layer:
            held = [j for j, holder in enumerate(holders) if path in holder]
            if not held:
                raise ValueError(f"layers names {path!r}, which holds none of {', '.join(names)}")
            for j in held:
                if level.setdefault(j, i) != i:
                    raise ValueError(f"layers {level[j]} and {i} both hold {names[j]}: allowed one")
    left_out = [name for j, name in enumerate(names) if j not in level]
    if left_out:
        raise ValueError(f"layers hold no {', '.join(left_out)}: every leaf must be in a layer")
    return [level[j] for j in range(len(leaves))], leaves, treedef


def _like(new_params: Any, params: Any) -> list[Array]:
    """Leaves of new_params, which have the paths, shapes and dtypes of params."""
    new, old = (
        {jax.tree_util.keystr(path): jnp.asarray(leaf) for path, leaf in named}
        for named in map(jax.tree_util.tree_leaves_with_path, (new_params, params))
    )
    if new.keys() != old.keys():
        raise ValueError(f"new_params has leaves {', '.join(new)}, params {', '.join(old)}")
    for path, leaf in old.items():
        if new[path].shape != leaf.shape or new[path].dtype != leaf.dtype:
            found, allowed = jax.typeof(new[path]), jax.typeof(leaf)
            raise ValueError(f"new_params{path} is {found}: allowed is {allowed}, as params has")
    return [new[path] for path in old]


def _check_floating(name: str, dtype: Any) -> None:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {dtype}: it must be floating-point")
