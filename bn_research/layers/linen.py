"""`BatchNorm` for flax.linen: takes the place of `flax.linen.BatchNorm`.

Fields, defaults, parameter and variable names, shapes, dtypes and initial values are Flax's, so an
existing checkpoint restores and an existing model trains unchanged. Where the numbers differ, Flax
loses digits: its one-pass variance is wrong at large means (relative error about (mean/std)²·2⁻²⁴,
clipped to 0 in the end), its masked statistics are when synced, and its running statistics change
dtype on float64 input. Masked elements come out as `bias` here; Flax normalizes them too.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers
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
from bn_research.normalization.batch_stats import check_momentum
from bn_research.normalization.moments import canonical_axes

MOMENTS = "batch_moments"  # collection in which layers leave their moments when it is mutable


class BatchNorm(nn.Module):
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
      force_float32_reductions: False keeps the running statistics in param_dtype, as in Flax;
        reductions run in float32 or wider all the same.
      group_size: number of examples that share statistics, whatever the number of devices.
      frozen: predicate on the layer's path in the model, such as ("encoder", "BatchNorm_0"). Where
        it is true the layer normalizes by its running statistics in training too, leaves them as
        they are, and its scale and bias receive no gradient (weight decay still reaches them:
        mask it in the optimizer).
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: initializers.Initializer = initializers.zeros
    scale_init: initializers.Initializer = initializers.ones
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    group_size: int | None = None
    frozen: Callable[[tuple[str, ...]], bool] | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "..."],
        use_running_average: bool | None = None,
        *,
        mask: Bool[Array, "..."] | None = None,
    ) -> Float[Array, "..."]:
        """Normalizes x; in training mode updates `batch_stats`, except while initializing.

        Args:
          x: floating-point array.
          use_running_average: see the attribute of the same name.
          mask: broadcastable to x; elements where it is False are left out.

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
        options = dict(feature_axes=axes, epsilon=self.epsilon, dtype=self.dtype)

        alone = self.is_initializing()  # the axis of devices need not exist yet, as in Flax
        if self.frozen is not None and self.frozen(self.path) and not alone:
            use_running_average = True
            scale, bias = jax.lax.stop_gradient((scale, bias))
        if use_running_average:
            return normalize(x, mean.value, var.value, scale, bias, **options)
        if alone:
            with warnings.catch_warnings():  # a model is often initialized with one example
                warnings.simplefilter("ignore", UserWarning)
                return batch_norm(x, scale, bias, where=mask, **options)[0]
        y, moments = batch_norm(
            x,
            scale,
            bias,
            where=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            group_size=self.group_size,
            **options,
        )
        # Kept only by callers that ask for this collection; one that asks for it alone, to merge
        # the moments of several batches, updates the running statistics later.
        self.sow(MOMENTS, "moments", moments, init_fn=tuple, reduce_fn=lambda _, new: new)
        gathered = self.is_mutable_collection(MOMENTS)
        if not gathered or self.is_mutable_collection("batch_stats"):
            stats = update_batch_stats(
                BatchStats(mean.value, var.value), moments, momentum=self.momentum
            )
            mean.value, var.value = stats
        return y


def merge_batch_moments(a: Any, b: Any) -> Any:
    """Moments of two disjoint batches, layer by layer: two `batch_moments` collections merged.

    The order and the sizes of the batches make no difference. A collection of zeros is the neutral
    element, so a `lax.scan` over microbatches can start with
    `jax.tree.map(jnp.zeros_like, moments)`.
    """
    return jax.tree.map(merge_moments, a, b, is_leaf=_is_moments)


def update_from_batch_moments(
    batch_stats: Any,
    moments: Any,
    *,
    momentum: float | Float[Array, ""] = 0.99,
    unbiased: bool = False,
) -> Any:
    """One update of a model's running statistics, new = momentum·old + (1 − momentum)·batch.

    With gradient accumulation a large batch is seen in parts. Apply the model to each with
    `mutable=[MOMENTS]`, which leaves `batch_stats` alone, merge the collections with
    `merge_batch_moments`, and update once: the statistics are those of the large batch, and the
    average moves by one step of `momentum`, not by one for each part.

    Args:
      batch_stats: the model's running statistics.
      moments: a `batch_moments` collection; layers that it lacks (frozen ones) stay as they are.
      momentum: in [0, 1]; a layer's own field is not looked at.
      unbiased: see `bn_research.normalization.update_batch_stats`.

    Raises:
      ValueError: momentum outside [0, 1], or a layer that batch_stats lacks.
    """
    flat = flatten_dict(batch_stats)
    for path, new in flatten_dict(moments, is_leaf=lambda _, leaf: _is_moments(leaf)).items():
        layer = path[:-1]
        if (*layer, "mean") not in flat:
            raise ValueError(
                f"moments has the layer {'/'.join(layer)!r}, which batch_stats lacks: take both "
                "from the same model"
            )
        old = BatchStats(*(flat[*layer, leaf] for leaf in BatchStats._fields))
        stats = update_batch_stats(old, new, momentum=momentum, unbiased=unbiased)
        flat.update({(*layer, leaf): value for leaf, value in stats._asdict().items()})
    return unflatten_dict(flat)


def _is_moments(leaf: Any) -> bool:
    return isinstance(leaf, Moments)


def population_batch_stats(
    apply_fn: Callable[[Any, Any], Any],
    variables: Any,
    batches: Iterable[Any],
    *,
    method: Literal["algorithm2", "merged"] = "algorithm2",
) -> Any:
    """A model's `batch_stats` from batches seen with frozen weights, in place of running averages.

    Every layer normalizes by the batch while its moments are gathered, as in algorithm 2 of Ioffe
    & Szegedy (2015); see `bn_research.normalization.population_stats` for the two methods.

    Args:
      apply_fn: (variables, batch) -> the model's `batch_moments` collection, that is
        `model.apply(variables, batch, train=True, mutable=[MOMENTS, "batch_stats"])[1][MOMENTS]`;
        jit it.
      variables: params and batch_stats.
      batches: training batches of the size that training used.
      method: "algorithm2" or "merged".

    Returns:
      A pytree like variables["batch_stats"].
    """
    stats = population_stats(lambda batch: apply_fn(variables, batch), batches, method=method)
    flat = {
        path[:-1] + (leaf,): getattr(value, leaf)
        for path, value in flatten_dict(stats).items()
        for leaf in BatchStats._fields
    }
    return unflatten_dict(flat)
