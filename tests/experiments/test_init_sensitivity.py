"""Tests of experiments.init_sensitivity: its verdicts, its arms and its config."""

import dataclasses
import math

import numpy as np
import pytest

from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from bn_research.lab.launch import main
from experiments.init_sensitivity import EXPERIMENT, NETWORKS, PRESETS, Config, verdicts
from experiments.init_sensitivity.training import INPUT_SCALES, plan

GUESSING = math.log(10)

CONFIG = Config(
    seeds=3,
    rates=(0.1, 1.0),
    epsilons=(0.0,),
    escape_epsilons=(1e-20, 1e-18, 1e-17),
    escape_steps=2000,
    widths=(1e-3, 1e-1),
    signal_networks=NETWORKS[:1],
)


def records(losses, accuracies, **fields):
    return [
        {"loss": list(loss), "accuracy": accuracy, "diverged": 0, "learning_rate": 0.1, **fields}
        for loss, accuracy in zip(losses, accuracies, strict=True)
    ]


def flat(loss=GUESSING, accuracies=(0.1, 0.1, 0.1), **fields):
    return records([[loss] * 20] * 3, accuracies, **fields)


def plain(stuck, he=(0.9, 0.91, 0.92)):
    best = {"plain": stuck, "plain, he": flat(0.1, he), "plain, Adam": flat()}
    return verdicts.judge_plain(CONFIG, [flat(), stuck], best)


def test_plain_verdicts():
    assert plain(flat()).verdict == REPRODUCED
    assert plain(flat(1.5)).verdict == NOT_REPRODUCED
    assert plain(flat(), he=(0.1, 0.1, 0.1)).verdict == INCONCLUSIVE
    lost = plain(flat(diverged=1))
    assert lost.verdict == INCONCLUSIVE and "3 plain runs diverged" in lost.note


def escaping(exponent, accuracies=(0.9, 0.91, 0.92), lost=False):
    best = {"last ε=0 sgd": flat(0.3, accuracies), "last ε=0 adam": flat()}
    for epsilon in CONFIG.escape_epsilons:
        steps = round(20 * (epsilon / 1e-20) ** exponent)
        if lost and epsilon == 1e-17:
            steps = 2001
        losses = [([2.3] * (steps - 1 + seed) + [2.0])[:2000] for seed in range(3)]
        best[f"escape last ε={epsilon:g} sgd"] = records(losses, (0.5,) * 3)
    return best


def test_escape_exponent_is_recovered_and_censored_runs_are_not_imputed():
    for exponent in (0.5, 0.3):
        *_, found = verdicts.escape(CONFIG, escaping(exponent))
        assert found.mean == pytest.approx(exponent, abs=0.02)
    _, steps, found = verdicts.escape(CONFIG, escaping(0.5, lost=True))
    assert np.isnan(steps[2]).all() and found is None


def test_last_layer_verdicts():
    assert verdicts.judge_last(CONFIG, escaping(0.5)).verdict == REPRODUCED
    assert verdicts.judge_last(CONFIG, escaping(0.3)).verdict == INCONCLUSIVE
    assert verdicts.judge_last(CONFIG, escaping(0.5, (0.1, 0.11, 0.1))).verdict == NOT_REPRODUCED
    assert verdicts.judge_last(CONFIG, escaping(0.5, (0.2, 0.9, 0.6))).verdict == INCONCLUSIVE
    censored = verdicts.judge_last(CONFIG, escaping(0.5, lost=True))
    assert censored.verdict == INCONCLUSIVE and "3 runs had not left" in censored.note


def robustness(normalized, plain_accuracies):
    tables = {"all": normalized, "none": plain_accuracies}
    best = {
        f"{placement} a={a:g}": flat(0.3, accuracies)
        for placement, table in tables.items()
        for a, accuracies in zip(CONFIG.widths, table, strict=True)
    }
    return verdicts.judge_robustness(CONFIG, best).verdict


def test_robustness_verdicts():
    steady = [(0.9, 0.91, 0.9), (0.91, 0.92, 0.91)]
    fragile = [(0.1, 0.1, 0.11), (0.9, 0.9, 0.91)]
    assert robustness(steady, fragile) == REPRODUCED
    assert robustness(steady, steady) == NOT_REPRODUCED
    middling = [(0.8, 0.81, 0.8), (0.9, 0.9, 0.9)]
    assert robustness(middling, fragile) == INCONCLUSIVE


