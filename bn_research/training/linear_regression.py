r"""Linear regression by gradient descent: what the covariance and the mean of its inputs cost.

The loss L(w, b) = ½·mean (x·w + b − y)² has the Hessian H = E[x̃·x̃ᵀ] with x̃ = (x, 1), whatever y:

    H = [[Σ + μ·μᵀ, μ], [μᵀ, 1]],    w_{t+1} − w* = (I − ηH)·(w_t − w*)

At the best constant rate, η = 2/(λmax + λmin), the error contracts per step by

    ρ = (κ − 1)/(κ + 1),    κ = λmax/λmin,

in the worst case, which a start on the two extreme eigenvectors attains at every step; κ = 1 takes
one step. A mean adds an eigenvalue near ‖μ̃‖² + μ̃ᵀ·Σ̃·μ̃/‖μ̃‖², with μ̃ = (μ, 1) and Σ̃ = diag(Σ, 0):
the Rayleigh quotient of H at μ̃, never above λmax. As det H = det Σ, it takes that from the others.

A spectrum is geometric, from 1/√κ to √κ: the eigenvalue 1 of the bias then lies inside it, and
subtracting the mean, or whitening, leaves κ of Σ, or 1, for the whole of H. The covariance of the
examples drawn is the one asked for to rounding, so theory needs no sampling error.

Source: Y. LeCun, L. Bottou, G. Orr & K.-R. Müller, "Efficient BackProp", 1998, sections 4 and 5.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bn_research.normalization import batch_norm, whitening
from bn_research.normalization.input_whitening import check_transform

TOLERANCE = 1e-6
MAX_STEPS = 2_000_000


class Descent(NamedTuple):
    """What a run of gradient descent took."""

    steps: int | None  # until the relative error is at most the tolerance; None: not in max_steps
    rate: float | None  # error after a step over that before it, geometric mean over the tail


def spectrum(features: int, condition_number: float) -> Float[np.ndarray, "d"]:
    """Eigenvalues from √κ down to 1/√κ, in equal ratios.

    Raises:
      ValueError: features < 2, or condition_number < 1.
    """
    if features < 2:
        raise ValueError(f"features={features} is not allowed: at least 2 are needed")
    if not 1 <= condition_number < math.inf:
        raise ValueError(f"condition_number={condition_number} is not allowed: it must be ≥ 1")
    return condition_number ** np.linspace(0.5, -0.5, features)


def draw_inputs(
    rng: np.random.Generator,
    covariance: Float[np.ndarray, "d d"],
    mean: Float[np.ndarray, "d"],
    *,
    examples: int,
) -> Float[np.ndarray, "n d"]:
    """Inputs whose own mean and biased covariance are those given, to rounding.

    x = √n·Q·Σ^(1/2) + μ; Q has orthonormal columns, orthogonal to 1, of uniform direction.

    Raises:
      ValueError: examples ≤ features, too few for a covariance of full rank.
    """
    if examples <= len(mean):
        raise ValueError(
            f"examples={examples} is not allowed: more than the {len(mean)} features are needed"
        )
    deviations = rng.standard_normal((examples, len(mean)))
    columns = np.linalg.qr(deviations - deviations.mean(axis=0)).Q
    values, vectors = np.linalg.eigh(covariance)
    return math.sqrt(examples) * (columns * np.sqrt(values)) @ vectors.T + mean


def transform(x: Float[np.ndarray, "n d"], name: str) -> Float[np.ndarray, "n d"]:
    """Inputs transformed by their own statistics, in float64.

    "raw" is x, "centred" x − μ, "scaled" the batch normalization of x, "zca" Σ^(−1/2)(x − μ) and
    "pca" Λ^(−1/2)·Vᵀ(x − μ), components by falling variance; ε = 0.
    """
    check_transform(name)
    with jax.enable_x64(True):
        if name == "scaled":
            return np.asarray(batch_norm(jnp.asarray(x), epsilon=0.0)[0])
        if name in ("zca", "pca"):
            white, moments = whitening.whiten(jnp.asarray(x), epsilon=0.0)
            if name == "zca":
                return np.asarray(white)
            vectors = np.linalg.eigh(whitening.covariance(moments)).eigenvectors
            return np.asarray(white) @ vectors[:, ::-1]
    return x - x.mean(axis=0) if name == "centred" else x


def predicted_moments(
    covariance: Float[np.ndarray, "d d"], mean: Float[np.ndarray, "d"], name: str
) -> tuple[Float[np.ndarray, "d d"], Float[np.ndarray, "d"]]:
    """Covariance and mean of transformed inputs, from those of x."""
    check_transform(name)
    if name == "raw":
        return covariance, mean
    if name == "scaled":
        std = np.sqrt(np.diag(covariance))
        covariance = covariance / np.outer(std, std)
    elif name in ("zca", "pca"):
        covariance = np.eye(len(mean))
    return covariance, np.zeros_like(mean)


def mean_eigenvalue(covariance: Float[np.ndarray, "d d"], mean: Float[np.ndarray, "d"]) -> float:
    """The eigenvalue that a mean adds to H, to first order in Σ: ‖μ̃‖² + μ̃ᵀ·Σ̃·μ̃/‖μ̃‖²."""
    squared = mean @ mean + 1
    return float(squared + mean @ covariance @ mean / squared)


def best_rate(eigenvalues: Float[np.ndarray, "d"]) -> float:
    """η = 2/(λmax + λmin), at which the extreme eigenvectors contract equally."""
    return float(2 / (np.max(eigenvalues) + np.min(eigenvalues)))


def contraction(condition_number: float) -> float:
    """ρ = (κ − 1)/(κ + 1), of the error per step at the best rate."""
    return (condition_number - 1) / (condition_number + 1)


def predicted_steps(contraction: float, *, tolerance: float = TOLERANCE) -> int:
    """The first step t with ρ^t ≤ tolerance: ln(tolerance)/ln(ρ), rounded up; 1 for ρ = 0."""
    if contraction <= tolerance:
        return 1
    # An exact power, such as ρ = 0.1, must not take one more step by rounding.
    return math.ceil(math.log(tolerance) / math.log(contraction) - 1e-9)


def descend(
    inputs: Float[np.ndarray, "n d"],
    targets: Float[np.ndarray, "n"],
    start: Float[np.ndarray, "d"],
    solution: Float[np.ndarray, "d"],
    *,
    rate: float,
    tolerance: float = TOLERANCE,
    metric: Float[np.ndarray, "d d"] | None = None,
    max_steps: int = MAX_STEPS,
) -> Descent:
    """Gradient descent on ½·mean (x̃·w − y)², in float64, until the relative error is small.

    Inputs are x̃ with its constant feature, targets y, the start w₀, the solution the minimizer w*,
    and the rate η. The error is ‖w − w*‖ over ‖w₀ − w*‖, with ‖e‖² = eᵀ·metric·e, by default the
    identity; with H it is the root of the excess loss. The rate of a `Descent` is taken over the
    tail, from √tolerance to the tolerance, or over the whole run where one step crosses both.
    """
    with jax.enable_x64(True):
        metric = np.eye(len(start)) if metric is None else metric
        arguments = (inputs, targets, start, solution, rate, tolerance, metric, max_steps)
        step, error, *middle = (value.item() for value in _descend(*map(jnp.asarray, arguments)))
    if not error <= tolerance:
        return Descent(None, None)
    from_step, from_error = (0, 1.0) if step == middle[0] else middle
    return Descent(step, (error / from_error) ** (1 / (step - from_step)))


@jax.jit
def _descend(inputs, targets, start, solution, rate, tolerance, metric, max_steps):
    """Last step and its error; the first step with an error up to √tolerance, and that error."""
    gradient = jax.grad(lambda w: jnp.mean(jnp.square(inputs @ w - targets)) / 2)

    def distance(w):
        deviation = w - solution
        return jnp.sqrt(deviation @ metric @ deviation)

    def unfinished(carry):
        return (carry[2] > tolerance) & (carry[0] < max_steps)

    def body(carry):
        step, w, _, middle_step, middle_error = carry
        step, w = step + 1, w - rate * gradient(w)
        error = distance(w) / distance(start)
        passed = middle_error <= jnp.sqrt(tolerance)
        middle = jnp.where(passed, middle_step, step), jnp.where(passed, middle_error, error)
        return step, w, error, *middle

    zero, one = jnp.zeros_like(max_steps), jnp.ones_like(tolerance)
    step, _, *rest = jax.lax.while_loop(unfinished, body, (zero, start, one, zero, one))
    return step, *rest
