"""Tests of experiments.transform: its references, its verdicts, and whole runs at smoke size."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from bn_research.lab.launch import main
from bn_research.lab.workdir import _plain
from bn_research.normalization import batch_norm
from bn_research.normalization.whitening import CovarianceMoments
from experiments.transform import EXPERIMENT, PRESETS, measurements, verdicts
from experiments.transform.measurements import (
    ARMS,
    PASSES,
    REAL,
    SOURCES,
    correlation,
    features,
    identities,
    measure_outlier,
    measure_source,
    measure_whitening,
    prepare,
    standardize,
    transfer_error,
    undoing,
)
from experiments.transform.verdicts import (
    exponent,
    judge_cost,
    judge_decorrelation,
    judge_identity,
    judge_unit,
    transfer_slopes,
)

CONFIG = PRESETS["smoke"]


def launch(workdir, *flags):
    return main(EXPERIMENT, ["transform", "--preset=smoke", f"--workdir={workdir}", *flags])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a smoke run left alone."""
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert launch(workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def pixels():
    return prepare(CONFIG)


@pytest.fixture
def programs():
    """Forgets the compiled programs, so that a replaced transform is used, and then forgotten."""
    compiled = (measurements._normalized, measurements._covariance, measurements._whitened)
    for program in compiled:
        program.clear_cache()
    yield
    for program in compiled:
        program.clear_cache()


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# --- what the transform is compared with ---


def test_the_checks_run_in_float64_and_leave_the_flag_alone():
    assert standardize(normal((8, 2)), 1e-5).dtype == np.float64
    assert jnp.ones(2).dtype == jnp.float32


def test_identities_see_every_feature_but_constant_ones():
    x = normal((16, 5, 4)) + 1e3
    x[..., 2] = 0.1
    x[..., 3] = 0.0
    for epsilon in (0.0, 1e-3):
        found = identities(x, epsilon)
        assert found["constant_share"] == 0.5 and found["constant_output"] == 0
        assert max(found[key] for key in ("mean", "variance", "excess", "recovery")) < 1e-12
        assert 1 / math.sqrt(79) < found["reach"] < 0.5


def test_undoing_by_hand():
    """σ² = 2/3 + 1/3, μ = 3."""
    scale, bias = undoing(np.array([[2.0], [3.0], [4.0]]), 1 / 3)
    np.testing.assert_allclose([scale, bias], [[1.0], [3.0]], rtol=1e-15)


def test_error_on_another_batch_is_the_closed_form():
    a, b = normal((20, 6), 1) * 3 + 5, normal((30, 6), 2)
    expected = np.mean((a.mean(0) - b.mean(0)) ** 2 + (a.std(0) - b.std(0)) ** 2)
    assert transfer_error(a, b, 0.0) == pytest.approx(expected, rel=1e-12)


def test_error_of_gaussian_features_is_theory():
    m, d = 64, 4000
    found = transfer_error(normal((m, d), 3), normal((m, d), 4), 0.0)
    assert found == pytest.approx(3 / m, rel=0.05)


def test_correlation_is_numpys():
    x = normal((3, 10, 5)) @ normal((5, 5), 1)
    expected = np.corrcoef(x.reshape(-1, 5).T)
    np.testing.assert_allclose(correlation(x), expected, atol=1e-14)


def test_convolutional_features_are_xlas_convolution(pixels):
    x = features("conv", pixels[:3], 7)
    rng = np.random.default_rng([7, 2])
    kernel = rng.standard_normal((1, 3, 3, 8)) * math.sqrt(2 / 9)
    with jax.enable_x64(True):
        expected = jax.lax.conv_general_dilated(
            pixels[:3],
            kernel.transpose(1, 2, 0, 3),
            (2, 2),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
    np.testing.assert_allclose(x, expected, atol=1e-14)


def test_features_are_drawn_by_seed_and_the_controls_are_what_they_say(pixels):
    for source in SOURCES:
        one, again, other = (features(source, pixels, seed) for seed in (0, 0, 1))
        np.testing.assert_array_equal(one, again)
        assert (source == "pixels") == np.array_equal(one, other)
    offset = features("offset", pixels, 0)
    np.testing.assert_allclose((offset.mean(0) / offset.std(0))[[0, -1]], [1, 1e6], rtol=0.2)


# --- verdicts on wrong transforms ---


@pytest.fixture
def dense_alone(monkeypatch):
    """One kind of features: programs of five kinds take seconds to compile."""
    for name in ("REAL", "SOURCES"):
        monkeypatch.setattr(verdicts, name, ("dense",))


def stored(record):
    """The record as the ledger gives it back: null for a number that is not finite."""
    return json.loads(json.dumps(_plain(record)))


def measure(pixels):
    return [stored(measure_source(CONFIG, pixels, "dense", 0))]


def unbiased(x, scale, bias, epsilon):
    count = math.prod(x.shape[:-1])
    return batch_norm(x, scale * np.sqrt(1 - 1 / count), bias, epsilon=epsilon)


def uncentred(x, scale, bias, epsilon):
    y, moments = batch_norm(x, epsilon=epsilon)
    return (y + 1e-9) * scale + bias, moments


def epsilon_outside_the_root(x, scale, bias, epsilon):
    axes = tuple(range(x.ndim - 1))
    mean, std = jnp.mean(x, axes), jnp.std(x, axes)
    spread = std + epsilon
    return (x - mean) / jnp.where(spread > 0, spread, 1) * scale + bias, None


def without_scale_and_bias(x, scale, bias, epsilon):
    return batch_norm(x, epsilon=epsilon)


def float32_inside(x, scale, bias, epsilon):
    y, moments = batch_norm(x, scale, bias, epsilon=epsilon)
    return y.astype(jnp.float32).astype(x.dtype), moments


def mixing_features(x, scale, bias, epsilon):
    y, moments = batch_norm(x, epsilon=epsilon)
    mixed = y * np.sqrt(1 - 1e-6) + 1e-3 * jnp.roll(y, 1, -1)
    return mixed * scale + bias, moments


def not_a_number(x, scale, bias, epsilon):
    return x * jnp.nan, None


R, N, INC = REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (batch_norm, (R, INC, R)),
        (unbiased, (N, N, R)),
        (uncentred, (N, N, R)),
        (epsilon_outside_the_root, (N, N, R)),
        (without_scale_and_bias, (R, N, R)),
        (float32_inside, (N, N, N)),
        (mixing_features, (N, N, N)),
        (not_a_number, (N, N, N)),
    ],
)
def test_a_wrong_transform_is_not_reproduced(
    monkeypatch, dense_alone, programs, pixels, wrong, expected
):
    """Of unit-normalization, identity-recoverable and no-decorrelation.

    The second is at best inconclusive: one seed gives no interval of the slope.
    """
    monkeypatch.setattr(measurements, "batch_norm", wrong)
    records = measure(pixels)
    whitened = [stored(measure_whitening(pixels, 0))]
    findings = (
        judge_unit(records, stored(measure_outlier(CONFIG))),
        judge_identity(CONFIG, records),
        judge_decorrelation(records, whitened),
    )
    assert tuple(finding.verdict for finding in findings) == expected


