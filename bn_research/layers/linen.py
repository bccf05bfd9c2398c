"""`BatchNorm` for flax.linen: takes the place of `flax.linen.BatchNorm`.

Fields, defaults, parameter and variable names, shapes, dtypes and initial values are Flax's, so an
existing checkpoint restores and an existing model trains unchanged. Where the numbers differ, Flax
loses digits: its one-pass variance is wrong at large means (relative error about (mean/std)²·2⁻²⁴,
clipped to 0 in the end), its masked statistics are when synced, and its running statistics change
dtype on float64 input. Masked elements come out as `bias` here, in inference too; Flax normalizes
them, and in inference takes no mask.

Ours is a subclass, so `isinstance(module, nn.BatchNorm)` finds both. To put it everywhere into code
that says `nn.BatchNorm`, say `nn.BatchNorm = BatchNorm` before that code is imported.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict, freeze
from flax.core.scope import DenyList
from flax.linen.module import merge_param
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool, Float

from bn_research.normalization import (
    BatchStats,
    Moments,
    batch_norm,
    merge_moments,
    normalize,
    population_stats,
    update_batch_stats,
)
from bn_research.normalization.batch_norm import few_values_allowed
from bn_research.normalization.batch_stats import check_momentum
from bn_research.normalization.moments import canonical_axes

MOMENTS = (
    "batch_moments"  # collection in which layers leave their moments where it is asked for by name
)


class BatchNorm(nn.BatchNorm):
    """Batch normalization: y = scale·(x − mean)/√(var + epsilon) + bias.

    Attributes:
      use_running_average: normalize by the running statistics in `batch_stats` rather than by the
        batch's own; here or in the call.
      axis: feature axis or axes; all others are reduced.
      momentum: of the running statistics, new = momentum·old + (1 − momentum)·batch.
      epsilon: added to the variance; 0 is allowed.
      dtype: of the result; None promotes the dtypes of input and parameters.
      param_dtype: of scale and bias.
      use_bias: add a bias, β.
      use_scale: multiply by a scale, γ.
      bias_init: initializer of bias.
      scale_init: initializer of scale.
      axis_name: axis of devices over which statistics are shared.
      axis_index_groups: share within these groups of devices only.
      use_fast_variance: Flax's choice between one pass and two. Accepted and without effect: the
        variance is always accurate.
      force_float32_reductions: False keeps the running statistics in param_dtype, as in Flax, where
        those of half precision hardly move; reductions run in float32 or wider all the same. With
        True, statistics that were cast to half precision become float32 with the first update.
      group_size: number of examples that share statistics, whatever the number of devices; None,
        or 0, is the whole batch.
      frozen: predicate on the layer's path in the model, such as ("encoder", "BatchNorm_0"). Where
        it is true the layer normalizes by its running statistics in training too, leaves them as
        they are, and its scale and bias receive no gradient (weight decay still reaches them:
        mask it in the optimizer). True and False hold for every path; so a subclass may have a
        field `frozen: bool` of its own.
    """

    group_size: int | None = None
    frozen: Callable[[tuple[str, ...]], bool] | bool | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "..."],
        use_running_average: bool | None = None,
        *,
        mask: Bool[Array, "..."] | None = None,
    ) -> Float[Array, "..."]:
        """Normalizes x; in training mode updates `batch_stats`, except while initializing.

        The new statistics carry the gradient of the batch's mean and variance, as Flax's do; cut it
        by `jax.lax.stop_gradient` where a loss is computed from them and must not train by them.

        Args:
          x: array; integers and bool are taken as float32.
          use_running_average: see the attribute of the same name.
          mask: broadcastable to x; elements where it is False are left out of the statistics and
            come out as bias, in inference too.

        Raises:
          ValueError: a bad axis, shape, dtype, momentum, epsilon, mask or group size.
        """
        use_running_average = merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        check_momentum(self.momentum)
        axes = canonical_axes(self.axis, x.ndim)
        shape = tuple(x.shape[axis] for axis in axes)
        stats_dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, stats_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, shape, stats_dtype)
        scale = bias = None
        if self.use_scale:
            scale = self.param("scale", self.scale_init, shape, self.param_dtype)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, shape, self.param_dtype)
        options: dict[str, Any] = dict(
            feature_axes=axes, epsilon=self.epsilon, where=mask, dtype=self.dtype
        )

        alone = self.is_initializing()  # the axis of devices need not exist yet, as in Flax
        frozen = self.frozen(self.path) if callable(self.frozen) else bool(self.frozen)
        if frozen and not alone:
            use_running_average = True
            scale, bias = jax.lax.stop_gradient((scale, bias))
            leave_moments(self, _no_moments(mean.value), self.momentum)
        if use_running_average:
            return normalize(x, mean.value, var.value, scale, bias, **options)
        if alone:
            with few_values_allowed():
                return batch_norm(x, scale, bias, **options)[0]
        y, moments = batch_norm(
            x,
            scale,
            bias,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            group_size=self.group_size or None,
            **options,
        )
        # A caller that asks for the moments alone, to merge those of several batches, updates the
        # running statistics later.
        left = leave_moments(self, moments, self.momentum)
        if not left or self.is_mutable_collection("batch_stats"):
            stats = update_batch_stats(
                BatchStats(mean.value, var.value), moments, momentum=self.momentum
            )
            if not self.force_float32_reductions:
                stats = BatchStats(*(leaf.astype(self.param_dtype) for leaf in stats))
            mean.value, var.value = stats
        return y


def leave_moments(module: nn.Module, moments: Moments, momentum: Any) -> bool:
    """Leaves moments and momentum in the collection MOMENTS; whether someone asked for it by name.

    `mutable=True` and `DenyList` name no collection: they keep the variables that the model has. A
    layer that is called again in the same pass merges its moments with those that it left. The
    momentum is of the moments' shape, so that `nn.scan` can lay both along any axis.

    A function, since `capture_intermediates` would see a method, and keep what it returns.
    """
    asked = module.scope.mutable if module.scope is not None else False
    if asked != MOMENTS and (isinstance(asked, (bool, str, DenyList)) or MOMENTS not in asked):
        return False
    none = jax.tree.map(jnp.zeros_like, moments)
    module.sow(MOMENTS, "moments", moments, init_fn=lambda: none, reduce_fn=merge_moments)
    keep = dict(init_fn=tuple, reduce_fn=lambda _, new: new)
    momentum = jnp.full(moments.mean.shape, momentum, jnp.float32)
    return module.sow(MOMENTS, "momentum", momentum, **keep)


def _no_moments(mean: Array) -> Moments:
    """What a frozen layer leaves: of no element, so that nothing moves."""
    zero = jnp.zeros(mean.shape, jnp.float32)
    return Moments(zero, zero, zero)


def merge_batch_moments(a: Any, b: Any) -> Any:
    """Moments of two disjoint batches, layer by layer: two `batch_moments` collections merged.

    The order and the sizes of the batches make no difference. A collection of zeros is the neutral
    element, so a `lax.scan` over microbatches can start with
    `jax.tree.map(jnp.zeros_like, moments)`.
    """

    def merge(a, b):
        # A momentum is that of both, or 0 in the neutral element.
        return merge_moments(a, b) if _is_moments(a) else jnp.maximum(a, b)

    return jax.tree.map(merge, a, b, is_leaf=_is_moments)


def update_from_batch_moments(
    batch_stats: Any,
    moments: Any,
    *,
    momentum: float | Float[Array, ""] | None = None,
    unbiased: bool = False,
    stop_gradient: bool = False,
) -> Any:
    """One update of a model's running statistics, new = momentum·old + (1 − momentum)·batch.

    With gradient accumulation a large batch is seen in parts. Apply the model to each with
    `mutable=[MOMENTS, "batch_stats"]` and keep the first of the two collections alone, merge those
    with `merge_batch_moments`, and update once: the statistics are those of the large batch, and
    the average moves by one step of each layer's momentum, not by one for each part. Models that
    look at whether `batch_stats` may change to tell training from inference are in training then.

    Layers inside `nn.scan` or `nn.vmap` leave their moments where the transformation is told to
    carry that collection, as it is told to carry the statistics:
    `nn.scan(..., variable_axes={"params": 0, "batch_stats": 0, MOMENTS: 0})`. Iterations that share
    one layer's statistics, by `variable_carry="batch_stats"`, have their moments merged. What such
    a transformation carries it asks for by name: with `mutable=True` too, its layers leave moments.

    Args:
      batch_stats: the model's running statistics.
      moments: a `batch_moments` collection of a training pass; frozen layers stay as they are.
      momentum: in [0, 1], of every layer; None is each layer's own.
      unbiased: see `bn_research.normalization.update_batch_stats`.
      stop_gradient: likewise.

    Raises:
      ValueError: momentum outside [0, 1], a layer that batch_stats lacks, or one that left no
        moments.
    """
    given = _by_layer(moments)
    stats = _stats_by_layer(batch_stats, given)
    new = {
        layer: update_batch_stats(
            old,
            _merged(given[layer]["moments"], old),
            momentum=jnp.ravel(given[layer]["momentum"])[0] if momentum is None else momentum,
            unbiased=unbiased,
            stop_gradient=stop_gradient,
        )
        for layer, old in stats.items()
    }
    return _with_stats(batch_stats, new)


def population_batch_stats(
    apply_fn: Callable[[Any, Any], Any],
    variables: Any,
    batches: Iterable[Any],
    *,
    method: Literal["algorithm2", "merged"] = "algorithm2",
) -> Any:
    """A model's `batch_stats` from batches seen with frozen weights, in place of running averages.

    Every layer normalizes by the batch while its moments are gathered, as in algorithm 2 of Ioffe
    & Szegedy (2015); see `bn_research.normalization.population_stats` for the two methods. Frozen
    layers keep what they have, and so do features without enough elements in any batch.

    Layers inside `nn.scan` or `nn.vmap` are found where the transformation carries the moments:
    `nn.scan(..., variable_axes={"params": 0, "batch_stats": 0, MOMENTS: 0})`.

    Args:
      apply_fn: (variables, batch) -> the model's `batch_moments` collection, that is
        `model.apply(variables, batch, train=True, mutable=[MOMENTS, "batch_stats"])[1][MOMENTS]`;
        jit it.
      variables: params and batch_stats.
      batches: training batches of the size that training used.
      method: "algorithm2" or "merged".

    Returns:
      A pytree like variables["batch_stats"].

    Raises:
      ValueError: an unknown method, no batches, a layer that batch_stats lacks, or one that left no
        moments.
    """
    batch_stats = variables["batch_stats"]

    def moments_of(batch):
        given = _by_layer(apply_fn(variables, batch))
        stats = _stats_by_layer(batch_stats, given)
        return {layer: _merged(given[layer]["moments"], old) for layer, old in stats.items()}

    layers = _stats_by_layer(batch_stats)
    new = population_stats(moments_of, batches, method=method, initial=layers)
    return _with_stats(batch_stats, new)


def _is_moments(leaf: Any) -> bool:
    return isinstance(leaf, Moments)


def _by_layer(moments: Any) -> dict[tuple[str, ...], dict[str, Any]]:
    """What each layer left, by its path."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for (*layer, name), leaf in flatten_dict(moments, is_leaf=lambda _, v: _is_moments(v)).items():
        found.setdefault(tuple(layer), {})[name] = leaf
    return found


