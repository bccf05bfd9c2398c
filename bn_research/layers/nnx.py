"""`BatchNorm` for flax.nnx: takes the place of `flax.nnx.BatchNorm`.

Constructor arguments, defaults, attributes, variables, shapes, dtypes and initial values are
Flax's, so an existing state restores and an existing model trains unchanged. Where the numbers
differ, Flax loses digits: its one-pass variance is wrong at large means, as in flax.linen, and it
casts the input and the running statistics to `dtype` before it subtracts them (in bfloat16
x = 100.6 at mean 100.3 and standard deviation 0.1 becomes 0 where 3 is right). Masked elements
come out as `bias` here; Flax normalizes them too.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jaxtyping import Array, Bool, Float

from bn_research.normalization import BatchStats, batch_norm, normalize, update_batch_stats
from bn_research.normalization.batch_stats import check_momentum
from bn_research.normalization.moments import canonical_axes


class BatchNorm(nnx.Module):
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
      group_size: number of examples that share statistics, whatever the number of devices.

    Attributes:
      scale: `nnx.Param`, shape=(num_features,), or None.
      bias: as scale.
      mean: `nnx.BatchStat`, shape=(num_features,), dtype=float32.
      var: as mean.
      frozen: see `freeze_batch_norm`.
    """

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
        shape = (num_features,)
        self.mean = nnx.BatchStat(jnp.zeros(shape, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(shape, jnp.float32))
        self.scale = self.bias = nnx.data(None)
        # Flax's order: a stream of keys shared with other layers moves on in step with it.
        if use_scale:
            self.scale = nnx.Param(scale_init(rngs.params(), shape, param_dtype), **scale_metadata)
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), shape, param_dtype), **bias_metadata)
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype
        self.group_size = group_size
        self.frozen = False

    def __call__(
        self,
        x: Float[Array, "..."],
        use_running_average: bool | None = None,
        *,
        mask: Bool[Array, "..."] | None = None,
    ) -> Float[Array, "..."]:
        """Normalizes x; in training mode updates `mean` and `var`.

        Args:
          x: floating-point array.
          use_running_average: goes before the attribute of the same name, but not before `frozen`.
          mask: broadcastable to x; elements where it is False are left out.

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

        if self.frozen:
            scale, bias = jax.lax.stop_gradient((scale, bias))
        if self.frozen or use_running_average:
            return normalize(
                x, *stats, scale, bias, feature_axes=axes, epsilon=self.epsilon, dtype=dtype
            )
        y, moments = batch_norm(
            x,
            scale,
            bias,
            feature_axes=axes,
            epsilon=self.epsilon,
            where=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            group_size=self.group_size,
            dtype=dtype,
        )
        stats = update_batch_stats(stats, moments, momentum=self.momentum)
        self.mean.set_value(stats.mean)  # `mean[...] =` is a scatter inside shard_map
        self.var.set_value(stats.var)
        return y

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What `nnx.view` sets in the copy that it makes.

        Args:
          use_running_average: None leaves it.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average

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
        cast = functools.partial(self.promote_dtype, dtype=self.dtype)
        promoted = jax.eval_shape(cast, (x, *stats, *params))
        if self.dtype is not None:  # not before: Flax's promote_dtype refuses an integer one
            return self.dtype
        return jnp.result_type(*(promoted[i].dtype for i in (0, 3, 4) if promoted[i] is not None))


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
        if isinstance(module, nnx.BatchNorm) and predicate(path):
            raise ValueError(
                f"predicate is true of {path!r}, a flax.nnx.BatchNorm: only "
                "bn_research.layers.nnx.BatchNorm can be frozen"
            )
        if isinstance(module, BatchNorm) and predicate(path):
            layers.append(module)
    for layer in layers:
        layer.frozen = True
