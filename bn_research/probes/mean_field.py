r"""Mean-field theory of BN at initialization: wide layers, ε = 0, a batch of any size.

Layers h ← W·φ(BN(h)), the weights of zero mean and variance 1/n. The n pre-activations of a wide
layer are independent Gaussian vectors over the batch; where no example of the batch differs from
another, they have covariance s·C once centred, C = I − 11ᵀ/B. So y = BN(h) is uniform on the sphere
of radius √B in the B − 1 dimensions orthogonal to 1, and the next layer has

    s = E[φ(y_i)²] − E[φ(y_i)·φ(y_j)], i ≠ j, where y_i and y_j have correlation ρ = −1/(B − 1).

Backwards, ∂L/∂y = φ'(y) ⊙ ∂L/∂φ passes BN's Jacobian Π/σ; Π projects onto the complement of
span{1, y}. W makes ∂L/∂φ Gaussian over the batch; it is orthogonal to 1, as ∂L/∂h above is, and no
example differs from another, so its covariance is C·E‖∂L/∂h‖²/(n·(B − 1)). With D = diag φ'(y) the
squared gradient norm grows from a layer to the one below it by

    growth = E[1/σ²]·E[tr(Π·D·C·D)]/(B − 1),    E[1/σ²] = B/(s·(B − 3)),

for Bσ²/s is χ² with B − 1 degrees of freedom, and σ is independent of y.

Linear networks: D = I, s = B/(B − 1), growth (B − 2)/(B − 3). ReLU, with k the number of positive
y_i, T = Σ relu(y_i) and q = Σ relu(y_i)²,

    tr(Π·D·C·D) = k·(1 − 1/B) − k·(1 − k/B)/B − (q − T²/B)/B,

whose mean is in closed form: E[k] = B/2 and E[q] = B/2 by the symmetry of y, E[k·(B − k)] =
B·(B − 1)·arccos(ρ)/(2π) and E[T²] = B/2 + B·(B − 1)·J₁(ρ), J₁ as in `relu_covariance`. For B → ∞
growth is π/(π − 1) = 1.467. Monte Carlo over y agrees to its standard error.

The mean-field approach: Yang et al. (2019), arXiv 1902.08129.
"""

import math

import numpy as np
from jaxtyping import Float

LIMIT = math.pi / (math.pi - 1)  # ReLU's growth for B → ∞
LEAST_BATCH = 4  # with fewer examples E[1/σ²] is infinite


def relu_covariance(rho: float) -> float:
    """J₁(ρ) = E[relu(u)·relu(v)] of standard Gaussians with correlation ρ (Cho & Saul, 2009).

    (√(1 − ρ²) + ρ·(π − arccos ρ))/(2π). It is homogeneous of degree two, so two coordinates of a
    vector on a sphere whose mean square is 1 have the same.
    """
    return (math.sqrt(1 - rho**2) + rho * (math.pi - math.acos(rho))) / (2 * math.pi)


def spread(activation: str, batch_size: int) -> float:
    """s: how the pre-activations of weights of variance 1/n vary over a batch, of a population."""
    rho = -1 / (batch_size - 1)
    return 1 - rho if activation == "linear" else 0.5 - relu_covariance(rho)


def growth(activation: str, batch_size: int) -> float:
    """Growth of the squared gradient norm with respect to the pre-activations, per layer.

    Raises:
      ValueError: a smaller batch, whose E[1/σ²] is infinite, or another activation.
    """
    if activation not in ("relu", "linear"):
        raise ValueError(f"activation={activation!r} is not allowed: relu or linear")
    if batch_size < LEAST_BATCH:
        raise ValueError(
            f"batch_size={batch_size} is not allowed: E[1/σ²] is finite from {LEAST_BATCH} up"
        )
    b = batch_size
    if activation == "linear":
        return (b - 2) / (b - 3)
    rho = -1 / (b - 1)
    positive_and_not = b * (b - 1) * math.acos(rho) / (2 * math.pi)  # E[k(B − k)]
    squared_sum = b / 2 + b * (b - 1) * relu_covariance(rho)  # E[T²]
    trace = (b - 1) / 2 - positive_and_not / b**2 - (b / 2 - squared_sum / b) / b
    return b / (spread("relu", b) * (b - 3)) * trace / (b - 1)


def residual_variances(depth: int) -> dict[str, Float[np.ndarray, "layers"]]:
    """Mean square of a residual stream after 0 … depth layers, by normalization (De & Smith, 2020).

    x ← x + W·relu(·) with weights of variance 2/n: with BN a layer adds 2·E[relu(y)²] = 1, without
    it doubles what is there.
    """
    layers = np.arange(depth + 1.0)
    return {"BN": 1 + layers, "none": 2**layers}


def residual_gradient(depth: int) -> Float[np.ndarray, "layers"]:
    """Squared gradient norm in a residual BN stream of ReLU layers, over that at the top; B → ∞.

    Of what a layer adds to the mean square, 1, the share 1 − 1/π varies over the batch; the rest
    is common to all examples, and BN takes it away. So BN divides by 1 + (1 − 1/π)·l, and layer
    l adds 1/(1 + (1 − 1/π)·l) of the squared gradient to it: a power of the depth, π/(π − 1),
    where the plain network has an exponential.
    """
    factors = 1 + 1 / (1 + np.arange(depth) / LIMIT)
    return np.append(np.cumprod(factors[::-1])[::-1], 1.0)
