"""Batch-normalization layers of PyTorch, Haiku and Keras to ours and back.

                 PyTorch                Haiku                       Keras             ours
    γ, β         weight, bias           scale, offset               gamma, beta       scale, bias
    statistics   running_mean, _var     mean_ema, var_ema           moving_mean,      mean, var
                                        (average)                   moving_variance
    new average  (1 − m)·old + m·new    d·old + (1 − d)·new,        m·old +           m·old +
                                        then divided by 1 − dᵗ      (1 − m)·new       (1 − m)·new
    variance     unbiased, n − 1        biased                      biased            biased
    epsilon      1e-5                   1e-5                        1e-3              1e-5

Ours are Flax's, so a layer of Flax needs no conversion. None of the three libraries is imported:
what crosses is arrays. Every vector belongs to the one feature axis, so images need no transposing
here; for PyTorch's layout use `BatchNorm(axis=1)`. PyTorch's convolutions and pooling pad both
ends, (k − 1)/2 each, which Flax's "SAME" at stride 2 does not: convert a residual network to
`bn_research.models.resnet.ResNet(padding="torch")`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bn_research.normalization.moments import accumulator_dtype

# Number of steps so large that Haiku's correction 1 − dᵗ is 1 for every decay rate below 1, and
# that as many steps again fit into its int32.
ENDLESS = 2**30


class PortableBatchNorm(NamedTuple):
    """One batch-normalization layer, outside any library.

    `BatchNorm(**layer.options).apply(layer.variables, x, True)` evaluates it.
    """

    params: Mapping[str, Array]  # scale and bias, shape=(features,); missing where there is none
    batch_stats: Mapping[str, Array]  # mean and var, shape=(features,)
    momentum: float = 0.99  # new = momentum·old + (1 − momentum)·batch
    epsilon: float = 1e-5  # added to the variance

    @property
    def variables(self) -> dict[str, Mapping[str, Array]]:
        """The variables of our layer and of Flax's."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of our layer and of Flax's: momentum, epsilon, use_scale, use_bias."""
        return {
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "use_scale": "scale" in self.params,
            "use_bias": "bias" in self.params,
        }


def from_torch(
    state_dict: Mapping[str, Any],
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    elements: int | None = None,
) -> PortableBatchNorm:
    """Our layer from PyTorch's BatchNorm1d, 2d, 3d or SyncBatchNorm.

    PyTorch averages the unbiased variance, m2/(n − 1), ours the biased one, m2/n. There are two
    ways to live with it:

    - elements=None keeps running_var. Evaluation then equals PyTorch's, and training continues
      like PyTorch's with `update_batch_stats(..., unbiased=True)`.
    - elements=n takes running_var·(n − 1)/n, for training to continue with `BatchNorm`. Where n
      stays the same, our var·n/(n − 1) equals PyTorch's running_var after every later step, and
      the means are equal. This holds from any moment on, the first included, where 1 becomes
      (n − 1)/n: a layer of ours that starts at 1 instead differs by momentumᵗ/n after t steps.

    Args:
      state_dict: of the one layer; tensors or arrays.
      momentum: PyTorch's, 1 − ours. Its None, the average over all steps, has no counterpart.
      eps: PyTorch's epsilon.
      elements: n, elements per feature and training batch: batch·height·width, of all devices
        that share statistics; ≥ 2.

    Raises:
      ValueError: a missing entry, a bad shape, momentum, eps or elements, numbers that are not
        finite, or a negative variance.
    """
    if momentum is None:
        raise ValueError(
            "momentum=None, PyTorch's average over all steps, has no counterpart here: "
            "give the momentum to continue with, in [0, 1]"
        )
    _check_within("momentum", momentum, 0, 1)
    _check_within("eps", eps, 0)
    _check_elements(elements)
    for name in ("running_mean", "running_var"):
        if name not in state_dict:
            raise ValueError(
                f"state_dict lacks {name!r} (its first names: {_some(state_dict)}): give that of "
                "the one layer, which must track running statistics"
            )
    var = _array("running_var", state_dict["running_var"])
    if elements is not None:
        var = var * ((elements - 1) / elements)
    return _portable(
        {"scale": state_dict.get("weight"), "bias": state_dict.get("bias")},
        {"mean": state_dict["running_mean"], "var": var},
        momentum=1 - momentum,
        epsilon=eps,
    )


def to_torch(
    layer: PortableBatchNorm, *, elements: int | None = None, num_batches_tracked: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """PyTorch's state_dict and arguments: the inverse of `from_torch`.

    `BatchNorm2d(features, **options)` takes
    `load_state_dict({name: torch.tensor(value) for name, value in state_dict.items()})`.
    PyTorch has scale and bias together or neither: where one is missing, it becomes 1 or 0, which
    evaluates alike, but PyTorch will train it.

    Args:
      layer: one feature axis.
      elements: None keeps var, so that evaluation agrees; n takes var·n/(n − 1), which PyTorch
        would have averaged over batches of n elements per feature; ≥ 2.
      num_batches_tracked: PyTorch's counter of steps, which matters to its momentum=None only.

    Raises:
      ValueError: a missing variable, a bad shape, momentum, epsilon or elements, numbers that are
        not finite, or a negative variance.
    """
    layer = _portable(*layer)
    _check_elements(elements)
    mean, var = (np.array(layer.batch_stats[name]) for name in ("mean", "var"))
    if elements is not None:
        var = var * (elements / (elements - 1))
    state_dict = {
        "running_mean": mean,
        "running_var": var,
        "num_batches_tracked": np.array(num_batches_tracked, np.int64),
    }
    if layer.params:
        state_dict["weight"] = np.array(layer.params.get("scale", np.ones_like(mean)))
        state_dict["bias"] = np.array(layer.params.get("bias", np.zeros_like(mean)))
    options = {"momentum": 1 - layer.momentum, "eps": layer.epsilon, "affine": bool(layer.params)}
    return state_dict, options


def from_haiku(
    params: Mapping[str, Mapping[str, Any]],
    state: Mapping[str, Mapping[str, Any]],
    *,
    decay_rate: float,
    eps: float = 1e-5,
    name: str = "batch_norm",
) -> PortableBatchNorm:
    """Our layer from Haiku's BatchNorm.

    Haiku keeps `hidden`, an average that starts at 0, and evaluates with `average`, which is
    hidden/(1 − dᵗ) after t steps; mean and var are that average. From there Haiku's step t + 1
    has the momentum d·(1 − dᵗ)/(1 − dᵗ⁺¹), which ours, d, equals once dᵗ is negligible.

    Args:
      params: of the whole model, by name of the module.
      state: as params.
      decay_rate: d, our momentum; in [0, 1).
      eps: Haiku's epsilon.
      name: of the module: state has its averages as name/~/mean_ema and name/~/var_ema.

    Raises:
      ValueError: a missing entry, a bad shape, more than one feature axis, a bad decay_rate or
        eps, numbers that are not finite, or a negative variance.
    """
    _check_decay_rate(decay_rate)
    _check_within("eps", eps, 0)
    averages = {}
    for ours, theirs in (("mean", f"{name}/~/mean_ema"), ("var", f"{name}/~/var_ema")):
        if "average" not in state.get(theirs, {}):
            raise ValueError(
                f"name={name!r}: state lacks the average of {theirs!r} (its first names: "
                f"{_some(state)})"
            )
        averages[ours] = state[theirs]["average"]
    own = params.get(name, {})
    trained = {"scale": own.get("scale"), "bias": own.get("offset")}
    return _portable(
        {name: _vector(name, value) for name, value in trained.items()},
        {name: _vector(name, value) for name, value in averages.items()},
        momentum=decay_rate,
        epsilon=eps,
    )


def to_haiku(
    layer: PortableBatchNorm,
    *,
    ndim: int,
    axis: int = -1,
    counter: int = ENDLESS,
    name: str = "batch_norm",
) -> tuple[dict[str, dict[str, Array]], dict[str, dict[str, Array]], dict[str, Any]]:
    """Haiku's params, state and arguments: the inverse of `from_haiku`.

    Args:
      layer: one feature axis.
      ndim: rank of the module's input, which Haiku's arrays share.
      axis: feature axis of the input.
      counter: t, the number of steps that the averages stand for. Haiku's next steps weigh new
        batches accordingly; the default weighs them as our layer would.
      name: of the module.

    Raises:
      ValueError: a missing variable, a bad shape, momentum, epsilon, axis or counter, numbers that
        are not finite, or a negative variance.
    """
    layer = _portable(*layer)
    _check_decay_rate(layer.momentum, "momentum")
    if not -ndim <= axis < ndim:
        raise ValueError(
            f"axis={axis} is out of range for ndim={ndim}: allowed are {-ndim} to {ndim - 1}"
        )
    _check_within("counter", counter, 0, ENDLESS)
    shape = [1] * ndim
    shape[axis] = -1
    own = {
        theirs: layer.params[ours].reshape(shape)
        for ours, theirs in (("scale", "scale"), ("bias", "offset"))
        if ours in layer.params
    }
    state = {
        f"{name}/~/{ours}_ema": {
            "counter": jnp.array(counter, jnp.int32),
            "hidden": average.reshape(shape) * (1 - layer.momentum**counter),
            "average": average.reshape(shape),
        }
        for ours, average in layer.batch_stats.items()
    }
    options = {
        "decay_rate": layer.momentum,
        "eps": layer.epsilon,
        "create_scale": "scale" in own,
        "create_offset": "offset" in own,
    }
    return {name: own} if own else {}, state, options


def from_keras(
    weights: Sequence[Any],
    *,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
    center: bool = True,
    scale: bool = True,
) -> PortableBatchNorm:
    """Our layer from Keras's BatchNormalization (without renorm).

    Args:
      weights: as `get_weights()` gives them: gamma, beta, moving_mean, moving_variance.
      momentum: as ours.
      epsilon: Keras's, by default a hundred times ours.
      center: whether there is a beta.
      scale: whether there is a gamma.

    Raises:
      ValueError: another number of weights, a bad shape, momentum or epsilon, numbers that are not
        finite, or a negative variance.
    """
    names = ["scale"] * scale + ["bias"] * center + ["mean", "var"]
    if len(weights) != len(names):
        raise ValueError(
            f"weights has {len(weights)} entries: with scale={scale} and center={center} it must "
            f"have {len(names)}, Keras's {', '.join(names)}"
        )
    named = dict(zip(names, weights, strict=True))
    stats = {name: named.pop(name) for name in ("mean", "var")}
    return _portable(named, stats, momentum, epsilon)


def to_keras(layer: PortableBatchNorm) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Keras's weights and arguments: the inverse of `from_keras`.

    `BatchNormalization(**options)`, once built, takes `set_weights(weights)`.

    Args:
      layer: one feature axis.

    Raises:
      ValueError: a missing variable, a bad shape, momentum or epsilon, numbers that are not finite,
        or a negative variance.
    """
    layer = _portable(*layer)
    named = {**layer.params, **layer.batch_stats}
    weights = [np.array(named[name]) for name in ("scale", "bias", "mean", "var") if name in named]
    options = {
        "momentum": layer.momentum,
        "epsilon": layer.epsilon,
        "center": "bias" in named,
        "scale": "scale" in named,
    }
    return weights, options


