"""Tests of experiments.regularization as a whole; its parts have tests of their own."""

import dataclasses
import json
import math

import pytest

from bn_research.lab.launch import main
from experiments.regularization import EXPERIMENT, PRESETS, prepare

CONFIG = PRESETS["smoke"]


def launch(workdir, *flags):
    return main(EXPERIMENT, ["regularization", "--preset=smoke", f"--workdir={workdir}", *flags])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    assert launch(workdir) == 0
    return workdir


def test_every_claim_is_decided_and_every_figure_drawn(finished):
    results = json.loads((finished / "results.json").read_text())
    assert [claim["id"] for claim in results["claims"]] == [
        "batch-noise-law",
        "batch-noise-law-of-real-features",
        "pixels-are-not-examples",
        "batch-noise-regularizes",
        "batch-noise-regularizes-by-loss",
        "reshuffling-regularizes",
        "less-need-for-dropout",
        "dropout-before-bn-shifts-variance",
    ]
    assert len(list((finished / "figures").glob("*.png"))) == 8


def test_a_finished_run_trains_nothing_and_ends_with_the_same_results(finished, capfd):
    ledger = (finished / "metrics.jsonl").read_bytes()
    results = (finished / "results.json").read_bytes()
    assert launch(finished) == 0
    assert (finished / "metrics.jsonl").read_bytes() == ledger
    assert (finished / "results.json").read_bytes() == results
    assert "batch-noise-law" in capfd.readouterr().out


def test_the_parts_train_what_they_say(finished):
    """The steps of the progress bar are those of the ledger."""
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "num_steps=" in json.dumps(line)]
    runs = (1 + 1) * CONFIG.groups_tuning_seeds + 9 * CONFIG.groups_seeds
    runs += 4 * CONFIG.dropout_tuning_seeds + 4 * CONFIG.dropout_seeds + 3 * CONFIG.seeds
    assert len(trained) <= runs
    assert len(trained) >= runs - 4  # where tuning has trained what a cell is


def test_standard_is_evidence():
    standard = PRESETS["standard"]
    assert standard.dataset == "fashion_mnist" and standard.seeds >= 5
    assert min(standard.groups_seeds, standard.dropout_seeds) >= 5
    assert standard.groups_sizes == (8, 16, 32, 64, 128, 256, 512)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(seeds=0), "seeds=0 is not allowed: a whole number from 1 up"),
        (dict(validation_examples=0), "validation_examples=0 is not allowed"),
        (dict(train_examples=800), "validation_examples=128 are not allowed: digits has 898"),
        (dict(test_examples=900), "test_examples=900 is not allowed: digits has 899"),
        (dict(groups_examples=129), "groups_examples=129 is not allowed: at most train_examples"),
        (dict(dropout_examples=129), "dropout_examples=129 is not allowed: at most"),
        (dict(groups_network="f4 f9"), "network 'f4 f9' ends in 9 units but digits has 10"),
        (dict(dropout_network="f4 f4 f9"), "ends in 9 units but digits has 10"),
        (dict(law_network="f4 f10"), "law_network='f4 f10' is not allowed"),
        (dict(groups_sizes=(4, 30)), "groups_sizes"),
        (dict(dropout_rates=(1.0,)), "dropout_rates"),
        (dict(law_rate=math.nan), "law_rate=nan is not allowed"),
    ],
)
def test_bad_config(changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(dataclasses.replace(CONFIG, **changes))


def test_a_bad_flag_is_one_line(tmp_path, capfd):
    assert launch(tmp_path / "bad", "--config.groups_size=5") == 2
    error = capfd.readouterr().err.strip()
    assert error.startswith("regularization: groups_size=5 is not allowed") and "\n" not in error
    assert not (tmp_path / "bad" / "metrics.jsonl").exists()
