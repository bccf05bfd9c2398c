"""Tests of experiments.init_sensitivity: its theory, its verdicts, its arms and its config."""

import dataclasses
import math

import numpy as np
import pytest

from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from bn_research.lab.launch import main
from experiments.init_sensitivity import EXPERIMENT, NETWORKS, PRESETS, Config
from experiments.init_sensitivity.signal import (
    INPUT_SCALES,
    measured_log10_std,
    predicted_log10_std,
)
from experiments.init_sensitivity.training import plan
from experiments.init_sensitivity.verdicts import (
    escape,
    judge_last,
    judge_layers,
    judge_plain,
    judge_robustness,
    judge_signal,
)


def launch(workdir, *flags):
    return main(EXPERIMENT, ["init_sensitivity", "--preset=smoke", f"--workdir={workdir}", *flags])


# --- theory ---


@pytest.mark.parametrize(
    ("network", "standardized"),
    list(zip(NETWORKS, (-11.2, -11.8, -12.1, -13.0, -14.2), strict=True)),
)
def test_theory_gives_the_published_table(network, standardized):
    """The claims' table, measured on CIFAR-10's shape with unit variance and a = 0.001."""
    last = predicted_log10_std(network, 1e-3, 1.0, (32, 32, 3))[-1]
    assert last == pytest.approx(standardized, abs=0.3)


def test_theory_by_hand():
    """σ₁ = a√(9·E/3), σ₂ = σ₁·a√(2.5·9·4/6) after pooling, σ₃ = σ₂·a√(4·4·8/6)."""
    found = 10 ** np.array(predicted_log10_std("c4 P c8 f10", 0.1, 2.0, (8, 8, 1)))
    first = 0.1 * math.sqrt(9 * 2.0 / 3)
    second = first * 0.1 * math.sqrt(2.5 * 36 / 6)
    third = second * 0.1 * math.sqrt(4 * 4 * 8 / 6)
    np.testing.assert_allclose(found, [first, second, third], rtol=1e-12)


def test_signal_is_measured_down_to_1e_18():
    """A tenth of the width of the weights at seven layers: seven decades less, no underflow."""
    images = np.random.default_rng(0).standard_normal((8, 32, 32, 3)).astype(np.float32)
    usual, tiny = (np.array(measured_log10_std(NETWORKS[4], a, images, 0)) for a in (1e-3, 1e-4))
    assert usual[-1] - tiny[-1] == pytest.approx(7, abs=1e-3)
    tiniest = np.array(measured_log10_std(NETWORKS[4], 10**-3.6, images * 1e-1, 0))
    assert tiniest[-1] < -18 and np.isfinite(tiniest).all()


# --- verdicts, on made-up records ---

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


GUESSING = math.log(10)


def flat(loss=GUESSING, accuracies=(0.1, 0.1, 0.1), **fields):
    return records([[loss] * 20] * 3, accuracies, **fields)


def plain(stuck, he=(0.9, 0.91, 0.92)):
    best = {"plain": stuck, "plain, he": flat(0.1, he), "plain, Adam": flat()}
    return judge_plain(CONFIG, [flat(), stuck], best)


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
        losses = [[2.3] * (steps - 1 + seed) + [2.0] for seed in range(3)]
        best[f"escape last ε={epsilon:g} sgd"] = records(
            [loss[:2000] for loss in losses], (0.5,) * 3
        )
    return best


def test_escape_exponent_is_recovered_and_censored_runs_are_not_imputed():
    for exponent in (0.5, 0.3):
        found = escape(CONFIG, escaping(exponent)).exponent
        assert found.mean == pytest.approx(exponent, abs=0.02)
    lost = escape(CONFIG, escaping(0.5, lost=True))
    assert np.isnan(lost.steps[2]).all() and lost.exponent is None


def test_last_layer_verdicts():
    assert judge_last(CONFIG, escaping(0.5)).verdict == REPRODUCED
    assert judge_last(CONFIG, escaping(0.3)).verdict == INCONCLUSIVE
    assert judge_last(CONFIG, escaping(0.5, (0.1, 0.11, 0.1))).verdict == NOT_REPRODUCED
    assert judge_last(CONFIG, escaping(0.5, (0.2, 0.9, 0.6))).verdict == INCONCLUSIVE
    censored = judge_last(CONFIG, escaping(0.5, lost=True))
    assert censored.verdict == INCONCLUSIVE and "3 runs had not left" in censored.note


def robustness(normalized, plain_accuracies):
    best = {}
    for placement, table in (("all", normalized), ("none", plain_accuracies)):
        for a, accuracies in zip(CONFIG.widths, table, strict=True):
            best[f"{placement} a={a:g}"] = flat(0.3, accuracies)
    return judge_robustness(CONFIG, best).verdict


def test_robustness_verdicts():
    steady = [(0.9, 0.91, 0.9), (0.91, 0.92, 0.91)]
    fragile = [(0.1, 0.1, 0.11), (0.9, 0.9, 0.91)]
    assert robustness(steady, fragile) == REPRODUCED
    assert robustness(steady, steady) == NOT_REPRODUCED
    middling = [(0.8, 0.81, 0.8), (0.9, 0.9, 0.9)]
    assert robustness(middling, fragile) == INCONCLUSIVE


def signal_records(gap, last):
    return [
        {
            "network": NETWORKS[0],
            "input_scale": scale,
            "a": 1e-3,
            "seed": seed,
            "predicted": [-2.0, last],
            "measured": [-2.0 - gap, last + 0.01 * seed],
        }
        for scale in INPUT_SCALES
        for seed in range(3)
    ]


def test_signal_verdicts():
    assert judge_signal(CONFIG, signal_records(0.1, -11)).verdict == REPRODUCED
    assert judge_signal(CONFIG, signal_records(0.9, -11)).verdict == NOT_REPRODUCED
    assert judge_signal(CONFIG, signal_records(0.1, -14)).verdict == NOT_REPRODUCED


def test_other_widths_of_the_weights_do_not_enter_the_signal_verdict():
    far = [{**record, "a": 1.0} for record in signal_records(3.0, -11)]
    found = judge_signal(CONFIG, signal_records(0.1, -11) + far)
    assert found.verdict == REPRODUCED
    assert found.measured["largest |log10 σ - theory|, other a"] == pytest.approx(3.0)


def layers(last, others):
    best = {"last ε=0 sgd": flat(0.3, last)}
    best |= {f"{k} ε=0 sgd": flat(0.3, row) for k, row in zip((1, 2), others, strict=True)}
    return judge_layers(dataclasses.replace(CONFIG, layers=(1, 2)), best).verdict


def test_single_layer_verdicts():
    good, bad = (0.8, 0.82, 0.81), (0.1, 0.11, 0.1)
    assert layers(good, [bad, bad]) == REPRODUCED
    assert layers(good, [bad, good]) == NOT_REPRODUCED
    assert layers(bad, [bad, bad]) == NOT_REPRODUCED
    assert layers(good, [bad, (0.1, 0.9, 0.5)]) == INCONCLUSIVE
    assert judge_layers(CONFIG, {"last ε=0 sgd": flat(0.3, good)}).verdict == INCONCLUSIVE


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


# --- what a config may be ---


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
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, flags, said):
    assert launch(tmp_path / "run", *flags) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and said in captured.err
    assert not (tmp_path / "run").exists()


def test_a_cut_idx_file_is_named(tmp_path, capsys):
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8b cut")
    flags = ["--config.dataset=fashion_mnist", f"--config.manual_dir={tmp_path}"]
    assert launch(tmp_path / "run", *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "idx" in error
    assert not (tmp_path / "run").exists()
