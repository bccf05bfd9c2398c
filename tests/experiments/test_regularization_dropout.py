"""The part of experiments.regularization about dropout: its measurements, verdicts, and figures."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from bn_research.lab.runner import Runner
from bn_research.lab.workdir import Ledger
from bn_research.training.step import Batch
from bn_research.training.sweep import Sweep
from experiments.regularization import dropout
from experiments.regularization.arms import Setting
from experiments.regularization.data import Data
from experiments.regularization.dropout_figures import tuned_curve
from experiments.regularization.dropout_verdicts import (
    CELLS,
    Cell,
    gains,
    judge_need,
    judge_shift,
    shifted,
)
from experiments.regularization.training import Run, Trainer


@dataclasses.dataclass(frozen=True)
class Config:
    """What the part reads of the experiment's."""

    dataset: str = "made up"
    seeds: int = 2
    dropout_network: str = "f6 f5 f3"
    dropout_placement: str = "last"
    dropout_rates: tuple[float, ...] = (0.25, 0.5)
    dropout_learning_rates: tuple[float, ...] = (0.05,)
    dropout_shift_rate: float = 0.4
    dropout_examples: int = 512
    dropout_batch_size: int = 128
    dropout_steps: int = 8
    dropout_steps_per_dispatch: int = 4
    compiler_level: int = 0
    dropout_tuning_seeds: int = 1
    dropout_seeds: int = 3


CONFIG = Config()


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)

    def examples(count):
        label = rng.integers(3, size=count)
        image = rng.standard_normal((count, 3, 3, 1)) + label[:, None, None, None]
        return Batch(jnp.asarray(image, jnp.float32), jnp.asarray(label, jnp.int32))

    return Data(examples(540), examples(64), examples(64))


def run(path, data, config=CONFIG):
    ledger = Ledger(path / "metrics.jsonl")
    with Runner(
        path, ledger, total_steps=dropout.total_steps(config), strategy="devices"
    ) as runner:
        steps = []
        runner._bar.update = steps.append
        return dropout.measure(config, data, runner), sum(steps)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("dropout")
    dropout.check(CONFIG)
    return path, *run(path, data)


def test_every_training_is_there_and_counted(finished):
    _, records, steps = finished
    assert steps == dropout.total_steps(CONFIG) == (2 * 3 + 4 * 3 + 3 * 2) * 8
    assert {kind: len(found) for kind, found in records.items()} == dict(
        tuning=6, cells=12, shift=6
    )
    assert {r["seed"] for r in records["tuning"]} == {3}  # and no verdict's
    assert {r["seed"] for r in records["cells"]} == {0, 1, 2}
    assert [r["dropout_placement"] for r in records["shift"][::2]] == ["before", "after", "last"]
    assert all(r["norm"] == "batch" and r["dropout"] == 0.4 for r in records["shift"])


def test_resumed_it_trains_nothing_and_ends_with_the_same_numbers(finished, data, monkeypatch):
    path, records, _ = finished
    monkeypatch.setattr(Sweep, "run", None)
    assert run(path, data)[0] == records


def test_findings_and_figures(finished, tmp_path):
    _, records, _ = finished
    findings = dropout.judge(CONFIG, records)
    assert [finding.claim for finding in findings] == list(dropout.CLAIMS)
    cells = {
        cell: [r["test_accuracy"] for r in records["cells"] if cell.holds(r)] for cell in CELLS
    }
    plain = np.array(cells[CELLS[1]]) - cells[CELLS[0]]
    bn = np.array(cells[CELLS[3]]) - cells[CELLS[2]]
    name = "dropout's gain without BN less that with BN"
    assert findings[0].measured[name] == pytest.approx(np.mean(plain - bn))
    figures = dropout.draw(CONFIG, records, tmp_path)
    assert [figure.path.name for figure in figures] == ["dropout.png", "variance_shift.png"]
    assert all(figure.path.stat().st_size > 10_000 for figure in figures)


def test_chosen_by_validation_accuracy(finished):
    _, records, _ = finished
    for cell in CELLS:
        setting = dropout.best(records["tuning"], cell)
        of_cell = [r for r in records["tuning"] if cell.holds(r)]
        chosen = max(of_cell, key=lambda r: r["validation_accuracy"])
        assert (setting.norm, setting.dropout) == (cell.norm, chosen["dropout"])
        assert {(r["dropout"], r["rate"]) for r in records["cells"] if cell.holds(r)} == {
            (setting.dropout, setting.rate)
        }


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
    setting = Setting(
        CONFIG.dropout_network,
        "batch",
        batch_size=128,
        dropout_placement=placement,
        rate=0.05,
        dropout=0.4,
    )
    states = []

    def measure(setting, state):
        states.append(state)
        return dropout.variance_shift(trainer, setting, state)

    with Runner(tmp_path, Ledger(tmp_path / "metrics.jsonl"), total_steps=8) as runner:
        trainer = Trainer(runner, data._replace(train=train), num_steps=8, steps_per_dispatch=4)
        (found,) = trainer.train([Run("made up", setting, 7)], measure=measure)
    (state,) = states
    inputs = by_hand(state.params, state.batch_stats, train.image)
    variances = [state.batch_stats[f"batch_norm{n}"]["var"] for n in (1, 2)]
    expected = [
        np.median(z.var(axis=0, ddof=1) / var) for z, var in zip(inputs, variances, strict=True)
    ]
    np.testing.assert_allclose(found["ratio"], expected, rtol=1e-4)
    off = trainer.with_population_stats(setting, state, dropout=0.0)
    for layer in ("batch_norm1", "batch_norm2"):
        in_training = off.batch_stats[layer]["var"]  # without dropout, by batches
        in_inference = by_hand(state.params, off.batch_stats, train.image)[int(layer[-1]) - 1]
        np.testing.assert_allclose(in_inference.var(axis=0), in_training, rtol=0.1)
    assert found["off_accuracy"] == trainer.evaluate(setting, off)["test_accuracy"]
    below = [expected[layer] for layer in shifted(placement, 2)]
    beside = [expected[layer] for layer in range(2) if layer not in shifted(placement, 2)]
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
    assert dropout.dropped_variance(1.5, 4.0, 0.3) == pytest.approx(dropped.var(), rel=0.01)


