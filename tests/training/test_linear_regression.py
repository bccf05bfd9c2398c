"""Gradient descent on linear regression: every rate against closed forms and NumPy loops."""

import math

import numpy as np
import pytest
from scipy import stats

from bn_research.normalization.input_whitening import TRANSFORMS, hessian
from bn_research.training.linear_regression import (
    Descent,
    best_rate,
    contraction,
    descend,
    draw_inputs,
    mean_eigenvalue,
    predicted_moments,
    predicted_steps,
    spectrum,
    transform,
)

FEATURES, EXAMPLES = 4, 24


def random_covariance(rng, condition_number=50.0):
    basis = stats.ortho_group.rvs(FEATURES, random_state=rng)
    return (basis * spectrum(FEATURES, condition_number)) @ basis.T


@pytest.fixture(scope="module")
def problem():
    """Inputs with a constant feature, targets, minimizer, and the spectrum of H."""
    rng = np.random.default_rng(3)
    x = draw_inputs(rng, random_covariance(rng), 2 * rng.random(FEATURES), examples=EXAMPLES)
    inputs = np.column_stack([x, np.ones(EXAMPLES)])
    targets = rng.standard_normal(EXAMPLES)  # not a linear function of the inputs
    solution = np.linalg.solve(inputs.T @ inputs, inputs.T @ targets)
    return inputs, targets, solution, *np.linalg.eigh(inputs.T @ inputs / EXAMPLES)


def test_the_spectrum_is_geometric_around_one():
    np.testing.assert_allclose(spectrum(3, 100.0), [10, 1, 0.1], rtol=1e-12)
    np.testing.assert_array_equal(spectrum(5, 1.0), np.ones(5))


