"""Weight decay on scale-invariant weights as a learning rate that grows exponentially.

A loss that does not depend on the scale of its weights, as with batch normalization behind them,
trains alike with decay at one rate and without decay at another, growing one.

Source: Z. Li, S. Arora, "An exponential learning rate schedule for deep learning", ICLR 2020,
arXiv 1910.07454.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def largest_product(momentum: float) -> float:
    """ηλ up to which momentum and decay do not overshoot, (1 − √γ)²."""
    return (1 - momentum**0.5) ** 2


def exponential_rates(
    rates: Sequence[float] | np.ndarray, decay: float, momentum: float
) -> Float[np.ndarray, "steps"]:
    """Rates at which momentum SGD without decay follows that with decay.

    With v ← γv + ∇L + λθ, θ ← θ − η_t·v and v₀ = 0, θ̃_t = P_t·θ_t follows momentum SGD without
    decay at η̃_t = P_t·P_{t+1}·η_t, where P₀ = 1, P_{t+1} = P_t/α_{t+1}, α₁ = 1 − η₀λ and
    α_{t+1} = 1 − η_t·λ + γ·(η_t/η_{t−1})·(1 − 1/α_t).

    Raises:
      ValueError: ηλ > (1 − √γ)² at some step, where α can turn negative.
    """
    rates = np.asarray(rates, np.float64)
    bound = largest_product(momentum)
    if np.max(rates) * decay > bound:
        raise ValueError(
            f"decay={decay:g} at a rate of {np.max(rates):g} is not allowed: their product must be "
            f"at most (1 − √momentum)² = {bound:.3g}"
        )
    p, alpha, found = 1.0, 1 - rates[0] * decay, []
    for t, rate in enumerate(rates):
        if t:
            alpha = 1 - rate * decay + momentum * rate / rates[t - 1] * (1 - 1 / alpha)
        found.append(p * (p / alpha) * rate)
        p /= alpha
    return np.array(found)
