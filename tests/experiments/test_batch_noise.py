"""Tests of experiments.batch_noise."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import smoke

from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from bn_research.probes.batch_noise import exact_moments
from bn_research.probes.batch_noise_sampling import describe_population
from experiments.batch_noise import PRESETS, measurements
from experiments.batch_noise.verdicts import judge, law_deviation, shown_size

CONFIG = dataclasses.replace(PRESETS["smoke"], law_points=(2.0, 0.0), law_batch_size=32)


def test_the_layers_of_every_seed_are_measured(smoke_run):
    workdir = smoke_run("batch_noise")
    features = [record for record in smoke.ledger(workdir) if "layers" in record]
    assert [record["seed"] for record in features] == [0, 1]
    layers = [record["layers"] for record in features]
    assert [(one["layer"], one["positions"], one["features"]) for one in layers[0]] == [
        ("conv1", 64, 4),
        ("conv2", 16, 4),
        ("dense3", 1, 8),
    ]
    assert layers[0] != layers[1]
    claims = json.loads((workdir / "results.json").read_text())["claims"]
    assert all(None not in claim["measured"].values() for claim in claims)


def test_gaussian_samples_have_the_exact_variance():
    config = dataclasses.replace(CONFIG, law_sizes=(3, 8, 50), law_samples=20_000)
    found = measurements.gaussian_variances(config, 7)["variances"]
    for m in config.law_sizes:
        exact = exact_moments(config.law_points, m).var
        np.testing.assert_allclose(found[str(m)], exact, rtol=0.1)
    assert found != measurements.gaussian_variances(config, 8)["variances"]


def test_pre_activations_are_normalized_by_the_whole_set():
    """The dense layer from the convolution before it, by NumPy."""
    image = measurements.prepare(CONFIG).train.image[: CONFIG.law_images]
    network = CONFIG.law_network
    setting = measurements.Trained(network, CONFIG.law_batch_size, 0.1)
    create = measurements.programs(setting, (1, *image.shape[1:]), 1).create
    params = jax.device_get(create(jax.random.key(0), setting.traced).params)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # scale and bias are no longer 1 and 0
    sown = measurements._forward(network)(params, image)
    _, conv, dense = (np.asarray(features, np.float64) for features in sown)
    norm = params["batch_norm2"]
    normalized = (conv - conv.mean(axis=(0, 1, 2))) / np.sqrt(conv.var(axis=(0, 1, 2)) + 1e-5)
    hidden = np.maximum(normalized * norm["scale"] + norm["bias"], 0)
    expected = hidden.reshape(len(image), -1) @ params["dense3"]["kernel"]
    np.testing.assert_allclose(dense, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("equal", "worth"), [(False, 4.0), (True, 1.0)])
def test_a_layer_of_known_positions(equal, worth):
    """Gaussian images whose positions are independent, or all the same."""
    config = dataclasses.replace(CONFIG, law_sizes=(128,), law_batches=800, law_examples=200)
    draw_normal = np.random.default_rng(3).standard_normal
    features = draw_normal((800, 1 if equal else 2, 1 if equal else 2, 6))
    population = describe_population(np.broadcast_to(features, (800, 2, 2, 6)))
    layer = measurements.measure_layer(config, population, np.random.default_rng(0))
    size = layer["sizes"]["128"]
    for statistic in ("mean", "var"):
        effective = size["effective"][statistic]
        assert effective["predicted"] == pytest.approx(worth, rel=0.06)
        assert effective["measured"] == pytest.approx(worth, rel=0.12)
        assert effective["least"] <= effective["predicted"] <= effective["most"]
        assert effective["error"] < 0.1
    assert size["ratio"] == pytest.approx(1, abs=0.05) and size["deviation"] < 0.08
    assert size["per value"] == pytest.approx(4 / worth, rel=0.1)
    assert layer["kurtosis"] == pytest.approx(3, abs=0.2)
    assert layer["within reach"] == pytest.approx(0.954, abs=0.02)
    curve = layer["curve"]
    shown = np.abs(curve["x"]) <= 2  # m·Var of each bin, over that of a worth of 1
    expected = (1 + curve["x"] ** 2 / 2) / worth
    np.testing.assert_allclose(np.array(curve["law"])[shown], expected[shown], rtol=0.12)
    np.testing.assert_allclose(np.array(curve["measured"])[shown], expected[shown], rtol=0.2)


def effective(measured=5.0, error=0.02):
    return {"measured": measured, "predicted": 5.0, "error": error, "least": 1.0, "most": 9.0}


def layer(kind, seed):
    """In which every claim holds, but for the small size."""
    found = {"constant": 0, "skewness": 0.1, "kurtosis": 3.0, "within reach": 0.95, "sizes": {}}
    for m, deviation in (("8", 0.9), ("128", 0.03 + 1e-3 * seed)):
        found["sizes"][m] = {"ratio": 1.0, "deviation": deviation, "gaussian": 0.2}
        both = {"mean": effective(), "var": effective()}
        found["sizes"][m] |= {"per value": 4.0, "effective": both}
    return {"layer": f"{kind}1", "kind": kind, "positions": 16 if kind == "conv" else 1, **found}


def made_up(seeds=5):
    """Records of runs in which every claim holds."""
    gaussian, features = [], []
    for seed in range(seeds):
        variances = {
            str(m): (exact_moments(CONFIG.law_points, m).var * (1.01 + 1e-3 * seed)).tolist()
            for m in CONFIG.law_sizes
        }
        gaussian.append({"seed": seed, "variances": variances})
        layers = [layer("conv", seed), layer("dense", seed)]
        features.append({"seed": seed, "loss": 0.3, "diverged": 0, "layers": layers})
    return {"gaussian": gaussian, "features": features}


def verdicts(records, config=CONFIG):
    return [finding.verdict for finding in judge(config, records)]


def changed(change, seeds=range(5)):
    """Made-up records with the layers of some seeds changed at the large size."""
    records = made_up()
    for seed in seeds:
        for made in records["features"][seed]["layers"]:
            change(made["kind"], made["sizes"]["128"])
    return records


def test_all_hold_where_all_is_as_expected():
    assert verdicts(made_up()) == [REPRODUCED] * 3
    law, features, pixels = judge(CONFIG, made_up())
    assert law.interval[0] == pytest.approx(0.0564, abs=1e-4)
    assert features.measured["largest median of |measured/law − 1|"] == pytest.approx(0.032)
    assert pixels.measured["largest effective size/(m·h·w)"] == pytest.approx(5 / 16)
    assert pixels.measured["smallest effective size/m"] == pytest.approx(5)


def test_samples_that_are_not_as_the_exact_variance_says():
    records = made_up()
    for record in records["gaussian"]:
        record["variances"]["8"] = [1.2 * v for v in record["variances"]["8"]]
    assert verdicts(records) == [NOT_REPRODUCED, REPRODUCED, REPRODUCED]
    records = made_up()
    records["gaussian"][0]["variances"]["8"][0] *= 1.2
    assert verdicts(records)[0] == INCONCLUSIVE


def test_the_law_itself_is_not_as_exact_everywhere():
    for m, reach, expected in ((128, 2, -0.0564), (128, 3, -0.157), (8, 0, 0.536)):
        assert law_deviation(m, reach) == pytest.approx(expected, abs=1e-4 if reach == 2 else 1e-3)


@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_a_law_that_fails_in_one_layer_is_not_reproduced(kind):
    def change(found, values):
        values["deviation"] = 0.2 if found == kind else 0.03

    assert verdicts(changed(change)) == [REPRODUCED, NOT_REPRODUCED, REPRODUCED]
    assert verdicts(changed(change, seeds=[2]))[1] == INCONCLUSIVE


@pytest.mark.parametrize("statistic", ["mean", "var"])
@pytest.mark.parametrize("made", [effective(9.0), effective(0.8), effective(error=0.2)])
def test_pixels_that_are_examples_nothing_or_unpredicted(statistic, made):
    def change(kind, values):
        if kind == "conv":
            values["effective"][statistic] = made

    assert verdicts(changed(change)) == [REPRODUCED, REPRODUCED, NOT_REPRODUCED]
    assert verdicts(changed(change, seeds=[1, 2, 3]))[2] == INCONCLUSIVE


def test_dense_layers_have_no_part_in_the_claim_about_pixels():
    def change(kind, values):
        if kind == "dense":
            values["effective"]["mean"] = effective(0.1)

    assert verdicts(changed(change))[2] == REPRODUCED


def test_sizes_below_the_criterion_decide_nothing():
    config = dataclasses.replace(CONFIG, law_sizes=(8,))
    assert verdicts(made_up(), config)[1:] == [INCONCLUSIVE] * 2
    assert (shown_size(config), shown_size(CONFIG)) == (8, 128)


def test_one_seed_decides_nothing_and_what_went_wrong_is_said():
    assert verdicts(made_up(seeds=1)) == [INCONCLUSIVE] * 3
    records = made_up()
    records["features"][3]["diverged"] = 4
    records["features"][0]["layers"][1]["constant"] = 2
    for finding in judge(CONFIG, records)[1:]:
        assert "Of 5 runs 1 had steps" in finding.note
        assert "2 constant features" in finding.note


@pytest.mark.parametrize(
    ("field", "value"),
    [("law_steps", 7), ("law_network", "f8 f10"), ("law_network", "c4 f10")],
)
def test_bad_fields(field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(CONFIG, **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("law_sizes", (8, 201)),
        ("law_examples", 401),
        ("law_batch_size", 10**6),
        ("law_network", "c4 f8 f9"),
        ("law_network", "c4 P P P P f8 f10"),
    ],
)
def test_fields_that_the_images_do_not_allow(field, value):
    with pytest.raises(ValueError) as error:
        measurements.prepare(dataclasses.replace(CONFIG, **{field: value}))
    assert "\n" not in str(error.value)
