"""`BatchNorm` for flax.nnx: takes the place of `flax.nnx.BatchNorm`.

Constructor arguments, defaults, attributes, variables, shapes, dtypes and initial values are
Flax's, so an existing state restores and an existing model trains unchanged. Where the numbers
differ, Flax loses digits: its one-pass variance is wrong at large means, as in flax.linen, and it
casts the input and the running statistics to `dtype` before it subtracts them (in bfloat16
x = 100.6 at mean 100.3 and standard deviation 0.1 becomes 0 where 3 is right). Masked elements
come out as `bias` here, in inference too; Flax normalizes them, and in inference takes no mask.

Ours is a subclass, so `isinstance` and `model.set_attributes(nnx.BatchNorm, ...)` find both. What
flax.linen gives to callers of `apply` is a state of the model here:

                               flax.linen                           flax.nnx
    moments of a batch         `mutable=[MOMENTS, "batch_stats"]`   `gather_batch_moments(model)`
    gradient accumulation      `merge_batch_moments` and            passes merge by themselves; then
                               `update_from_batch_moments`          `update_from_batch_moments`
    population statistics      `population_batch_stats`             `population_batch_stats`
    frozen layers              the field `frozen`                   `freeze_batch_norm`
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
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
from bn_research.normalization.batch_stats import check_momentum
from bn_research.normalization.moments import canonical_axes, promoted


class BatchMoments(nnx.Variable):
    """Moments of the batches that a layer has seen since `gather_batch_moments`."""


class BatchNorm(nnx.BatchNorm):
    """Batch normalization: y = scale·(x − mean)/√(var + epsilon) + bias.

    Args:
      num_features: length of the feature axis.
      use_running_average: normalize by the running statistics rather than by the batch's own;
        here, by `train` and `eval`, or in the call.
      axis: the feature axis; all others are reduced.
      momentum: of the running statistics, new = momentum·old + (1 − momentum)·batch.
      epsilon: added to the variance; 0 is allowed.
      dtype: of the result; None promotes the dtypes of input, statistics and parameters.
      param_dtype: of scale and bias.
      use_bias: add a bias, β.
      use_scale: multiply by a scale, γ.
      bias_init: initializer of bias.
      scale_init: initializer of scale.
      axis_name: axis of devices over which statistics are shared.
      axis_index_groups: share within these groups of devices only.
      use_fast_variance: Flax's choice between one pass and two. Accepted and without effect: the
        variance is always accurate.
      promote_dtype: function of ((x, mean, var, scale, bias), dtype=) that Flax casts them with.
        Here it settles the dtype of the result alone; nothing is cast before it is used.
      rngs: streams of random keys for the initializers.
      bias_metadata: metadata of the variable bias.
      scale_metadata: metadata of the variable scale.
      group_size: number of examples that share statistics, whatever the number of devices; None,
        or 0, is the whole batch.

    Attributes:
      scale: `nnx.Param`, shape=(num_features,), or None.
      bias: as scale.
      mean: `nnx.BatchStat`, shape=(num_features,), dtype=float32. Cast to half precision it becomes
        float32 with the first update: an average in half precision would stand still.
      var: as mean.
      frozen: see `freeze_batch_norm`.
      moments: `BatchMoments`, while they are gathered: see `gather_batch_moments`.
    """

    moments: BatchMoments

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: nnx.Initializer = nnx.initializers.zeros_init(),  # noqa: B008  # as in Flax
        scale_init: nnx.Initializer = nnx.initializers.ones_init(),  # noqa: B008
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        group_size: int | None = None,
    ):
        super().__init__(
            num_features,
            use_running_average=use_running_average,
            axis=axis,
            momentum=momentum,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )
        self.group_size = group_size
        self.frozen = False

    def __call__(
        self,
        x: Float[Array, "..."],
        use_running_average: bool | None = None,
        *,
        mask: Bool[Array, "..."] | None = None,
    ) -> Float[Array, "..."]:
        """Normalizes x; in training mode updates `mean` and `var`, or gathers `moments`.

        The new statistics carry the gradient of the batch's mean and variance, but for variables
        that hold a reference.

        Args:
          x: array; integers and bool are taken as float32.
          use_running_average: goes before the attribute of the same name, but not before `frozen`.
          mask: broadcastable to x; elements where it is False are left out of the statistics and
            come out as bias, in inference too.

        Raises:
          ValueError: a bad axis, shape, dtype, momentum, epsilon, mask or group size, or
            use_running_average given nowhere.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None:
            raise ValueError(
                "use_running_average=None is not allowed: give True or False to the constructor, "
                "to the call or to nnx.view"
            )
        check_momentum(self.momentum)
        x = jnp.asarray(x)
        axes = self._feature_axes(x)
        stats = BatchStats(self.mean[...], self.var[...])
        scale, bias = (None if p is None else p[...] for p in (self.scale, self.bias))
        dtype = self._result_dtype(x, stats, scale, bias)

        options = dict(feature_axes=axes, epsilon=self.epsilon, where=mask, dtype=dtype)

        frozen = getattr(self, "frozen", False)  # a subclass may not call our constructor
        if frozen:
            scale, bias = jax.lax.stop_gradient((scale, bias))
        if frozen or use_running_average:
            return normalize(x, *stats, scale, bias, **options)
        y, moments = batch_norm(
            x,
            scale,
            bias,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            group_size=getattr(self, "group_size", None) or None,
            **options,
        )
        gathered = getattr(self, "moments", None)
        if gathered is not None:
            gathered.set_value(merge_moments(gathered.get_value(), moments))
            return y
        held = self.mean.ref or self.mean.hijax  # what is outside the function being differentiated
        self._set_stats(
            update_batch_stats(stats, moments, momentum=self.momentum, stop_gradient=held)
        )
        return y

    def _set_stats(self, stats: BatchStats) -> None:
        self.mean.set_value(stats.mean)  # `mean[...] =` is a scatter inside shard_map
        self.var.set_value(stats.var)

    def _feature_axes(self, x: Array) -> tuple[int, ...]:
        """The one feature axis, canonical; ValueError when it is not num_features long."""
        axes = canonical_axes(self.axis, x.ndim)
        if len(axes) > 1:
            raise ValueError(
                f"axis={self.axis!r} is not allowed: num_features is the length of one axis, so "
                "name one; bn_research.layers.linen.BatchNorm takes several"
            )
        if x.shape[axes[0]] != self.num_features:
            raise ValueError(
                f"num_features={self.num_features!r} does not match x of shape {x.shape}: its "
                f"axis {self.axis!r} must be that long"
            )
        return axes

    def _result_dtype(self, x: Array, stats: BatchStats, *params: Array | None) -> Any:
        """Flax's dtype of the result: `dtype`, or else that of what promote_dtype would cast to."""
        with jax.numpy_dtype_promotion("standard"):  # where JAX casts nothing by itself, too
            cast = functools.partial(self.promote_dtype, dtype=self.dtype)
            found = jax.eval_shape(cast, (x, *stats, *params))
        if self.dtype is not None:  # not before: Flax's promote_dtype refuses an integer one
            return self.dtype
        return promoted(*(found[i].dtype for i in (0, 3, 4) if found[i] is not None))


