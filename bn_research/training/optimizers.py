"""Optimizers by name, with weight decay that leaves BN's parameters and biases alone."""

from typing import Any

import jax
import optax
from jaxtyping import Array, Float

NAMES = ("sgd", "momentum", "adam")


def create_optimizer(
    name: str,
    learning_rate: float | Float[Array, ""] | optax.Schedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    decay_scale_and_bias: bool = False,
) -> optax.GradientTransformation:
    """An optax optimizer.

    Args:
      name: "sgd", θ ← θ − η·g; "momentum", v ← momentum·v + g, θ ← θ − η·v; "adam", optax's
        defaults (b1=0.9, b2=0.999, eps=1e-8).
      learning_rate: η; may be traced, so that one program serves every rate; or a schedule, of
        the number of updates made.
      momentum: of "momentum".
      weight_decay: λ. Added to the gradient, g + λ·θ (L2), for "sgd" and "momentum"; decoupled,
        θ ← θ − η·λ·θ, for "adam" (AdamW).
      decay_scale_and_bias: let the decay reach parameters named `scale` or `bias` too, see
        `weight_mask`.

    Raises:
      ValueError: an unknown name, a negative rate or decay, or momentum outside [0, 1); of
        `weight_mask`, once there are parameters.
    """
    if name not in NAMES:
        raise ValueError(f"optimizer={name!r} is unknown: allowed are {', '.join(NAMES)}")
    known = not (callable(learning_rate) or isinstance(learning_rate, jax.core.Tracer))
    if known and not learning_rate >= 0:
        raise ValueError(f"learning_rate={learning_rate!r} is not allowed: it must be ≥ 0")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay={weight_decay!r} is not allowed: it must be ≥ 0")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum!r} is not allowed: it must lie in [0, 1)")
    mask = None if decay_scale_and_bias else weight_mask
    if name == "adam":
        if weight_decay:
            return optax.adamw(learning_rate, weight_decay=weight_decay, mask=mask)
        return optax.adam(learning_rate)
    sgd = optax.sgd(learning_rate, momentum=momentum if name == "momentum" else None)
    if weight_decay:
        return optax.chain(optax.add_decayed_weights(weight_decay, mask), sgd)
    return sgd


def weight_mask(params: Any) -> Any:
    """True for weights, False for parameters named `scale` or `bias`; a pytree like params.

    A parameter's name is the last on the way to it, whatever containers it lies in: dicts,
    dataclasses, `nnx.State`. A place in a list is no name, nor is the `value` of a box, such as
    `nnx.Param` or `nn.Partitioned`.

    Raises:
      ValueError: a container that does not tell its names.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _name(path) not in ("scale", "bias"), params
    )


def _name(path: tuple[Any, ...]) -> str:
    """The last name on a path; "" where there is none."""
    for key in reversed(path):
        if isinstance(key, jax.tree_util.FlattenedIndexKey):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} lies in a container that does not tell its "
                "names, so a scale or bias cannot be told from a weight: allowed are pytrees "
                "registered with keys; convert it to a dict"
            )
        name = str(getattr(key, "key", getattr(key, "name", "")))  # a place in a list has neither
        if name not in ("", "value") and not name.isdigit():  # nnx numbers what lies in a list
            return name
    return ""
