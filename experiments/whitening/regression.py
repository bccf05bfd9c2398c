"""Linear regression on drawn inputs, each transform of them measured against theory."""

import math
from typing import Any

import numpy as np

from bn_research.normalization.input_whitening import TRANSFORMS, hessian
from bn_research.training import linear_regression
from experiments.whitening import Config


def measure_regression(seed: int, config: Config) -> dict[str, Any]:
    """Every transform of inputs of every condition number and mean, against theory.

    With the covariance in a random orthogonal basis ("correlated") the inputs take every mean norm,
    in one random direction; along the axes, where scaling alone whitens, they have mean 0.

    Returns:
      "seed", "features", "examples" and "settings", one dict for each input and transform: what was
      drawn ("name", "correlated", "kappa" of Σ, "mean_norm"); the theory ("predicted_kappa" of H,
      "predicted_rate", "predicted_steps", "predicted_top_eigenvalue", "mean_eigenvalue"); what was
      measured at the best rate from a start on both extreme eigenvectors ("measured_kappa",
      "top_eigenvalue", "measured_rate", "measured_steps": ‖w − w*‖ down to 1e-6 of its start); and
      "task_steps" from w = 0 to 1e-6 of the first loss, for the same targets after all transforms,
      y = v·x with v normal, which is kind to raw inputs: y varies most where they do.
    """
    from scipy import stats

    rng, features = np.random.default_rng(seed), config.features
    condition_numbers, examples = config.condition_numbers, config.regression_examples
    basis = stats.ortho_group.rvs(features, random_state=rng)
    direction = rng.standard_normal(features)
    direction /= np.linalg.norm(direction)
    target = rng.standard_normal(features)
    grid = [(True, kappa, norm) for kappa in condition_numbers for norm in config.mean_norms]
    grid += [(False, kappa, 0.0) for kappa in condition_numbers]
    settings = []
    for correlated, kappa, norm in grid:
        vectors = basis if correlated else np.eye(features)
        sigma = (vectors * linear_regression.spectrum(features, kappa)) @ vectors.T
        mean = norm * direction
        x = linear_regression.draw_inputs(rng, sigma, mean, examples=examples)
        drawn = {"correlated": correlated, "kappa": float(kappa), "mean_norm": float(norm)}
        for name in TRANSFORMS:
            theory = _predict(*linear_regression.predicted_moments(sigma, mean, name))
            measured = _measure(linear_regression.transform(x, name), x @ target)
            settings.append({"name": name} | drawn | theory | measured)
    return {"seed": seed, "features": features, "examples": examples, "settings": settings}


def _predict(covariance: np.ndarray, mean: np.ndarray) -> dict[str, Any]:
    eigenvalues = np.linalg.eigvalsh(hessian(covariance, mean))
    kappa = float(eigenvalues[-1] / eigenvalues[0])
    rate = linear_regression.contraction(kappa)
    return {
        "predicted_kappa": kappa,
        "predicted_rate": rate,
        "predicted_steps": linear_regression.predicted_steps(rate),
        "predicted_top_eigenvalue": float(eigenvalues[-1]),
        "mean_eigenvalue": linear_regression.mean_eigenvalue(covariance, mean),
    }


def _measure(z: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    inputs = np.column_stack([z, np.ones(len(z))])
    matrix = inputs.T @ inputs / len(inputs)
    eigenvalues, vectors = np.linalg.eigh(matrix)
    solution = np.linalg.lstsq(inputs, y)[0]
    rate, descend = linear_regression.best_rate(eigenvalues), linear_regression.descend
    worst = descend(inputs, y, solution + vectors[:, 0] + vectors[:, -1], solution, rate=rate)
    tolerance = math.sqrt(linear_regression.TOLERANCE)  # of the root of the loss
    zero = np.zeros_like(solution)
    task = descend(inputs, y, zero, solution, rate=rate, tolerance=tolerance, metric=matrix)
    return {
        "measured_kappa": float(eigenvalues[-1] / eigenvalues[0]),
        "top_eigenvalue": float(eigenvalues[-1]),
        "measured_rate": worst.rate,
        "measured_steps": worst.steps,
        "task_steps": task.steps,
    }
