r"""`StochasticBatchNorm`: batch normalization by population statistics, its noise drawn by hand.

    x̃ = (x − μ)/σ        x̂ = (x̃ − a)/s        y = γ·x̂ + β

with μ and σ = √(σ² + ε) of the population. Where a group of examples shares statistics μ_g and
σ_g, BN is this with a = (μ_g − μ)/σ and s = σ_g/σ: noise that the group's examples share. Drawing
a and s from elsewhere tells that noise from all else that BN does: "stochastic normalizations".

Sources: M. Teye, H. Azizpour, K. Smith, "Bayesian uncertainty estimation for batch normalized deep
networks", ICML 2018, arXiv 1802.06455; A. Shekhovtsov, B. Flach, "Stochastic normalizations as
Bayesian learning", ACCV 2018, arXiv 1811.00639.
"""

import math
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers
from flax.linen.module import merge_param
from jaxtyping import Array, Float, PRNGKeyArray

from bn_research.layers.linen import leave_moments
from bn_research.normalization import (
    BatchStats,
    batch_moments,
    batch_norm,
    batch_renorm,
    normalize,
    update_batch_stats,
    variance,
)

Noise = Literal["none", "measured", "borrowed", "additive"]
Population = Literal["batch", "running"]
NOISES = ("none", "measured", "borrowed", "additive")
POPULATIONS = ("batch", "running")


class GroupStatistics(NamedTuple):
    """Statistics of groups of examples, in units of the population's."""

    mean: Array  # shape=(groups, features): a = (μ_g − μ)/σ
    std: Array  # shape=(groups, features): s = σ_g/σ, with epsilon in both