def signal_records(gap, last):
    shared = {"network": NETWORKS[0], "a": 1e-3, "predicted": [-2.0, last]}
    measured = [[-2.0 - gap, last + 0.01 * seed] for seed in range(3)]
    return [
        {**shared, "input_scale": scale, "seed": seed, "measured": measured[seed]}
        for scale in INPUT_SCALES
        for seed in range(3)
    ]


def test_signal_verdicts():
    table = (0.1, -11, REPRODUCED), (0.9, -11, NOT_REPRODUCED), (0.1, -14, NOT_REPRODUCED)
    for gap, last, verdict in table:
        assert verdicts.judge_signal(CONFIG, signal_records(gap, last)).verdict == verdict


def test_other_widths_of_the_weights_do_not_enter_the_signal_verdict():
    far = [{**record, "a": 1.0} for record in signal_records(3.0, -11)]
    found = verdicts.judge_signal(CONFIG, signal_records(0.1, -11) + far)
    assert found.verdict == REPRODUCED
    assert found.measured["largest |log10 σ - theory|, other a"] == pytest.approx(3.0)


def layers(last, others):
    best = {"last ε=0 sgd": flat(0.3, last)}
    best |= {f"{k} ε=0 sgd": flat(0.3, row) for k, row in zip((1, 2), others, strict=True)}
    return verdicts.judge_layers(dataclasses.replace(CONFIG, layers=(1, 2)), best).verdict


def test_single_layer_verdicts():
    good, bad = (0.8, 0.82, 0.81), (0.1, 0.11, 0.1)
    assert layers(good, [bad, bad]) == REPRODUCED
    assert layers(good, [bad, good]) == NOT_REPRODUCED
    assert layers(bad, [bad, bad]) == NOT_REPRODUCED
    assert layers(good, [bad, (0.1, 0.9, 0.5)]) == INCONCLUSIVE
    assert verdicts.judge_layers(CONFIG, {"last ε=0 sgd": flat(0.3, good)}).verdict == INCONCLUSIVE


def test_each_optimizer_has_its_own_ladder_of_epsilon():
    standard = plan(PRESETS["standard"])
    for optimizer, bias, rate in (("sgd", "", 0.1), ("sgd", " bias", 0.1), ("adam", "", 1e-3)):
        roles = [role for role in standard if role.startswith("escape")]
        found = [standard[r][0] for r in roles if r.endswith(f" {optimizer}{bias}")]
        ladder = {"sgd": "escape_epsilons", "adam": "adam_escape_epsilons"}[optimizer]
        assert tuple(arm.epsilon for arm in found) == getattr(PRESETS["standard"], ladder)
        assert {arm.learning_rate for arm in found} == {rate}
    for layer in range(1, 7):
        for optimizer, epsilon in (("sgd", 0.0), ("adam", 1e-5)):
            found = standard[f"{layer} ε={epsilon:g} {optimizer}"]
            assert {(a.placement, a.optimizer) for a in found} == {(layer, optimizer)}
            assert {arm.epsilon for arm in found} == {epsilon}


def test_both_networks_are_tuned_over_the_same_rates():
    roles = plan(Config())
    rates = {role: [arm.learning_rate for arm in group] for role, group in roles.items()}
    assert rates["plain"] == rates["last ε=0 sgd"] == rates["last ε=1e-05 sgd"]
    for a in Config().widths:
        assert rates[f"none a={a:g}"] == rates[f"all a={a:g}"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config.dataset=imagenette"], "fashion_mnist"),
        (["--config.network=c4 P P P P f10"], "remove a P"),
        (["--config.network=c4 P f7"], "end it in f10"),
        (["--config.batch_size=5000"], "batch_size=5000"),
        (["--config.steps_per_dispatch=3"], "num_steps=4 is not allowed: it must be a multiple of"),
        (["--config.epsilons=(1e-5,)"], "must hold 0.0: a claim is about it"),
        (["--config.schemes=('lecun',)"], "must hold 'he'"),
        (["--config.layers=(1, 3)"], "the weight layers before the last, 1 to 2"),
        (["--config.dataset=fashion_mnist", "--config.manual_dir=/nonexistent"], "/nonexistent"),
        (["--config.dataset=fashion_mnist", "--config.manual_dir={cut}"], "idx"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, flags, said):
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8b cut")
    workdir, flags = tmp_path / "run", [flag.format(cut=tmp_path) for flag in flags]
    flags = ["init_sensitivity", "--preset=smoke", f"--workdir={workdir}", *flags]
    assert main(EXPERIMENT, flags) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and said in captured.err
    assert not workdir.exists()
