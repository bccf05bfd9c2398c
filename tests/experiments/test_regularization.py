"""Tests of experiments.regularization: what is trained and measured, and how it is judged."""

import dataclasses
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
import pytest
from scipy import stats

from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from bn_research.lab.fields import in_words
from bn_research.lab.runner import Runner
from bn_research.lab.workdir import Ledger
from bn_research.training.step import Batch
from experiments.regularization import PRESETS, Config, measurements, verdicts
from experiments.regularization.figures import tuned_curve
from experiments.regularization.measurements import most_accurate, prepare, variance_shift
from experiments.regularization.training import Data, Network, Trainer
from experiments.regularization.verdicts import CELLS, judge_groups, ladder_arm, of_cell

FROZEN, PLAIN_FROZEN, GAP = verdicts.FROZEN, verdicts.PLAIN_FROZEN, verdicts.GAP
PLAIN, POPULATION, LOSS_GAP = verdicts.PLAIN, verdicts.POPULATION, verdicts.LOSS_GAP

CONFIG = Config(
    dataset="made up",
    seeds=2,
    train_examples=540,
    compiler_level=0,
    groups_network="f6 f3",
    groups_examples=80,
    groups_sizes=(4, 32),
    groups_size=4,
    groups_rates=(0.02, 0.05),
    groups_slower=4.0,
    groups_steps=4,
    groups_steps_per_dispatch=2,
    dropout_network="f6 f5 f3",
    dropout_rates=(0.25, 0.5),
    dropout_learning_rates=(0.05,),
    dropout_shift_rate=0.4,
    dropout_batch_size=128,
    dropout_steps=8,
    dropout_steps_per_dispatch=4,
    dropout_seeds=3,
)
LADDER = dataclasses.replace(CONFIG, groups_examples=512, groups_sizes=(8, 16, 512), groups_size=16)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)

    def examples(count):
        label = rng.integers(3, size=count)
        image = rng.standard_normal((count, 3, 3, 1)) + label[:, None, None, None]
        return Batch(jnp.asarray(image, jnp.float32), jnp.asarray(label, jnp.int32))

    return Data(examples(540), examples(64), examples(64))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("regularization")
    return path, measurements.measure(CONFIG, data, path)


def test_every_training_is_there_and_counted(finished):
    path, records = finished
    assert {kind: len(found) for kind, found in records.items()} == dict(
        groups_tuning=4, groups=9 * 3, groups_slower=4, dropout_tuning=6, dropout=12, shift=6
    )
    names = [json.loads(line)["name"] for line in (path / "metrics.jsonl").open()]
    assert len(names) == len(set(names)) == 4 + 9 * 3 + 4 + 6 + 12 + 6
    steps = sum(int(name.split("num_steps=")[1].split()[0]) for name in names)
    assert steps == measurements.total_steps(CONFIG)
    less = dataclasses.replace(CONFIG, groups_slower=0.0)
    assert steps - measurements.total_steps(less) == 2 * 2 * 4
    for part in ("groups", "dropout"):
        assert {r["seed"] for r in records[f"{part}_tuning"]} == {3}  # and no verdict's
        assert {r["seed"] for r in records[part]} == {0, 1, 2}
    assert [r["dropout_placement"] for r in records["shift"][::2]] == ["before", "after", "last"]
    assert all(r["norm"] == "batch" and r["dropout"] == 0.4 for r in records["shift"])


def test_every_arm_is_trained_in_its_setting(finished):
    records = finished[1]
    settings = {
        record["arm"]: (record["norm"], record["group_size"], record["regrouped"])
        for record in records["groups"]
    }
    assert settings == {
        "BN, groups of 4": ("batch", 4, True),
        "BN, groups of 32": ("batch", 32, True),
        FROZEN: ("batch", 4, False),
        POPULATION: ("population", 0, True),
        "measured": ("measured", 4, True),
        "borrowed": ("borrowed", 4, True),
        "additive": ("additive", 4, True),
        PLAIN: ("none", 4, True),
        PLAIN_FROZEN: ("none", 4, False),
    }
    for record in records["groups"]:
        assert record["batch_size"] == 32 and record["population"] == "running"
    assert [r["seed"] for r in records["groups"]] == [0, 1, 2] * len(settings)
    losses = {r["arm"]: r["train_loss"] for r in records["groups"] if r["seed"] == 0}
    assert len(set(losses.values())) == len(settings)