def _stats_by_layer(batch_stats: Any, given: Any = None) -> dict[tuple[str, ...], BatchStats]:
    """Statistics of each layer by its path; ValueError unless `given` has the same layers."""
    flat = flatten_dict(batch_stats)
    fields = BatchStats._fields
    layers = {path[:-1] for path in flat if all((*path[:-1], name) in flat for name in fields)}
    if given is not None:
        unknown, silent = sorted(set(given) - layers), sorted(layers - set(given))
        if unknown:
            raise ValueError(
                f"moments has the layer {'/'.join(unknown[0])!r}, which batch_stats lacks: take "
                "both from the same model"
            )
        if silent:
            names = ", ".join(map(repr, map("/".join, silent)))
            raise ValueError(
                f"moments lacks {names}: a layer inside nn.scan or nn.vmap needs "
                f"variable_axes={{{MOMENTS!r}: 0}} there, one of Flax's own has to become "
                "bn_research.layers.linen.BatchNorm, and the pass has to be one of training"
            )
    return {layer: BatchStats(*(flat[*layer, name] for name in fields)) for layer in sorted(layers)}


def _merged(moments: Moments, stats: BatchStats) -> Moments:
    """Moments of the layer's shape: iterations that share its statistics are merged."""
    while jnp.ndim(moments.mean) > jnp.ndim(stats.mean):
        rows = [jax.tree.map(lambda leaf, i=i: leaf[i], moments) for i in range(len(moments.mean))]
        moments = functools.reduce(merge_moments, rows)
    return moments


def _with_stats(batch_stats: Any, new: dict[tuple[str, ...], BatchStats]) -> Any:
    """The tree with the statistics of these layers."""
    flat = flatten_dict(batch_stats)
    for layer, stats in new.items():
        flat.update({(*layer, name): leaf for name, leaf in stats._asdict().items()})
    tree = unflatten_dict(flat)
    return freeze(tree) if isinstance(batch_stats, FrozenDict) else tree