def test_no_shift_is_measured_without_bn_or_dropout():
    for setting in (Setting("f3", "none", dropout=0.5), Setting("f3", "batch")):
        assert dropout.variance_shift(None, setting, None) == {}


# --- choices and verdicts, of made-up records ---


def trial(norm, dropout_rate, rate, accuracy, seed=3, diverged=0):
    setting = Setting("f6 f5 f3", norm, dropout_placement="last", rate=rate, dropout=dropout_rate)
    scores = dict(validation_accuracy=accuracy, test_accuracy=accuracy, train_accuracy=accuracy)
    scores |= dict(train_loss=1 - accuracy)
    return {**setting._asdict(), **scores, "seed": seed, "diverged": diverged}


def test_best_is_of_the_mean_over_seeds_and_never_a_diverged_one():
    trials = [
        *(trial("batch", 0.5, 0.1, accuracy, seed) for seed, accuracy in enumerate((0.9, 0.6))),
        *(trial("batch", 0.2, 0.3, accuracy, seed) for seed, accuracy in enumerate((0.8, 0.8))),
        *(trial("batch", 0.2, 0.9, 1.0, seed, diverged=1) for seed in range(2)),
        *(trial("batch", 0.0, 0.1, 1.0, seed) for seed in range(2)),
        *(trial("none", 0.5, 0.1, 1.0, seed) for seed in range(2)),
    ]
    chosen = dropout.best(trials, Cell("batch", dropout=True))
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
    for cell in CELLS:
        for seed in range(3):
            gain = (plain_gain if cell.norm == "none" else bn_gain) if cell.dropout else 0
            if cell == CELLS[1]:
                gain += spread * (seed - 1)
            record = trial(cell.norm, 0.5 * cell.dropout, 0.05, 0.8 + gain + 0.01 * seed, seed)
            record |= dict(train_loss=0.1, test_loss=0.5, diverged=diverged)
            if cell == CELLS[3]:
                record |= dict(off_accuracy=record["test_accuracy"])
            records.append(record)
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
    finding = judge_need(CONFIG, records)
    assert finding.verdict == verdict
    plain, bn, interaction = gains(records)
    assert plain.mean == pytest.approx(plain_gain, abs=5e-4)
    assert bn.mean == pytest.approx(bn_gain, abs=5e-4)
    assert finding.interval == interaction.interval
    assert interaction.mean == pytest.approx(plain_gain - bn_gain, abs=5e-4)


def test_note_of_need():
    note = judge_need(CONFIG, cells(0.02, 0.0, diverged=2)).note
    assert "dropout rate 0.5 (no BN, dropout)" in note and "learning rate 0.05" in note
    assert "Of 12 runs 12 had steps that were not finite" in note and "not surely" not in note
    wide = dataclasses.replace(
        CONFIG, dropout_rates=(0.1, 0.5, 0.9), dropout_learning_rates=(0.01, 0.05, 0.1)
    )
    note = judge_need(wide, cells(-0.02, -0.03)).note
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
    records = {"shift": shifts(before, after, last, scatter), "cells": cells(0.02, 0.0)}
    finding = judge_shift(CONFIG, records)
    assert finding.verdict == verdict
    if None in before:
        assert finding.interval is None
        return
    lost = finding.measured["accuracy lost to the shift, dropout before every BN"]
    assert lost == pytest.approx(0.1)
    ratio = finding.measured["r of BN 2, dropout after every activation"]
    assert ratio == pytest.approx(after[1])


def test_layers_with_dropout_below():
    assert [shifted(place, 3) for place in ("before", "after", "last")] == [[0, 1, 2], [1, 2], []]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dropout_examples", 1, "dropout_examples=1 is not allowed: a whole number from 2 up"),
        ("dropout_examples", 100, "dropout_batch_size=128 is not allowed: at most the 100"),
        ("dropout_steps", 6, "dropout_steps=6 .* multiple of dropout_steps_per_dispatch=4"),
        ("dropout_seeds", True, "dropout_seeds=True"),
        ("dropout_rates", (), r"dropout_rates=\(\) is not allowed"),
        ("dropout_rates", (0.0, 0.5), "between 0 and 1"),
        ("dropout_rates", (0.5, 0.5), "all different"),
        ("dropout_learning_rates", (math.inf,), "dropout_learning_rates=.*between 0 and inf"),
        ("dropout_shift_rate", 1.0, "dropout_shift_rate=1.0"),
        ("dropout_placement", "none", "'none' is unknown: allowed are before, after, last"),
        ("dropout_network", "f4 f3", "'f4 f3' is not allowed: it needs two hidden layers"),
        ("dropout_network", "f4 f5 c3", "f4 f5 c3"),
    ],
)
def test_bad_config(field, value, message):
    with pytest.raises(ValueError, match=message):
        dropout.check(dataclasses.replace(CONFIG, **{field: value}))