def test_rates_are_those_of_the_best_validation_accuracy(finished):
    records = finished[1]
    for norm, arms in (("batch", [ladder_arm(4), "measured"]), ("none", [PLAIN, PLAIN_FROZEN])):
        tried = [r for r in records["groups_tuning"] if r["norm"] == norm]
        best = max(tried, key=lambda r: (r["validation_accuracy"], -r["rate"]))["rate"]
        assert {r["rate"] for r in records["groups"] if r["arm"] in arms} == {best}
    assert [r["seed"] for r in records["groups_slower"]] == [0, 1] * 2
    slower = {(r["arm"], r["rate"]) for r in records["groups_slower"]}
    rate = records["groups"][0]["rate"]
    assert slower == {(ladder_arm(4), rate / 4), (ladder_arm(32), rate / 4)}


def test_findings_are_of_the_records(finished):
    records = finished[1]
    findings = verdicts.judge(CONFIG, records)
    assert all(finding.measured and finding.interval is not None for finding in findings)
    arm = [r for r in records["groups"] if r["arm"] == ladder_arm(4)]
    expected = 100 * np.mean([r["train_accuracy"] - r["test_accuracy"] for r in arm])
    assert findings[0].measured["gap, BN, groups of 4"] == pytest.approx(expected)
    off, on, bn_off, bn_on = (
        np.mean([r["test_accuracy"] for r in of_cell(records["dropout"], c)]) for c in CELLS
    )
    name = "dropout's gain without BN less that with BN"
    assert findings[3].measured[name] == pytest.approx(on - off - bn_on + bn_off)


def test_chosen_by_validation_accuracy(finished):
    records = finished[1]
    for cell, (norm, _) in CELLS.items():
        tuning = of_cell(records["dropout_tuning"], cell)
        network = most_accurate(tuning)
        chosen = max(tuning, key=lambda r: r["validation_accuracy"])
        assert (network.norm, network.dropout) == (norm, chosen["dropout"])
        trained = {(r["dropout"], r["rate"]) for r in of_cell(records["dropout"], cell)}
        assert trained == {(network.dropout, network.rate)}


def by_hand(params, stats, images):
    """Pre-activations of the hidden layers in inference, in float64."""
    x, found = np.asarray(images, np.float64).reshape(len(images), -1), []
    for number in (1, 2):
        layer = params[f"dense{number}"]
        x = x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"])
        found.append(x)
        bn, of_bn = params[f"batch_norm{number}"], stats[f"batch_norm{number}"]
        x = (x - of_bn["mean"]) / np.sqrt(np.asarray(of_bn["var"], np.float64) + 1e-5)
        x = np.maximum(x * bn["scale"] + bn["bias"], 0)
    return found


@pytest.mark.parametrize("placement", ["before", "after", "last"])
def test_variance_shift_by_hand(data, tmp_path, placement):
    """Ratios in numpy, and for dropout before BN the law of its first layer."""
    train = jax.tree.map(lambda leaf: leaf[:512], data.train)
    setting = dict(batch_size=128, dropout_placement=placement, rate=0.05, dropout=0.4)
    network, states = Network(CONFIG.dropout_network, **setting), []

    def measure(network, state):
        states.append(state)
        return variance_shift(trainer, network, state)

    with Runner(tmp_path, Ledger(tmp_path / "metrics.jsonl"), total_steps=8) as runner:
        trainer = Trainer(runner, data._replace(train=train), num_steps=8, steps_per_dispatch=4)
        (found,) = trainer.train([("made up", network)], [7], measure=measure)
    (state,) = states
    inputs = by_hand(state.params, state.batch_stats, train.image)
    variances = [state.batch_stats[f"batch_norm{n}"]["var"] for n in (1, 2)]
    pairs = zip(inputs, variances, strict=True)
    expected = [np.median(z.var(axis=0, ddof=1) / var) for z, var in pairs]
    np.testing.assert_allclose(found["ratio"], expected, rtol=1e-4)
    off = trainer.with_population_stats(network.replace(dropout=0.0), state)
    for layer in ("batch_norm1", "batch_norm2"):
        in_training = off.batch_stats[layer]["var"]  # without dropout, by batches
        in_inference = by_hand(state.params, off.batch_stats, train.image)[int(layer[-1]) - 1]
        np.testing.assert_allclose(in_inference.var(axis=0), in_training, rtol=0.1)
    assert found["off_accuracy"] == trainer.evaluate(network, off)["test_accuracy"]
    below = [expected[layer] for layer in verdicts.shifted(placement, 2)]
    beside = [expected[layer] for layer in range(2) if layer not in verdicts.shifted(placement, 2)]
    assert all(ratio < 0.85 for ratio in below) and np.allclose(beside, 1, atol=0.05)
    if placement != "before":
        assert found["closed_form"] == found["population_over_closed_form"] == []
        return
    z = inputs[0]  # which dropout changes only after it was measured
    law = (z.var(axis=0) + 0.4 * z.mean(axis=0) ** 2) / 0.6
    assert found["closed_form"][0] == pytest.approx(np.median(z.var(axis=0) / law), rel=5e-3)
    np.testing.assert_allclose(found["population_over_closed_form"], 1, atol=0.1)


