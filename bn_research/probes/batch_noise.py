r"""How noisy batch normalization makes an example, seen in conjunction with others of a batch.

An example with the value x̃ = (x − μ)/σ, in units of the population, is normalized with m − 1 random
others to x̂ = (x − μ_B)/σ_B. Given x̃, what x̂ is depends on the others. To first order
x̂ − x̃ = −δ − x̃·ε/2 with δ and ε the deviations of the batch's mean and variance, in units of σ and
σ²: noise that is added and noise that multiplies. Hence

    Var(x̂|x̃) = Var(δ) + x̃·Cov(δ, ε) + x̃²·Var(ε)/4
             = (1 + γ₁·x̃ + (κ − 1)·x̃²/4)/m        independent values, skewness γ₁, kurtosis κ
             = (1 + x̃²/2)/m                        Gaussian ones
    E[x̂|x̃] = x̃ + (γ₁/2 + 3(κ − 1)·x̃/8 − x̃³/2)/m

The bias comes from E[δ] = x̃/m and E[ε] = (x̃² − 2)/m, the example's own share of the statistics,
and from the second order of δ and ε. For Gaussian features and m ≥ 3 the distribution is known:
mean M and sum of squares S² of the others are independent, so that with m − 2 degrees of freedom
and noncentrality x̃√(m − 1) T = (x̃ − M)√(m − 1)/√(S²/(m − 2)) is noncentral t, and

    x̂ = √(m − 1)·T/√(m(m − 2) + T²),  which never leaves ±√(m − 1).

`batch_noise_sampling` measures the same on pre-activations, of convolutions too.

Sources: S. Ioffe & C. Szegedy, "Batch normalization", 2015, arXiv 1502.03167, section 3.4, for what
noise is meant; M. Teye, H. Azizpour & K. Smith, "Bayesian uncertainty estimation for batch
normalized deep networks", 2018, arXiv 1802.06455, for the distributions of μ_B and σ_B².
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(100)
_DEVIATIONS = 10.0  # half-width of the quadrature's window: what lies outside is below 1e-20


class NormalizedMoments(NamedTuple):
    """Of x̂ given x̃, in x̃'s shape."""

    mean: np.ndarray  # dtype=float64
    var: np.ndarray  # dtype=float64


class StatisticsNoise(NamedTuple):
    """How the statistics of batches scatter, in units of the population's σ; shape=(features,)."""

    mean: np.ndarray  # Var(μ_B)/σ²
    cross: np.ndarray  # Cov(μ_B, σ_B²)/σ³
    var: np.ndarray  # Var(σ_B²)/σ⁴


def exact_moments(x: ArrayLike, m: int) -> NormalizedMoments:
    r"""Mean and variance of x̂ given x̃ for independent Gaussian features.

    In the plane of (x̃ − M)√(m − 1) = r·sin φ and S = r·cos φ the density is proportional to
    r^(m−2)·cos^(m−3)φ·exp(−r²/2 + ν·r·sin φ), ν = x̃√(m − 1), and x̂ depends on φ alone:
    √(m − 1)·sin φ/√(m·cos²φ + sin²φ). Gauss-Legendre in both; it is exact to 1e-10. SciPy's density
    of the noncentral t is not used: at a hundred degrees of freedom its tails are wrong.

    Args:
      x: x̃, any shape.
      m: examples that share statistics, this one among them; ≥ 3.

    Raises:
      ValueError: m below 3, where the variance of the others is 0, or x̃ not finite.
    """
    m = whole_number("m", m, least=3)
    x = _finite("x", x)
    moments = [_quadrature(float(value), m) for value in x.ravel()]
    mean, var = np.array(moments, np.float64).reshape(-1, 2).T
    return NormalizedMoments(mean.reshape(x.shape), var.reshape(x.shape))


def _quadrature(x: float, m: int) -> tuple[float, float]:
    shift, freedom = x * math.sqrt(m - 1), m - 2
    radius = math.hypot(shift, math.sqrt(freedom))
    r, r_weights = _window(radius, _DEVIATIONS, 0.0, math.inf)
    limit = math.pi / 2
    angle = math.atan2(shift, math.sqrt(freedom))
    phi, phi_weights = _window(angle, _DEVIATIONS / radius, -limit, limit)
    sine, cosine = np.sin(phi), np.cos(phi)
    log_density = (
        (m - 3) * np.log(cosine)[:, None]
        + freedom * np.log(r)
        - r**2 / 2
        + shift * r * sine[:, None]
    )
    density = np.exp(log_density - log_density.max()) @ r_weights * phi_weights
    density /= density.sum()
    normalized = math.sqrt(m - 1) * sine / np.sqrt(m * cosine**2 + sine**2)
    mean = float(density @ normalized)
    return mean, float(density @ (normalized - mean) ** 2)


def _window(centre: float, half: float, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    low, high = max(centre - half, low), min(centre + half, high)
    half = (high - low) / 2
    return low + half * (1 + _NODES), half * _WEIGHTS


def noise_law(
    x: ArrayLike, m: float, *, skewness: ArrayLike = 0.0, kurtosis: ArrayLike = 3.0
) -> NormalizedMoments:
    """Mean and variance of x̂ given x̃ to first order in 1/m, values independent.

    E[x̂|x̃] = x̃ + (γ₁/2 + 3(κ − 1)·x̃/8 − x̃³/2)/m and Var = (1 + γ₁·x̃ + (κ − 1)·x̃²/4)/m.

    Args:
      x: x̃, any shape.
      m: values that share statistics, > 0; an effective size need not be whole.
      skewness: γ₁ of the feature, broadcast against x.
      kurtosis: κ of the feature, likewise; at least 1 + γ₁².

    Raises:
      ValueError: m is not positive, or κ < 1 + γ₁², which no distribution has.
    """
    if not 0 < m < math.inf:
        raise ValueError(f"m={m} is not allowed: it must be positive")
    x, skewness, kurtosis = (np.asarray(a, np.float64) for a in (x, skewness, kurtosis))
    slack = 1e-9 * np.abs(kurtosis)  # two values alone have equality
    if np.any(kurtosis < 1 + skewness**2 - slack):
        raise ValueError(
            f"kurtosis={kurtosis.tolist()} is not allowed: it must be at least 1 + skewness²"
        )
    bias = (skewness / 2 + 3 * (kurtosis - 1) * x / 8 - x**3 / 2) / m
    noise = StatisticsNoise(np.asarray(1 / m), skewness / m, (kurtosis - 1) / m)
    return NormalizedMoments(x + bias, variance_law(x, noise))


def variance_law(x: ArrayLike, noise: StatisticsNoise) -> Float[np.ndarray, "..."]:
    """Var(x̂|x̃) = Var(δ) + x̃·Cov(δ, ε) + x̃²·Var(ε)/4 to first order, for statistics of any kind.

    Args:
      x: x̃, shape=(..., features).
      noise: of the features' statistics.
    """
    x = np.asarray(x, np.float64)
    return noise.mean + x * noise.cross + x**2 * noise.var / 4


def whole_number(name: str, value: int, *, least: int, most: float = math.inf) -> int:
    """The value as an int; ValueError unless it is a whole number from least to most."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or not least <= value <= most:
        allowed = f"from {least} up" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{name}={value} is not allowed: whole numbers {allowed} are needed")
    return int(value)


def _finite(name: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if not np.all(np.isfinite(array)):
        raise ValueError(f"{name}={array.tolist()} is not allowed: give finite numbers")
    return array