def gather_batch_moments(model: nnx.Module) -> None:
    """Has every layer merge the moments of its batches, in place, and leave its statistics alone.

    So for gradient accumulation: a large batch is seen in parts, and `update_from_batch_moments`
    then moves the statistics once, by the moments of the whole. Each layer has a `BatchMoments`
    from now on, empty; `nnx.state(model, BatchMoments)` reads them. Inside `nnx.scan` and
    `nnx.vmap` they go where `nnx.BatchStat` goes.

    Args:
      model: holds layers of this file's class, or is one.

    Raises:
      ValueError: one of the layers is Flax's own, whose statistics would move with every pass.
    """
    for layer in _layers(model).values():
        # Of the mean's shape, which has an axis for each transformation that made the layer.
        zero = jnp.zeros(layer.mean.shape, promoted(layer.mean.dtype, jnp.float32))
        layer.moments = BatchMoments(Moments(zero.real, zero, zero.real))


def update_from_batch_moments(
    model: nnx.Module,
    *,
    momentum: float | Float[Array, ""] | None = None,
    unbiased: bool = False,
) -> None:
    """One update of each layer's running statistics by what it gathered, which is dropped.

    Args:
      model: after `gather_batch_moments` and passes in training mode. Frozen layers, and others
        that saw no batch, stay as they are.
      momentum: in [0, 1], of every layer; None is each layer's own.
      unbiased: see `bn_research.normalization.update_batch_stats`.

    Raises:
      ValueError: momentum outside [0, 1], or a layer that does not gather.
    """
    for layer, moments in _take(model):
        own = layer.momentum if momentum is None else momentum
        stats = BatchStats(layer.mean[...], layer.var[...])
        layer._set_stats(update_batch_stats(stats, moments, momentum=own, unbiased=unbiased))