def test_dropped_variance_is_that_of_dropped_numbers():
    rng = np.random.default_rng(0)
    z = rng.normal(1.5, 2.0, 10**6)
    dropped = np.where(rng.random(z.shape) < 0.3, 0, z / 0.7)
    assert measurements.dropped_variance(1.5, 4.0, 0.3) == pytest.approx(dropped.var(), rel=0.01)


def test_no_shift_is_measured_without_bn_or_dropout():
    for network in (Network("f3", "none", dropout=0.5), Network("f3", "batch")):
        assert variance_shift(None, network, None) == {}


# --- verdicts on groups, by made-up records ---


def records(test, *, seeds=3):
    """Records of LADDER's arms: test accuracies, to which seeds add a common part and a scatter."""
    scatter = itertools.cycle([0.02, -0.01, 0.0, -0.02, 0.01])
    common = dict(rate=0.02, train_accuracy=1.0, train_loss=0.1, dose=0.01, diverged=0)
    main = []
    for arm, seed in itertools.product(test, range(seeds)):
        points = test[arm] + 0.3 * seed + next(scatter)
        scores = dict(test_accuracy=points / 100, test_loss=0.1 + (100.0 - points) / 100)
        main.append(dict(arm=arm, seed=seed, **common, **scores))
    return {"groups": main, "groups_slower": []}


REGULARIZES = {
    ladder_arm(8): 85.0,
    ladder_arm(16): 84.5,
    ladder_arm(512): 83.0,
    FROZEN: 83.2,
    POPULATION: 82.9,
    "measured": 84.2,
    "borrowed": 84.4,
    "additive": 83.0,
    PLAIN: 82.0,
    PLAIN_FROZEN: 82.0,
}


@pytest.mark.parametrize(
    ("changes", "verdict", "by_loss"),
    [
        ({}, REPRODUCED, REPRODUCED),
        # Flat: the ladder surely rises by less than half a point. Of the loss only a slope that is
        # surely not above 0 counts as flat.
        (
            dict.fromkeys([ladder_arm(8), ladder_arm(16), "measured"], 83.1),
            NOT_REPRODUCED,
            REPRODUCED,
        ),
        ({ladder_arm(8): 81.0, ladder_arm(16): 82.0}, NOT_REPRODUCED, NOT_REPRODUCED),
        # Not enough of it recovered, or none of it a gain of g*.
        ({"measured": 83.4}, INCONCLUSIVE, INCONCLUSIVE),
        ({ladder_arm(16): 83.0, ladder_arm(8): 86.0}, INCONCLUSIVE, INCONCLUSIVE),
    ],
)
def test_noise_regularizes(changes, verdict, by_loss):
    """By accuracies; by losses, also where the accuracies of all are alike and say nothing."""
    made = records(REGULARIZES | changes)
    finding, _, _ = judge_groups(LADDER, made)
    assert finding.verdict == verdict
    assert finding.interval[0] <= finding.measured["gap by doubling of groups, points"]
    for entry in made["groups"]:
        entry |= {"train_accuracy": 1.0, "test_accuracy": 0.9}
    finding, of_loss, _ = judge_groups(LADDER, made)
    assert (finding.verdict, of_loss.verdict) == (NOT_REPRODUCED, by_loss)
    assert of_loss.interval[0] <= of_loss.measured["loss gap by doubling of groups, nats"]


