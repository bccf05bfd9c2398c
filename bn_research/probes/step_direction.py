r"""The loss along a training step: how far ahead the gradient can be trusted.

At parameters θ with the update d, such as −η·∇L(θ), on the line θ + f·d for factors f of the step:

    loss                     L(θ + f·d)
    gradient predictiveness  ‖∇L(θ + f·d) − ∇L(θ)‖
    effective β-smoothness   max_f ‖∇L(θ + f·d) − ∇L(θ)‖/‖f·d‖

These are the three panels of figure 4 of Santurkar et al., who plot the range of the first two over
f at each step of training. Loss and gradients, the one at the start included, are of the same
batch, the one that gave the update, so that the noise of batches has no part in them.

All three are in units that depend on the network. If the loss does not depend on the scale of
weights w, L(a·w) = L(w), as in front of BN, the gradient at a·w is that at w over a, and the
Hessian that at w over a²: weights of ten times the norm are a hundred times as smooth and the same
function. Free of that scale are smoothness·‖w‖² between networks, with `param_norm` for ‖w‖ where
loss_fn takes w alone and holds the other parameters, and anywhere the relative distance and the
cosine of gradients.

Source: S. Santurkar, D. Tsipras, A. Ilyas, A. Madry, "How does batch normalization help
optimization?", NeurIPS 2018, arXiv 1805.11604.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from bn_research.probes.curvature import LossFn, check_like, check_loss, euclidean_norm

FACTORS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)  # the published range, ½ to 4 steps


class StepSurface(NamedTuple):
    """Loss and gradient at f·d from θ, for each factor f; float32 or wider."""

    loss: Array  # shape=(factors,) L(θ + f·d)
    gradient_distance: Array  # shape=(factors,) ‖∇L(θ + f·d) − ∇L(θ)‖
    relative_gradient_distance: Array  # shape=(factors,) the same over ‖∇L(θ)‖
    cosine: Array  # shape=(factors,) between ∇L(θ + f·d) and ∇L(θ)
    distance: Array  # shape=(factors,) ‖f·d‖
    smoothness: Array  # shape=() effective β-smoothness
    start_loss: Array  # shape=() L(θ)
    start_gradient_norm: Array  # shape=() ‖∇L(θ)‖
    param_norm: Array  # shape=() ‖θ‖


def loss_along_step(
    loss_fn: LossFn, params: Any, direction: Any, *, factors: Sequence[float] = FACTORS
) -> StepSurface:
    """Loss, change of the gradient and effective smoothness along a step, and beyond.

    It costs a gradient for each factor and one at the start, one after the other, in the memory of
    one. What is not defined is NaN: the smoothness of a step of length 0, relative distance and
    cosine where a gradient is 0. Where the loss is not finite for some factor, its entries say so,
    and the smoothness is not finite.

    Inside a jitted program it is part of it; outside, wrap the caller in `jax.jit` to compile once
    for many calls.

    Args:
      loss_fn: params → scalar; holds the batch. As for `curvature.hvp`, statistics of the batch
        that it computes are differentiated through, frozen ones are not.
      params: θ, a pytree of floating-point arrays.
      direction: d, like params: the optimizer's update, −η·∇L(θ) for plain gradient descent.
      factors: f, in units of the step.

    Raises:
      ValueError: as `check_loss`; a direction that is not like params; no factors, or one that is
        0 or not finite.
    """
    params = check_loss(loss_fn, params)
    direction = check_like(params, direction, "direction")
    if not len(factors) or not all(math.isfinite(f) and f != 0 for f in factors):
        raise ValueError(
            f"factors={tuple(factors)} is not allowed: give at least one, finite and not 0"
        )

    def value_and_gradient(params: Any) -> tuple[Array, Array]:
        loss, gradient = jax.value_and_grad(loss_fn)(params)
        return loss, _flat(gradient)

    start_loss, start = value_and_gradient(params)
    start_norm = euclidean_norm(start)

    def at(factor: Array) -> tuple[Array, Array, Array]:
        moved = jax.tree.map(lambda p, d: p + factor.astype(p.dtype) * d, params, direction)
        loss, gradient = value_and_gradient(moved)
        # Unit vectors, since the product of two small gradients underflows.
        cosine = jnp.sum((gradient / euclidean_norm(gradient)) * (start / start_norm))
        return loss, euclidean_norm(gradient - start), cosine

    # Not vmap: activations of all factors would be held at once, and weights that differ from
    # factor to factor turn a convolution into a grouped one.
    f = jnp.asarray(factors, start.dtype)
    loss, gradient_distance, cosine = jax.lax.map(at, f)
    distance = jnp.abs(f) * euclidean_norm(_flat(direction))
    return StepSurface(
        loss=loss,
        gradient_distance=gradient_distance,
        relative_gradient_distance=gradient_distance / start_norm,
        cosine=cosine,
        distance=distance,
        smoothness=jnp.max(gradient_distance / distance),
        start_loss=start_loss,
        start_gradient_norm=start_norm,
        param_norm=euclidean_norm(_flat(params)),
    )


def loss_along_descent(
    loss_fn: LossFn,
    params: Any,
    learning_rate: float | Array,
    *,
    factors: Sequence[float] = FACTORS,
) -> StepSurface:
    """`loss_along_step` of the step of plain gradient descent, d = −η·∇L(θ)."""
    gradient = jax.grad(loss_fn)(params)
    direction = jax.tree.map(lambda g: -learning_rate * g, gradient)
    return loss_along_step(loss_fn, params, direction, factors=factors)


def _flat(tree: Any) -> Array:
    """All elements as one vector, in float32 or wider."""
    flat = ravel_pytree(tree)[0]
    return flat.astype(jnp.promote_types(flat.dtype, jnp.float32))
