"""Tests of experiments.init_sensitivity: its theory, its verdicts, and whole runs at smoke size."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from bn_research.lab import runner
from bn_research.lab.launch import main
from bn_research.training.lanes import Lanes
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

ROOT = Path(__file__).parents[2]
CLAIM_IDS = [
    "tiny-init-vanishing-signal",
    "no-training-without-bn",
    "bn-last-layer-suffices",
    "init-robustness",
    "last-layer-only",
]


def launch(workdir, *flags):
    return main(EXPERIMENT, ["init_sensitivity", "--preset=smoke", f"--workdir={workdir}", *flags])


def files_of(workdir):
    """Content of every file of a run but the checkpoints and the time it took."""
    kept = {}
    for path in sorted(workdir.rglob("*")):
        name = str(path.relative_to(workdir))
        if path.is_file() and not name.startswith(("checkpoints", "report", "environment")):
            kept[name] = path.read_bytes()
    kept["results.json"] = json.loads(kept["results.json"])["claims"]
    return kept


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a smoke run left alone."""
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert launch(workdir) == 0
    return workdir


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
            assert {arm[1:3] for arm in found} == {(layer, optimizer)}
            assert {arm.epsilon for arm in found} == {epsilon}


def test_both_networks_are_tuned_over_the_same_rates():
    roles = plan(Config())
    rates = {role: [arm.learning_rate for arm in group] for role, group in roles.items()}
    assert rates["plain"] == rates["last ε=0 sgd"] == rates["last ε=1e-05 sgd"]
    for a in Config().widths:
        assert rates[f"none a={a:g}"] == rates[f"all a={a:g}"]


# --- whole runs ---


def test_smoke_writes_everything(finished):
    results = json.loads((finished / "results.json").read_text())
    assert [claim["id"] for claim in results["claims"]] == CLAIM_IDS
    assert (results["schema"], results["preset"], results["seeds"]) == (1, "smoke", [0, 1])
    figures = sorted(path.name for path in (finished / "figures").iterdir())
    assert len(figures) == 8
    page = (finished / "report.html").read_text()
    assert page.count("data:image/webp;base64,") == 8 and "<script" not in page
    assert {"config.json", "environment.json", "metrics.jsonl", "checkpoints"} <= {
        path.name for path in finished.iterdir()
    }
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    assert all(math.isfinite(loss) for row in trained for loss in row["loss"])


def test_started_again_it_only_prints(finished, capsys):
    before = files_of(finished)
    assert launch(finished) == 0
    assert files_of(finished) == before
    assert "report: " in capsys.readouterr().out


def test_interrupted_in_the_middle_of_a_sweep_it_goes_on_from_the_checkpoint(
    finished, tmp_path, monkeypatch
):
    """Stopped in the second dispatch of a sweep, three times, with a checkpoint after each."""
    monkeypatch.setattr(runner, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    restored = []
    restore, save, dispatch = runner.Checkpointer.restore, runner.Checkpointer.save, Lanes.advance

    def counted(self, *args):
        restored.append(args)
        return restore(self, *args)

    def stopping(self, data):
        # The members of a sweep have run for one dispatch, and that is on disk.
        if newest and newest[-1].get("members") and newest[-1]["members"][0]["steps"] == 2:
            newest.clear()
            if len(stops) > len(restored):
                raise _Stop
        return dispatch(self, data)

    def noted(self, number, state, note, **options):
        newest.append(note)
        return save(self, number, state, note, **options)

    monkeypatch.setattr(runner.Checkpointer, "restore", counted)
    monkeypatch.setattr(runner.Checkpointer, "save", noted)
    monkeypatch.setattr(Lanes, "advance", stopping)
    newest, stops = [], []
    for times in range(3):
        stops.append(times)
        newest.clear()
        with pytest.raises(_Stop):
            launch(tmp_path / "run")
        assert len(restored) == times
    stops.clear()
    assert launch(tmp_path / "run") == 0
    assert len(restored) == 3
    assert files_of(tmp_path / "run") == files_of(finished)


class _Stop(Exception):
    pass


def test_killed_at_any_moment_it_ends_with_the_same_bits(finished, tmp_path):
    """SIGKILL, twice, and SIGTERM, at whatever moment the ledger reaches some length."""
    workdir = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "experiments.init_sensitivity",
        "--preset=smoke",
        f"--workdir={workdir}",
    ]
    # One device more or less must not matter either: the tests have eight, a user has one.
    for lines in (2, 9, 25, None):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        if lines is None:
            assert process.wait(timeout=300) == 0, process.stderr.read().decode()
            break
        metrics = workdir / "metrics.jsonl"
        deadline = time.monotonic() + 300
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= lines):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGTERM if lines == 9 else signal.SIGKILL)
        said = process.communicate()[1].decode()
        if lines == 9:
            assert process.returncode == 4 and "stopped by SIGTERM at step" in said
    assert files_of(workdir) == files_of(finished)


def test_a_truncated_checkpoint_is_named_and_nothing_is_written(finished, capfd, tmp_path):
    import shutil

    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    for path in (workdir / "checkpoints").rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert launch(workdir) == 2
    captured = capfd.readouterr()
    message = [line for line in captured.err.splitlines() if line.startswith("init_sensitivity:")]
    assert len(message) == 1 and "damaged or cut" in message[0] and "remove that" in message[0]
    assert "Traceback" not in captured.err
    assert before == {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config.dataset=imagenette"], "fashion_mnist"),
        (["--config.network=c4 Q f10"], "'Q' is not a layer"),
        (["--config.network=c4 P P P P f10"], "remove a P"),
        (["--config.network=c4 P f7"], "end it in f10"),
        (["--config.batch_size=5000"], "batch_size=5000"),
        (["--config.steps_per_dispatch=3"], "positive multiple"),
        (["--config.seeds=0"], "seeds=0"),
        (["--config.epsilons=(1e-5,)"], "must hold 0.0"),
        (["--config.epsilons=(0.0, -1.0)"], "≥ 0"),
        (["--config.epsilons=(0.0, 1e-5, 1e-5)"], "holds an entry twice"),
        (["--config.layers=(1, 3)"], "the weight layers before the last, 1 to 2"),
        (["--config.schemes=('he', 'xavier')"], "allowed are he, lecun, glorot"),
        (["--config.schemes=('lecun',)"], "must hold 'he'"),
        (["--config.strategy=fast"], "allowed are auto, in_turn, devices, vmap"),
        (["--config.width_rates=()"], "width_rates=() is not allowed"),
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


def test_another_config_is_refused(finished, capsys):
    before = files_of(finished)
    assert launch(finished, "--config.a=0.002") == 2
    assert "a (there 0.001, now 0.002)" in capsys.readouterr().err
    assert files_of(finished) == before