def test_a_gap_that_closes_because_training_gets_worse_is_no_regularization():
    made = records(dict.fromkeys(REGULARIZES, 83.0))
    for entry in made["groups"]:
        if entry["arm"] in (ladder_arm(8), ladder_arm(16), "measured"):
            entry["train_accuracy"] -= 0.05 if entry["arm"] == ladder_arm(8) else 0.03
    finding = judge_groups(LADDER, made)[0]
    assert finding.measured["gap by doubling of groups, points, low"] > 0
    assert finding.verdict == INCONCLUSIVE


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, REPRODUCED),
        ({FROZEN: 84.9}, NOT_REPRODUCED),
        ({FROZEN: 84.5}, INCONCLUSIVE),
        ({PLAIN_FROZEN: 80.0}, INCONCLUSIVE),  # the same without BN: not its doing
    ],
)
def test_reshuffling(changes, verdict):
    finding = judge_groups(LADDER, records(REGULARIZES | changes))[2]
    assert finding.verdict == verdict
    assert ("inside" in finding.note) == (finding.interval[0] <= 1 <= finding.interval[1])


def test_parts_recovered_and_slopes_are_those_of_the_means():
    made = records(REGULARIZES)
    finding = judge_groups(LADDER, made)[0]
    for noise, part in (("measured", 1.3 / 1.6), ("borrowed", 1.5 / 1.6), ("additive", 0.1 / 1.6)):
        found = finding.measured[f"part of the gap recovered, {noise}"]
        assert found == pytest.approx(part, abs=0.05)
        recovered, change = verdicts.recovery(made["groups"], 16, noise, GAP)
        assert found == pytest.approx(recovered.mean() / change.mean())
    for seed, found in enumerate(verdicts.slopes(made["groups"], (8, 16, 512), LOSS_GAP)):
        values = [LOSS_GAP.of_arm(made["groups"], ladder_arm(g))[seed] for g in (8, 16, 512)]
        assert found == pytest.approx(stats.linregress([3, 4, 9], values).slope)
    assert set(verdicts.INJECTED) == {"measured", "borrowed", "additive"}


def test_lost_runs_are_counted_and_numbers_that_are_not_finite_decide_nothing():
    made = records(REGULARIZES)
    made["groups"][0]["diverged"] = 3
    findings = judge_groups(LADDER, made)
    assert all("Of 30 runs 1 had steps that were not finite" in f.note for f in findings)
    made["groups"][0]["test_loss"] = None
    assert [f.verdict for f in judge_groups(LADDER, made)] == [INCONCLUSIVE] * 3


def test_one_seed_decides_nothing():
    config = dataclasses.replace(LADDER, groups_seeds=1)
    findings = judge_groups(config, records(REGULARIZES, seeds=1))
    assert [f.verdict for f in findings] == [INCONCLUSIVE] * 3


def test_a_rate_at_an_end_of_the_grid_is_said():
    note = judge_groups(LADDER, records(REGULARIZES))[0].note
    assert "0.02 with BN, an end of the grid; 0.02 without, an end of the grid" in note
    wide = dataclasses.replace(LADDER, groups_rates=(0.01, 0.02, 0.04))
    assert "an end" not in judge_groups(wide, records(REGULARIZES))[0].note


# --- choices and verdicts on dropout, of made-up records ---


def trial(norm, dropout_rate, rate, accuracy, seed=3, diverged=0):
    network = Network("f6 f5 f3", norm, dropout_placement="last", rate=rate, dropout=dropout_rate)
    scores = dict(validation_accuracy=accuracy, test_accuracy=accuracy, train_accuracy=accuracy)
    scores |= dict(train_loss=1 - accuracy)
    return {**network.as_record(), **scores, "seed": seed, "diverged": diverged}