def test_inputs_have_the_moments_asked_for():
    rng = np.random.default_rng(0)
    sigma, mean = random_covariance(rng), 10 * rng.standard_normal(FEATURES)
    x = draw_inputs(rng, sigma, mean, examples=EXAMPLES)
    assert x.shape == (EXAMPLES, FEATURES) and x.dtype == np.float64
    np.testing.assert_allclose(x.mean(axis=0), mean, rtol=0, atol=1e-13)
    np.testing.assert_allclose(np.cov(x.T, bias=True), sigma, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_has_its_predicted_moments(name):
    rng = np.random.default_rng(1)
    sigma, mean = random_covariance(rng), np.array([3.0, 0.0, -2.0, 1.0])
    x = draw_inputs(rng, sigma, mean, examples=EXAMPLES)
    z = transform(x, name)
    assert z.dtype == np.float64
    centred = x - x.mean(axis=0)
    expected = {
        "raw": (np.cov(x.T, bias=True), x.mean(axis=0)),
        "centred": (np.cov(x.T, bias=True), np.zeros(FEATURES)),
        "scaled": (np.corrcoef(x.T), np.zeros(FEATURES)),
    }.get(name, (np.eye(FEATURES), np.zeros(FEATURES)))
    for found in ((np.cov(z.T, bias=True), z.mean(axis=0)), predicted_moments(sigma, mean, name)):
        for value, reference in zip(found, expected, strict=True):
            np.testing.assert_allclose(value, reference, rtol=0, atol=1e-12)
    # z = (x − μ)·M for one matrix M: symmetric for ZCA, with orthogonal rows V·Λ^(−1/2) for PCA.
    matrix = np.linalg.lstsq(centred, z - z.mean(axis=0))[0]
    if name == "zca":
        np.testing.assert_allclose(matrix, matrix.T, rtol=0, atol=1e-12)
    if name == "pca":
        np.testing.assert_allclose(
            matrix.T @ matrix, np.diag(1 / spectrum(FEATURES, 50.0)), rtol=0, atol=1e-11
        )


def test_the_hessian_is_that_of_the_loss(problem):
    inputs, *_, eigenvalues, vectors = problem
    x = inputs[:, :-1]
    found = hessian(np.cov(x.T, bias=True), x.mean(axis=0))
    np.testing.assert_allclose(found, (vectors * eigenvalues) @ vectors.T, rtol=0, atol=1e-13)


def test_descent_follows_the_closed_form_at_any_rate(problem):
    """e_t = Σ (1 − ηλ_i)^t·⟨v_i, e_0⟩·v_i, so ‖e_t‖ and the first t below a bound are known."""
    inputs, targets, solution, eigenvalues, vectors = problem
    weights = np.array([1.0, -2.0, 0.5, 3.0, 1.5])
    rate, tolerance = 1.3 / eigenvalues[-1], 1e-4
    steps = np.arange(20_000)[:, None]
    for metric in (None, (vectors * eigenvalues) @ vectors.T):
        scale = np.ones(FEATURES + 1) if metric is None else np.sqrt(eigenvalues)
        errors = np.linalg.norm((1 - rate * eigenvalues) ** steps * weights * scale, axis=1)
        errors /= errors[0]
        last = np.argmax(errors <= tolerance)
        middle = np.argmax(errors <= math.sqrt(tolerance))
        found = descend(
            inputs,
            targets,
            solution + vectors @ weights,
            solution,
            rate=rate,
            tolerance=tolerance,
            metric=metric,
        )
        assert found.steps == last
        expected = (errors[last] / errors[middle]) ** (1 / (last - middle))
        assert found.rate == pytest.approx(expected, rel=1e-9)


def test_the_best_rate_contracts_as_the_theory_says(problem):
    inputs, targets, solution, eigenvalues, vectors = problem
    kappa = eigenvalues[-1] / eigenvalues[0]
    start = solution + vectors[:, 0] + vectors[:, -1]
    found = descend(inputs, targets, start, solution, rate=best_rate(eigenvalues))
    assert found.rate == pytest.approx((kappa - 1) / (kappa + 1), rel=1e-9)
    assert found.steps == math.ceil(math.log(1e-6) / math.log((kappa - 1) / (kappa + 1)))
    for factor in (0.9, 1 / 0.99):  # either way is slower
        rate = factor * best_rate(eigenvalues)
        assert descend(inputs, targets, start, solution, rate=rate).steps > found.steps


def test_descent_that_diverges_or_runs_out_of_steps_is_none(problem):
    inputs, targets, solution, eigenvalues, vectors = problem
    start = solution + vectors[:, -1]
    diverging = descend(inputs, targets, start, solution, rate=2.1 / eigenvalues[-1])
    assert diverging == Descent(None, None)
    slow = descend(inputs, targets, start, solution, rate=0.01 / eigenvalues[-1], max_steps=20)
    assert slow == Descent(None, None)


def test_predicted_steps():
    assert predicted_steps(0.0) == 1  # κ = 1: no logarithm of 0
    assert predicted_steps(1e-15) == 1
    assert predicted_steps(0.1) == 6
    assert predicted_steps(0.5, tolerance=0.3) == 2
    for kappa in (2.0, 1e3):
        steps = predicted_steps(contraction(kappa))
        assert contraction(kappa) ** steps <= 1e-6 < contraction(kappa) ** (steps - 1)


def test_a_mean_adds_an_eigenvalue():
    # Isotropic inputs: H's eigenvalues are 1 and, in the plane of μ and the bias, those of
    # [[1 + m², m], [m, 1]], whose product is 1 and whose sum is 2 + m².
    m = 3.0
    half = (2 + m**2) / 2
    top = half + math.sqrt(half**2 - 1)
    found = np.linalg.eigvalsh(hessian(np.eye(3), np.array([0, m, 0])))
    np.testing.assert_allclose(found, [1 / top, 1, 1, top], rtol=1e-12)
    assert mean_eigenvalue(np.eye(3), np.array([0, m, 0])) == pytest.approx(
        1 + m**2 + m**2 / (1 + m**2)
    )
    # To first order: the rest is of order ‖Σ‖²/‖μ‖², and from below.
    rng = np.random.default_rng(2)
    sigma, direction = random_covariance(rng), rng.standard_normal(FEATURES)
    gaps = []
    for norm in (20.0, 200.0):
        mean = norm * direction / np.linalg.norm(direction)
        gaps.append(np.linalg.eigvalsh(hessian(sigma, mean))[-1] - mean_eigenvalue(sigma, mean))
    assert gaps[0] > 0 and gaps[0] / gaps[1] == pytest.approx(100, rel=0.1)


def test_an_unknown_transform_is_refused():
    for call in (
        lambda: transform(np.ones((3, 2)), "lda"),
        lambda: predicted_moments(np.eye(2), np.ones(2), "lda"),
    ):
        with pytest.raises(ValueError, match="name='lda' is unknown"):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spectrum(1, 2.0), "features=1 "),
        (lambda: spectrum(4, 0.5), "condition_number=0.5 "),
        (
            lambda: draw_inputs(np.random.default_rng(0), np.eye(4), np.zeros(4), examples=4),
            "examples=4 ",
        ),
    ],
)
def test_bad_settings_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
