"""Tests of experiments.whitening.regression: each setting against its theory."""

import pytest

from bn_research.normalization.input_whitening import TRANSFORMS
from bn_research.training import linear_regression
from experiments.whitening import Config
from experiments.whitening.regression import measure_regression

FEATURES, EXAMPLES = 4, 24


def measured(seed, condition_numbers, mean_norms):
    drawn = {"condition_numbers": condition_numbers, "mean_norms": mean_norms}
    config = Config(features=FEATURES, regression_examples=EXAMPLES, **drawn)
    return measure_regression(seed, config)


@pytest.fixture(scope="module")
def record():
    return measured(5, (1.0, 40.0), (0.0, 6.0))


def settings(record, **wanted):
    return [s for s in record["settings"] if all(s[key] == wanted[key] for key in wanted)]


def test_every_setting_meets_its_theory(record):
    assert (record["seed"], record["features"], record["examples"]) == (5, FEATURES, EXAMPLES)
    assert len(record["settings"]) == (2 * 2 + 2) * len(TRANSFORMS)
    for setting in record["settings"]:
        kappa, top, rate, steps = (
            setting[f"predicted_{name}"] for name in ("kappa", "top_eigenvalue", "rate", "steps")
        )
        assert setting["measured_kappa"] == pytest.approx(kappa, rel=1e-9)
        assert setting["top_eigenvalue"] == pytest.approx(top, rel=1e-9)
        assert setting["measured_rate"] == pytest.approx(rate, rel=1e-9, abs=1e-9)
        assert setting["measured_steps"] == steps >= setting["task_steps"]
        assert setting["mean_eigenvalue"] <= setting["top_eigenvalue"] * (1 + 1e-12)


def test_what_each_transform_saves(record):
    for name in ("zca", "pca"):
        for setting in settings(record, name=name):
            assert (setting["measured_steps"], setting["task_steps"]) == (1, 1)
    (raw,) = settings(record, name="raw", kappa=40.0, mean_norm=0.0, correlated=True)
    (centred,) = settings(record, name="centred", kappa=40.0, mean_norm=6.0, correlated=True)
    (shifted,) = settings(record, name="raw", kappa=40.0, mean_norm=6.0, correlated=True)
    assert raw["predicted_kappa"] == centred["predicted_kappa"] == pytest.approx(40)
    assert shifted["measured_steps"] > 10 * centred["measured_steps"]
    assert shifted["top_eigenvalue"] == pytest.approx(shifted["mean_eigenvalue"], rel=0.02)
    # Scaling whitens what varies along the axes, and not what is correlated.
    (along,) = settings(record, name="scaled", kappa=40.0, correlated=False)
    (across,) = settings(record, name="scaled", kappa=40.0, mean_norm=0.0, correlated=True)
    assert along["measured_steps"] == 1 < across["measured_steps"]


def test_a_seed_fixes_the_record():
    first, again, other = (measured(seed, (3.0,), (1.0,)) for seed in (0, 0, 1))
    assert first == again
    assert first["settings"] != other["settings"]


def test_all_settings_share_one_program(record):
    """Compilation takes far longer than most runs."""
    before = linear_regression._descend._cache_size()
    measured(6, (2.0,), (1.0,))
    assert linear_regression._descend._cache_size() == before > 0