def test_best_is_of_the_mean_over_seeds_and_never_a_diverged_one():
    trials = [
        *(trial("batch", 0.5, 0.1, accuracy, seed) for seed, accuracy in enumerate((0.9, 0.6))),
        *(trial("batch", 0.2, 0.3, accuracy, seed) for seed, accuracy in enumerate((0.8, 0.8))),
        *(trial("batch", 0.2, 0.9, 1.0, seed, diverged=1) for seed in range(2)),
        *(trial("batch", 0.0, 0.1, 1.0, seed) for seed in range(2)),
        *(trial("none", 0.5, 0.1, 1.0, seed) for seed in range(2)),
    ]
    chosen = most_accurate(of_cell(trials, "BN, dropout"))
    assert (chosen.norm, chosen.dropout, chosen.rate) == ("batch", 0.2, 0.3)


def test_the_curve_takes_each_dropout_rate_at_its_best_learning_rate():
    trials = [
        trial("none", 0.5, 0.1, 0.7) | dict(train_loss=None),  # not finite
        trial("none", 0.5, 0.3, 0.8),
        trial("none", 0.0, 0.1, 0.6),
        trial("batch", 0.0, 0.1, 0.9),
    ]
    curve = tuned_curve(trials, "none")
    assert [(point["dropout"], point["test_accuracy"]) for point in curve] == [(0, 0.6), (0.5, 0.8)]


def cells(plain_gain, bn_gain, spread=0.001, diverged=0):
    """Three seeds of the four cells, with gains that differ by spread from seed to seed."""
    records = []
    for (norm, dropout), seed in itertools.product(CELLS.values(), range(3)):
        gain = plain_gain + spread * (seed - 1) if norm == "none" else bn_gain
        accuracy = 0.8 + gain * dropout + 0.01 * seed
        record = trial(norm, 0.5 * dropout, 0.05, accuracy, seed, diverged)
        records.append(record | dict(train_loss=0.1, test_loss=0.5, off_accuracy=accuracy))
    return records


@pytest.mark.parametrize(
    ("plain_gain", "bn_gain", "spread", "verdict"),
    [
        (0.02, 0.005, 0.001, REPRODUCED),
        (0.02, -0.02, 0.001, REPRODUCED),
        (0.01, 0.02, 0.001, NOT_REPRODUCED),
        (0.01, 0.01, 0.0, NOT_REPRODUCED),  # the very same gain in every seed
        (0.02, 0.015, 0.01, INCONCLUSIVE),
    ],
)
def test_need(plain_gain, bn_gain, spread, verdict):
    records = [
        {**r, "test_accuracy": round(r["test_accuracy"] * 4096) / 4096}  # differences are exact
        for r in cells(plain_gain, bn_gain, spread)
    ]
    finding = verdicts.judge_need(CONFIG, records)
    assert finding.verdict == verdict
    plain, bn, interaction = verdicts.gains(records)
    assert plain.mean == pytest.approx(plain_gain, abs=5e-4)
    assert bn.mean == pytest.approx(bn_gain, abs=5e-4)
    assert finding.interval == interaction.interval
    assert interaction.mean == pytest.approx(plain_gain - bn_gain, abs=5e-4)


def test_note_of_need():
    note = verdicts.judge_need(CONFIG, cells(0.02, 0.0, diverged=2)).note
    assert "dropout rate 0.5 (no BN, dropout)" in note and "learning rate 0.05" in note
    assert "Of 12 runs 12 had steps that were not finite" in note and "not surely" not in note
    grids = dict(dropout_rates=(0.1, 0.5, 0.9), dropout_learning_rates=(0.01, 0.05, 0.1))
    note = verdicts.judge_need(dataclasses.replace(CONFIG, **grids), cells(-0.02, -0.03)).note
    assert "end of its grid" not in note and "is not surely above 0" in note


def shifts(before, after, last, scatter=0.0):
    """Three seeds of each placement, two BN layers; scatter moves the seeds of all apart."""
    return [
        dict(
            dropout_placement=placement,
            dropout=0.5,
            rate=0.05,
            seed=seed,
            diverged=0,
            ratio=[None if r is None else r + scatter * (seed - 1) for r in ratio],
            population_over_closed_form=[1.0, 1.01] if placement == "before" else [],
            off_accuracy=0.9 + 0.01 * seed,
            test_accuracy=0.8 + 0.01 * seed,
        )
        for placement, ratio in (("before", before), ("after", after), ("last", last))
        for seed in range(3)
    ]