def population_batch_stats(
    model: nnx.Module,
    apply_fn: Callable[[nnx.Module, Any], Any],
    batches: Iterable[Any],
    *,
    method: Literal["algorithm2", "merged"] = "algorithm2",
) -> None:
    """Sets the statistics, in place, to those of batches seen with frozen weights.

    Every layer normalizes by the batch while its moments are gathered, as in algorithm 2 of Ioffe
    & Szegedy (2015); see `bn_research.normalization.population_stats` for the two methods. Frozen
    layers keep what they have, and so do features without enough elements in any batch.

    Args:
      model: in training mode. One that was gathering moments goes on with those that it had.
      apply_fn: (model, batch) -> anything: a pass through the model; `nnx.jit` it.
      batches: training batches of the size that training used.
      method: "algorithm2" or "merged".

    Raises:
      ValueError: an unknown method, no batches, a layer that is Flax's own, or one that neither is
        frozen nor saw a batch in training mode.
    """
    layers = _layers(model)
    old = {path: BatchStats(layer.mean[...], layer.var[...]) for path, layer in layers.items()}
    gathered = {path: getattr(layer, "moments", None) for path, layer in layers.items()}
    idle = {path for path, layer in layers.items() if not getattr(layer, "frozen", False)}

    def moments_of(batch):
        gather_batch_moments(model)
        apply_fn(model, batch)
        found = dict(zip(layers, (moments for _, moments in _take(model)), strict=True))
        for path in list(idle):
            count = found[path].count  # a traced one is not looked at
            if isinstance(count, jax.core.Tracer) or count.any():
                idle.discard(path)
        return found

    try:
        found = population_stats(moments_of, batches, method=method, initial=old)
    finally:  # a pass that failed would leave layers that never update their statistics again
        for path, layer in layers.items():
            before = gathered[path]
            if before is not None:
                layer.moments = before
            elif hasattr(layer, "moments"):
                del layer.moments
    if idle:
        names = ", ".join(repr(_name(path, layers[path])) for path in layers if path in idle)
        raise ValueError(f"{names} saw no batch in training mode: call model.train() first")
    for path, layer in layers.items():
        layer._set_stats(found[path])


def _layers(model: nnx.Module) -> dict[tuple[Any, ...], BatchNorm]:
    """The layers of this file's class by path, those that are shared once; ValueError if Flax's."""
    layers: dict[tuple[Any, ...], BatchNorm] = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, BatchNorm):
            layers[path] = module
        elif isinstance(module, nnx.BatchNorm):
            raise ValueError(
                f"{_name(path, module)!r} is a flax.nnx.BatchNorm: only "
                "bn_research.layers.nnx.BatchNorm gathers moments"
            )
    return layers


def _name(path: tuple[Any, ...], layer: nnx.Module) -> str:
    return "/".join(map(str, path)) or type(layer).__name__


def _take(model: nnx.Module) -> list[tuple[BatchNorm, Moments]]:
    """Every layer with what it gathered, which it then has no more."""
    layers = _layers(model)
    for path, layer in layers.items():
        if getattr(layer, "moments", None) is None:
            name = _name(path, layer)
            raise ValueError(f"{name!r} gathers no moments: call gather_batch_moments(model) first")
    taken = [(layer, layer.moments.get_value()) for layer in layers.values()]
    for layer in layers.values():
        del layer.moments
    return taken


def freeze_batch_norm(model: nnx.Module, predicate: Callable[[tuple[Any, ...]], bool]) -> None:
    """Freezes layers in place: from now on they normalize by their running statistics.

    That holds in training too, whatever `train` or the call says; the statistics stay as they are,
    and scale and bias receive no gradient (weight decay still reaches them: mask it in the
    optimizer). Undo it with `model.set_attributes(BatchNorm, frozen=False)`.

    Args:
      model: holds layers of this file's class, or is one.
      predicate: true of the paths to freeze: ("blocks", 0, "bn") is `model.blocks[0].bn`. A layer
        that is shared has its first path only.

    Raises:
      ValueError: predicate is true of one of Flax's own layers, which have no such state.
    """
    layers = []
    for path, module in nnx.iter_modules(model):
        if not isinstance(module, nnx.BatchNorm) or not predicate(path):
            continue
        if not isinstance(module, BatchNorm):
            raise ValueError(
                f"predicate is true of {path!r}, a flax.nnx.BatchNorm: only "
                "bn_research.layers.nnx.BatchNorm can be frozen"
            )
        layers.append(module)
    for layer in layers:
        layer.frozen = True