def _portable(params, batch_stats, momentum: float, epsilon: float) -> PortableBatchNorm:
    """The layer, with vectors of equal length in float32 or wider; ValueError where it is bad."""
    _check_within("momentum", momentum, 0, 1)
    _check_within("epsilon", epsilon, 0)
    for what, given, allowed in (
        ("params", params, {"scale", "bias"}),
        ("batch_stats", batch_stats, {"mean", "var"}),
    ):
        if not set(given) <= allowed or what == "batch_stats" and set(given) != allowed:
            raise ValueError(
                f"{what} has the names {_some(given)}: one layer has {sorted(allowed)}"
            )
    params = {name: _array(name, value) for name, value in params.items() if value is not None}
    batch_stats = {name: _array(name, batch_stats[name]) for name in ("mean", "var")}
    expected = batch_stats["mean"].shape
    for name, value in {**batch_stats, **params}.items():
        if value.ndim != 1 or value.shape != expected:
            raise ValueError(
                f"{name} has shape {value.shape}: all must have the same, (features,), and mean "
                f"has {expected}"
            )
        _check_numbers(name, value)
    return PortableBatchNorm(params, batch_stats, momentum, epsilon)


def _array(name: str, value) -> Array:
    """A copy, in float32 or, for float64, as wide as JAX is set to."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if "bfloat16" in str(value.dtype):  # NumPy has none
            value = value.float()
    # A copy: PyTorch changes its tensors in place, and JAX may share the memory of other arrays.
    value = jnp.array(np.asarray(value), copy=True)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {value.dtype}: allowed are floating-point types")
    return value.astype(accumulator_dtype(value.dtype))


def _check_numbers(name: str, value: Array) -> None:
    numbers = np.asarray(value)
    negative = (name == "var") & (numbers < 0)
    bad = np.flatnonzero(~np.isfinite(numbers) | negative)
    if bad.size:
        raise ValueError(
            f"{name}[{bad[0]}] is {numbers[bad[0]]}: allowed are finite numbers, and variances "
            "≥ 0; take a checkpoint from before the training diverged"
        )


def _vector(name: str, value) -> Array | None:
    """Haiku's array without its axes of length 1."""
    if value is None:
        return None
    value = _array(name, value)
    if value.size != max(value.shape, default=0):
        raise ValueError(
            f"{name} has shape {value.shape}: all axes but one, the features, must have length 1"
        )
    return value.reshape(-1)


def _check_within(name: str, value, low: float, high: float = float("inf")) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}={value!r} is not allowed: it must lie in [{low}, {high}]")


def _check_decay_rate(value, name: str = "decay_rate") -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value!r} is not allowed: Haiku's must lie in [0, 1)")


def _check_elements(elements: int | None) -> None:
    if elements is not None and not elements >= 2:
        raise ValueError(
            f"elements={elements!r} is not allowed: it must be at least 2, or None, since one "
            "element has no unbiased variance"
        )


def _some(names) -> list[str]:
    """The first few names, for a message of one line."""
    return sorted(names)[:6]