@pytest.mark.parametrize(
    ("before", "after", "last", "scatter", "verdict"),
    [
        ((0.4, 0.2), (1.0, 0.6), (1.0, 0.98), 0.001, REPRODUCED),
        ((0.4, 0.2), (1.0, 1.3), (1.0, 1.01), 0.001, REPRODUCED),
        ((0.4, 0.97), (1.0, 0.6), (1.0, 0.99), 0.001, NOT_REPRODUCED),
        ((0.4, 0.2), (1.0, 0.99), (1.0, 0.99), 0.001, NOT_REPRODUCED),
        ((0.4, 0.2), (1.0, 0.6), (1.0, 0.9), 0.001, NOT_REPRODUCED),
        ((0.4, 0.92), (1.0, 0.6), (1.0, 0.99), 0.02, INCONCLUSIVE),
        ((0.4, 0.2), (1.0, 0.6), (1.0, 0.97), 0.03, INCONCLUSIVE),
        ((0.4, None), (1.0, 0.6), (1.0, 0.99), 0.0, INCONCLUSIVE),
    ],
)
def test_shift(before, after, last, scatter, verdict):
    records = {"shift": shifts(before, after, last, scatter), "dropout": cells(0.02, 0.0)}
    finding = verdicts.judge_shift(CONFIG, records)
    assert finding.verdict == verdict
    if None in before:
        assert finding.interval is None
        return
    lost = finding.measured["accuracy lost to the shift, dropout before every BN"]
    assert lost == pytest.approx(0.1)
    ratio = finding.measured["r of BN 2, dropout after every activation"]
    assert ratio == pytest.approx(after[1])


def test_layers_with_dropout_below():
    for place, layers in {"before": [0, 1, 2], "after": [1, 2], "last": []}.items():
        assert verdicts.shifted(place, 3) == layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(groups_sizes=(4,)), "groups_sizes=.*2 or more entries"),
        (dict(groups_sizes=(32, 4)), "groups_sizes"),
        (dict(groups_sizes=(4, 30)), "groups_sizes=.* must divide the last"),
        (dict(groups_size=32), "groups_size=32 is not allowed: one of groups_sizes"),
        (dict(groups_examples=31), "groups_sizes=.*at most 31, groups_examples"),
        (dict(groups_examples=541), "groups_examples=541 .*at most 540, train_examples"),
        (dict(groups_steps=5), "groups_steps=5 is not allowed.*groups_steps_per_dispatch=2"),
        (dict(groups_slower=0.5), "groups_slower=0.5 is not allowed: above 1"),
        (dict(dropout_examples=100), "dropout_batch_size=128 is not allowed: at most 100"),
        (dict(dropout_steps=6), "dropout_steps=6 .* multiple of dropout_steps_per_dispatch=4"),
        (dict(dropout_network="f4 f3"), "'f4 f3' is not allowed: it needs two hidden layers"),
    ],
)
def test_bad_config(changes, message):
    with pytest.raises(pydantic.ValidationError) as error:
        dataclasses.replace(CONFIG, **changes)
    assert re.search(message, in_words(error.value))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(train_examples=800), "validation_examples=128 .*at most 98, the others of digits"),
        (dict(test_examples=900), "test_examples=900 is not allowed: at most 899, those of digits"),
        (dict(groups_network="f4 f9"), "network 'f4 f9' ends in 9 units but digits has 10"),
        (dict(dropout_network="f4 f4 f9"), "ends in 9 units but digits has 10"),
    ],
)
def test_what_the_data_do_not_allow(changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(dataclasses.replace(PRESETS["smoke"], **changes))


def test_standard_is_evidence():
    standard = PRESETS["standard"]
    assert standard.dataset == "fashion_mnist" and standard.seeds >= 5
    assert min(standard.groups_seeds, standard.dropout_seeds) >= 5
    assert standard.groups_sizes == (8, 16, 32, 64, 128, 256, 512)