def test_a_control_that_does_not_whiten_leaves_decorrelation_open(
    monkeypatch, dense_alone, programs, pixels
):
    records = measure(pixels)
    monkeypatch.setattr(measurements, "whiten", batch_norm)
    finding = judge_decorrelation(records, [measure_whitening(pixels, 0)])
    assert finding.verdict == INCONCLUSIVE
    assert finding.measured["largest |correlation|, ZCA"] > 0.1


def test_a_covariance_that_is_not_centred_has_too_high_a_rank(
    monkeypatch, dense_alone, programs, pixels
):
    def raw(x):
        return CovarianceMoments(jnp.float32(len(x)), jnp.zeros(x.shape[-1]), x.T @ x)

    assert judge_cost(measure(pixels), times()).verdict == REPRODUCED
    monkeypatch.setattr(measurements, "batch_covariance", raw)
    measurements._covariance.clear_cache()
    finding = judge_cost(measure(pixels), times())
    assert finding.verdict == NOT_REPRODUCED
    assert finding.measured["largest excess of a rank over m - 1"] == 1


# --- verdicts on made-up records ---


def made_up(exponents=(-0.5,) * 5, noise=0.01, **worst):
    """Records of three seeds with these slopes of the error, by source."""
    zero = ("mean", "variance", "excess", "reach", "constant_share", "constant_output", "recovery")
    zero += ("correlation_change", "correlation_size", "rank", "rank_excess")
    sizes = np.array(CONFIG.batch_sizes, dtype=float)
    return [
        {
            "source": source,
            "seed": seed,
            "transfer": list(sizes ** (power + noise * (seed - 1))),
            **{key: [worst.get(key, 0.0)] * 2 for key in zero},
        }
        for source, power in zip(SOURCES, exponents, strict=True)
        for seed in range(3)
    ]


def test_verdicts_on_the_law_of_the_error():
    assert judge_identity(CONFIG, made_up()).verdict == REPRODUCED
    assert judge_identity(CONFIG, made_up(recovery=2e-12)).verdict == NOT_REPRODUCED
    assert judge_identity(CONFIG, made_up(recovery=None)).verdict == NOT_REPRODUCED
    for real in range(3):
        slopes = [-0.5] * 5
        slopes[real] = -0.3
        finding = judge_identity(CONFIG, made_up(slopes))
        assert finding.verdict == INCONCLUSIVE
        assert finding.interval[0] < -0.3 < finding.interval[1] < -0.2
        assert REAL[real] in finding.note
    assert judge_identity(CONFIG, made_up(noise=0.1)).verdict == INCONCLUSIVE
    heavy = judge_identity(CONFIG, made_up((-0.5, -0.5, -0.5, -0.5, -0.3)))
    assert heavy.verdict == REPRODUCED
    assert heavy.measured["slope, heavy tails"] == pytest.approx(-0.3)