class StochasticBatchNorm(nn.Module):
    """Takes the place of `linen.BatchNorm`, with noise of a given law.

    Parameters, `batch_stats` and the moments that are left for `population_batch_stats` (those of
    the whole batch) are BatchNorm's. Training draws by the rng "noise"; to the gradient the draws
    are constants, and so are their laws.

    Noise in training, of groups of `group_size` consecutive examples:

      - "none": x̂ = x̃.
      - "measured": for each group and feature a ~ N(0, Var a) and log s ~ N(E log s, Var log s),
        independently, with the moments over the batch's own groups. What a feature's examples share
        is kept, and that s multiplies x̃; how features go together is lost.
      - "borrowed": a and s of the next group of the batch. The exact law, features together; only
        an example's own part in its group's statistics is lost.
      - "additive": x̂ = x̃ + e, e ~ N(0, E[(x̂ − x̃)²]) for each element alone, with the power that
        BN by groups has in that feature. The wrong law: neither shared nor dependent on x̃.

    Attributes:
      use_running_average: normalize by `batch_stats`, without noise; here or in the call.
      noise: one of the above.
      group_size: number of examples that share a and s; at most half the batch.
      population: what μ and σ² are. "batch": those of the whole batch, with BN's gradient: a batch
        many times group_size has little noise of its own, and is never out of date. "running": the
        running average, this batch included, with the gradient of batch renormalization without
        bounds (BN's, times σ_B/σ).
      momentum: of the running statistics, new = momentum·old + (1 − momentum)·batch. They start at
        mean 0 and variance 1, which "running" sees for the first 1/(1 − momentum) steps or so.
      epsilon: added to every variance; > 0.
      scale_init: initializer of scale.
      bias_init: initializer of bias.
    """

    use_running_average: bool | None = None
    noise: Noise = "none"
    group_size: int | None = None
    population: Population = "batch"
    momentum: float = 0.99
    epsilon: float = 1e-5
    scale_init: initializers.Initializer = initializers.ones
    bias_init: initializers.Initializer = initializers.zeros

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch ... features"], use_running_average: bool | None = None
    ) -> Float[Array, "batch ... features"]:
        """Normalizes x; in training mode updates `batch_stats`, except while initializing.

        Raises:
          ValueError: an unknown noise or population, a group size that does not divide the batch
            into two groups or more, epsilon that is not above 0, or a bad momentum or dtype.
        """
        use_running_average = merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        self._check()
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", self.scale_init, shape)
        bias = self.param("bias", self.bias_init, shape)
        stats, epsilon = BatchStats(mean.value, var.value), self.epsilon
        if use_running_average or self.is_initializing():
            return normalize(x, *stats, scale, bias, epsilon=epsilon)

        moments = batch_moments(x)
        updated = update_batch_stats(stats, moments, momentum=self.momentum)
        if self.population == "batch":
            x_tilde, _ = batch_norm(x, epsilon=epsilon)
            population_var = variance(moments)
        else:
            unbounded: Any = dict(r_max=math.inf, d_max=math.inf)
            x_tilde, _ = batch_renorm(x, updated, epsilon=epsilon, **unbounded)
            population_var = updated.var
        if self.noise != "none":
            floor = epsilon / (population_var + epsilon)
            x_tilde = add_noise(
                x_tilde,
                self.make_rng("noise"),
                noise=self.noise,
                group_size=self.group_size or len(x),
                floor=floor,
            )
        # As BatchNorm does: a caller that asks for the moments alone updates the average later.
        gathered = leave_moments(self, moments, self.momentum)
        if not gathered or self.is_mutable_collection("batch_stats"):
            mean.value, var.value = updated
        dtype = jnp.result_type(x, scale, bias)
        return (x_tilde * scale + bias).astype(dtype)

    def _check(self) -> None:
        for name, allowed in (("noise", NOISES), ("population", POPULATIONS)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is unknown: allowed are {', '.join(allowed)}")
        if not isinstance(self.epsilon, jax.core.Tracer) and not self.epsilon > 0:
            raise ValueError(f"epsilon={self.epsilon!r} is not allowed: it must be > 0")


def add_noise(
    x_tilde: Float[Array, "batch ... features"],
    key: PRNGKeyArray,
    *,
    noise: Noise,
    group_size: int,
    floor: float | Float[Array, "features"] = 0.0,
) -> Float[Array, "batch ... features"]:
    """x̂ of x̃ with noise of one of the laws of `StochasticBatchNorm`, "none" excepted.

    Args:
      x_tilde: normalized by the population's statistics.
      key: of the draws.
      noise: the law.
      group_size: number of consecutive examples that share a draw.
      floor: see `group_statistics`.

    Raises:
      ValueError: fewer than two groups, or a group size that does not divide the batch.
    """
    groups = jax.lax.stop_gradient(group_statistics(x_tilde, group_size, floor=floor))
    if noise == "additive":
        power = jax.lax.stop_gradient(noise_power(x_tilde, groups))
        return x_tilde + jnp.sqrt(power) * jax.random.normal(key, x_tilde.shape, x_tilde.dtype)
    if noise == "borrowed":
        drawn = jax.tree.map(lambda leaf: jnp.roll(leaf, -1, axis=0), groups)
    else:
        drawn = draw_groups(key, groups)
    return normalize_by_groups(x_tilde, drawn)


def group_statistics(
    x_tilde: Float[Array, "batch ... features"],
    group_size: int,
    *,
    floor: float | Float[Array, "features"] = 0.0,
) -> GroupStatistics:
    """Means and deviations of groups of consecutive examples.

    Args:
      x_tilde: normalized by the population's statistics.
      group_size: number of examples in a group.
      floor: ε/(σ² + ε), by feature, so that the deviations have the ε that BN adds to each group's
        variance.

    Raises:
      ValueError: fewer than two groups, or a group size that does not divide the batch.
    """
    batch = len(x_tilde)
    if group_size < 1 or batch % group_size or batch < 2 * group_size:
        raise ValueError(
            f"group_size={group_size} is not allowed: it must divide the batch of {batch} examples "
            "into at least two groups"
        )
    grouped = x_tilde.reshape(batch // group_size, group_size, *x_tilde.shape[1:])
    moments = batch_moments(grouped, feature_axes=(0, -1))
    return GroupStatistics(moments.mean, jnp.sqrt(variance(moments) + floor))


def draw_groups(key: PRNGKeyArray, groups: GroupStatistics) -> GroupStatistics:
    """Independent draws: a ~ N(0, Var a), log s ~ N(E log s, Var log s), by feature.

    Args:
      key: of the draws.
      groups: whose unbiased variances over groups are the law's.
    """
    normal = jax.random.normal(key, (2, *groups.mean.shape), groups.mean.dtype)
    log_std = jnp.log(groups.std)
    mean = jnp.std(groups.mean, axis=0, ddof=1) * normal[0]
    drawn = jnp.mean(log_std, axis=0) + jnp.std(log_std, axis=0, ddof=1) * normal[1]
    return GroupStatistics(mean, jnp.exp(drawn))


def noise_power(
    x_tilde: Float[Array, "batch ... features"], groups: GroupStatistics
) -> Float[Array, "features"]:
    """E[(x̂ − x̃)²] of each feature over all elements, x̂ by the statistics of the groups."""
    noise = normalize_by_groups(x_tilde, groups) - x_tilde
    return jnp.mean(jnp.square(noise), axis=tuple(range(x_tilde.ndim - 1)))


def normalize_by_groups(
    x_tilde: Float[Array, "batch ... features"], groups: GroupStatistics
) -> Float[Array, "batch ... features"]:
    """x̂ = (x̃ − a)/s, with a and s of the group that an example's place in the batch says."""
    count, features = groups.mean.shape
    grouped = x_tilde.reshape(count, -1, features)
    return ((grouped - groups.mean[:, None]) / groups.std[:, None]).reshape(x_tilde.shape)
