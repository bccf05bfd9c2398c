"""Tests of experiments.transform: its references, its verdicts, and whole runs at smoke size."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smoke

from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from bn_research.lab.workdir import _plain
from bn_research.normalization import batch_norm
from bn_research.normalization.whitening import CovarianceMoments
from experiments.transform import PRESETS, measurements, verdicts
from experiments.transform.measurements import ARMS, PASSES, REAL, SOURCES, features, standardize
from experiments.transform.verdicts import judge_cost, judge_decorrelation, judge_identity

CONFIG = PRESETS["smoke"]


@pytest.fixture(scope="module")
def pixels():
    return measurements.prepare(CONFIG)


@pytest.fixture
def programs():
    """Forgets the compiled programs, so that a replaced transform is used, and then forgotten."""

    def forget():
        for program in ("_normalized", "_covariance", "_whitened"):
            getattr(measurements, program).clear_cache()

    forget()
    yield
    forget()


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def test_the_checks_run_in_float64_and_leave_the_flag_alone():
    assert standardize(normal((8, 2)), 1e-5).dtype == np.float64
    assert jnp.ones(2).dtype == jnp.float32


def test_identities_see_every_feature_but_constant_ones():
    x = normal((16, 5, 4)) + 1e3
    x[..., 2] = 0.1
    x[..., 3] = 0.0
    for epsilon in (0.0, 1e-3):
        found = measurements.identities(x, epsilon)
        assert found["constant_share"] == 0.5 and found["constant_output"] == 0
        assert max(found[key] for key in ("mean", "variance", "excess", "recovery")) < 1e-12
        assert 1 / math.sqrt(79) < found["reach"] < 0.5


def test_undoing_by_hand():
    """σ² = 2/3 + 1/3, μ = 3."""
    scale, bias = measurements.undoing(np.array([[2.0], [3.0], [4.0]]), 1 / 3)
    np.testing.assert_allclose([scale, bias], [[1.0], [3.0]], rtol=1e-15)


def test_error_on_another_batch_is_the_closed_form():
    a, b = normal((20, 6), 1) * 3 + 5, normal((30, 6), 2)
    expected = np.mean((a.mean(0) - b.mean(0)) ** 2 + (a.std(0) - b.std(0)) ** 2)
    assert measurements.transfer_error(a, b, 0.0) == pytest.approx(expected, rel=1e-12)


def test_error_of_gaussian_features_is_theory():
    m, d = 64, 4000
    found = measurements.transfer_error(normal((m, d), 3), normal((m, d), 4), 0.0)
    assert found == pytest.approx(3 / m, rel=0.05)


def test_correlation_is_numpys():
    x = normal((3, 10, 5)) @ normal((5, 5), 1)
    expected = np.corrcoef(x.reshape(-1, 5).T)
    np.testing.assert_allclose(measurements.correlation(x), expected, atol=1e-14)


def test_convolutional_features_are_xlas_convolution(pixels):
    x = features("conv", pixels[:3], 7)
    rng = np.random.default_rng([7, 2])
    kernel = rng.standard_normal((1, 3, 3, 8)) * math.sqrt(2 / 9)
    kernel, layout = kernel.transpose(1, 2, 0, 3), ("NHWC", "HWIO", "NHWC")
    with jax.enable_x64(True):
        convolve = jax.lax.conv_general_dilated
        expected = convolve(pixels[:3], kernel, (2, 2), "VALID", dimension_numbers=layout)
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


def measured(pixels):
    return [stored(measurements.measure_source(CONFIG, pixels, "dense", 0))]


def unbiased(x, scale, bias, epsilon):
    count = math.prod(x.shape[:-1])
    return batch_norm(x, scale * np.sqrt(1 - 1 / count), bias, epsilon=epsilon)


def uncentred(x, scale, bias, epsilon):
    y, moments = batch_norm(x, epsilon=epsilon)
    return (y + 1e-9) * scale + bias, moments


def epsilon_outside_the_root(x, scale, bias, epsilon):
    axes = tuple(range(x.ndim - 1))
    spread = jnp.std(x, axes) + epsilon
    return (x - jnp.mean(x, axes)) / jnp.where(spread > 0, spread, 1) * scale + bias, None


def without_scale_and_bias(x, scale, bias, epsilon):
    return batch_norm(x, epsilon=epsilon)


def float32_inside(x, scale, bias, epsilon):
    y, moments = batch_norm(x, scale, bias, epsilon=epsilon)
    return y.astype(jnp.float32).astype(x.dtype), moments


def mixing_features(x, scale, bias, epsilon):
    y, moments = batch_norm(x, epsilon=epsilon)
    return (y * np.sqrt(1 - 1e-6) + 1e-3 * jnp.roll(y, 1, -1)) * scale + bias, moments


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
@pytest.mark.usefixtures("dense_alone", "programs")
def test_a_wrong_transform_is_not_reproduced(monkeypatch, pixels, wrong, expected):
    """Of unit-normalization, identity-recoverable and no-decorrelation.

    The second is at best inconclusive: one seed gives no interval of the slope.
    """
    monkeypatch.setattr(measurements, "batch_norm", wrong)
    records = measured(pixels)
    whitened = [stored(measurements.measure_whitening(pixels, 0))]
    findings = (
        verdicts.judge_unit(records, stored(measurements.measure_outlier(CONFIG))),
        judge_identity(CONFIG, records),
        judge_decorrelation(records, whitened),
    )
    assert tuple(finding.verdict for finding in findings) == expected


@pytest.mark.usefixtures("dense_alone", "programs")
def test_a_control_that_does_not_whiten_leaves_decorrelation_open(monkeypatch, pixels):
    records = measured(pixels)
    monkeypatch.setattr(measurements, "whiten", batch_norm)
    finding = judge_decorrelation(records, [measurements.measure_whitening(pixels, 0)])
    assert finding.verdict == INCONCLUSIVE
    assert finding.measured["largest |correlation|, ZCA"] > 0.1


@pytest.mark.usefixtures("dense_alone", "programs")
def test_a_covariance_that_is_not_centred_has_too_high_a_rank(monkeypatch, pixels):
    def raw(x):
        return CovarianceMoments(jnp.float32(len(x)), jnp.zeros(x.shape[-1]), x.T @ x)

    assert judge_cost(measured(pixels), times()).verdict == REPRODUCED
    monkeypatch.setattr(measurements, "batch_covariance", raw)
    measurements._covariance.clear_cache()
    finding = judge_cost(measured(pixels), times())
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
    for given, verdict in (({}, R), ({"recovery": 2e-12}, N), ({"recovery": None}, N)):
        assert judge_identity(CONFIG, made_up(**given)).verdict == verdict
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
    assert verdicts.transfer_slopes(CONFIG, records)["pixels"] is None
    finding = judge_identity(CONFIG, records)
    assert finding.verdict == INCONCLUSIVE and finding.interval is None
    assert math.isnan(finding.measured["slope, pixels"])


@pytest.mark.parametrize("key", ["mean", "variance", "excess"])
def test_each_deviation_alone_decides_unit_normalization(key):
    for worst, verdict in ((0.0, R), (0.9e-12, R), (1.1e-12, N), (None, N)):
        finding = verdicts.judge_unit(made_up(**{key: worst}), {"deviation": [0.0]})
        assert finding.verdict == verdict


def times(ratio=100.0, spread=0.01, repeats=11, dims=(256, 512), power=2.5):
    """Made-up timings: BN takes d microseconds, the others `ratio` times as long at d = 512."""
    records, wobble = [], 1 + spread * np.linspace(-1, 1, repeats)
    for d in dims:
        slow = 512e-6 * ratio * (d / 512) ** power * wobble
        of = {arm: list(np.full(repeats, 1e-6 * d) if arm == "BN" else slow) for arm in ARMS}
        seconds = {f"{arm} {kind}": of[arm].copy() for arm in ARMS for kind in PASSES}
        records.append({"d": d, "seconds": seconds})
    return records


def test_verdicts_on_cost():
    records = made_up()
    found = judge_cost(records, times())
    assert found.verdict == REPRODUCED and found.interval[0] < 100 < found.interval[1]
    assert found.measured["time ZCA/BN, d = 512, forward"] == pytest.approx(100)
    assert found.measured["exponent of ZCA time, with gradient"] == pytest.approx(2.5)
    assert found.measured["exponent of time ZCA/BN, with gradient"] == pytest.approx(1.5)
    doubtful = times(3.0, spread=0.5), times(repeats=5)
    for given, verdict in ((times(2.5), N), *((each, INC) for each in doubtful)):
        assert judge_cost(records, given).verdict == verdict
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
    assert verdicts.exponent(records, "ZCA", "forward").mean == pytest.approx(2.25, abs=0.01)


def test_exact_claims_hold_on_real_features(smoke_run):
    """A border pixel that one image of a batch alone has is an outlier among equals."""
    claims = json.loads((smoke_run("transform") / "results.json").read_text())["claims"]
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
        ("batch_sizes=(8, 512)", "at most 449, half of 898 examples"),
        ("examples=20", "half of 20 examples"),
        ("pairs=2", "pairs=2"),
        ("dims=(64,)", "2 or more entries"),
        ("dims=(32, 64)", "timed_batch=64"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, flag, said):
    ended = smoke.launch("transform", tmp_path / "run", f"--config.{flag}")
    assert (ended.status, ended.out, ended.err.count("\n")) == (2, "", 1) and said in ended.err
    assert not (tmp_path / "run").exists()