def test_a_lost_error_gives_no_slope():
    records = made_up()
    records[0]["transfer"][1] = None
    assert transfer_slopes(CONFIG, records)["pixels"] is None
    finding = judge_identity(CONFIG, records)
    assert finding.verdict == INCONCLUSIVE and finding.interval is None
    assert math.isnan(finding.measured["slope, pixels"])


@pytest.mark.parametrize("key", ["mean", "variance", "excess"])
def test_each_deviation_alone_decides_unit_normalization(key):
    outlier = {"deviation": [0.0]}
    assert judge_unit(made_up(), outlier).verdict == REPRODUCED
    assert judge_unit(made_up(**{key: 0.9e-12}), outlier).verdict == REPRODUCED
    assert judge_unit(made_up(**{key: 1.1e-12}), outlier).verdict == NOT_REPRODUCED
    assert judge_unit(made_up(**{key: None}), outlier).verdict == NOT_REPRODUCED


def times(ratio=100.0, spread=0.01, repeats=11, dims=(256, 512), power=2.5):
    """Made-up timings: BN takes d microseconds, the others `ratio` times as long at d = 512."""
    wobble = 1 + spread * np.linspace(-1, 1, repeats)
    return [
        {
            "d": d,
            "seconds": {
                f"{arm} {kind}": list(
                    np.full(repeats, 1e-6 * d)
                    if arm == "BN"
                    else 512e-6 * ratio * (d / 512) ** power * wobble
                )
                for arm in ARMS
                for kind in PASSES
            },
        }
        for d in dims
    ]


def test_verdicts_on_cost():
    records = made_up()
    found = judge_cost(records, times())
    assert found.verdict == REPRODUCED and found.interval[0] < 100 < found.interval[1]
    assert found.measured["time ZCA/BN, d = 512, forward"] == pytest.approx(100)
    assert found.measured["exponent of ZCA time, with gradient"] == pytest.approx(2.5)
    assert found.measured["exponent of time ZCA/BN, with gradient"] == pytest.approx(1.5)
    assert judge_cost(records, times(2.5)).verdict == NOT_REPRODUCED
    assert judge_cost(records, times(3.0, spread=0.5)).verdict == INCONCLUSIVE
    assert judge_cost(records, times(repeats=5)).verdict == INCONCLUSIVE
    assert judge_cost(made_up(rank_excess=1.0), times()).verdict == NOT_REPRODUCED
    missing = judge_cost(records, times(dims=(64, 256)))
    assert missing.verdict == INCONCLUSIVE and "512" in missing.note


def test_one_slow_pass_does_not_hide_a_fast_one():
    records = times()
    for record in records:
        record["seconds"]["ZCA with gradient"] = record["seconds"]["BN with gradient"]
    assert judge_cost(made_up(), records).verdict == NOT_REPRODUCED


def test_exponent_is_that_of_the_median():
    records = times(power=2.25)
    records[0]["seconds"]["ZCA forward"][0] = 1e3
    assert exponent(records, "ZCA", "forward").mean == pytest.approx(2.25, abs=0.01)


# --- a smoke run ---


def test_exact_claims_hold_on_real_features(finished):
    """A border pixel that one image of a batch alone has is an outlier among equals."""
    claims = json.loads((finished / "results.json").read_text())["claims"]
    unit, identity, decorrelation, cost = claims
    assert unit["verdict"] == decorrelation["verdict"] == REPRODUCED
    assert identity["measured"]["largest |y - x|/max|x|"] < 1e-12
    assert cost["measured"]["largest excess of a rank over m - 1"] == 0
    measured = unit["measured"]
    assert measured["largest |x̂|/√(m - 1), real features"] == pytest.approx(1, abs=1e-12)
    assert measured["one outlier, ||x̂| - √(m - 1)|"] < 1e-12
    assert measured["constant features, largest |x̂|"] == 0


def test_presets_hold_what_the_criteria_need():
    assert PRESETS["standard"].seeds >= 5
    for preset in ("quick", "standard"):
        config = PRESETS[preset]
        assert 512 in config.dims and {0.0, 1e-5, 1e-3} <= set(config.epsilons)
        assert config.timed_batch > max(config.dims) and config.repeats >= 6


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--config.batch_sizes=(8, 512)", "at most 449, half of 898 examples"),
        ("--config.examples=20", "half of 20 examples"),
        ("--config.pairs=2", "pairs=2"),
        ("--config.dims=(64,)", "2 entries or more"),
        ("--config.dims=(32, 64)", "timed_batch=64"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, capsys, flag, said):
    assert launch(tmp_path / "run", flag) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1 and said in told.err
    assert not (tmp_path / "run").exists()
