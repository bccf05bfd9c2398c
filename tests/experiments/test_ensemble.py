"""Tests of experiments.ensemble: scores, networks, verdicts, and what a smoke run leaves."""

import dataclasses
import functools
import json
import math

import jax
import numpy as np
import pytest
import smoke
from flax.traverse_util import flatten_dict

from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from bn_research.lab.workdir import WorkdirError
from bn_research.layers.linen import MOMENTS
from bn_research.probes import predictions
from experiments.ensemble import PRESETS, training
from experiments.ensemble.figures import draw
from experiments.ensemble.training import BASE, SEEDS, VARIED, Predictor, Records, plan, six
from experiments.ensemble.verdicts import PUBLISHED, judge, left

CONFIG, STANDARD = PRESETS["smoke"], PRESETS["standard"]


@pytest.fixture(scope="module")
def finished(smoke_run):
    return smoke_run("ensemble")


@pytest.fixture(scope="module")
def images():
    return training.prepare(CONFIG)


def records_of(workdir):
    return {record["name"]: record for record in smoke.ledger(workdir)}


def name(training):
    """Its name in the ledger."""
    return f"{training.setting.name} seed={training.seed}"


def test_the_six_are_modified_as_the_papers():
    """Each by some of three changes, no two alike, and two programs for all."""
    settings = six(3.0)
    assert len(set(settings)) == 6 and BASE not in settings
    assert {s.dropout for s in settings} == {0.0, 0.05, 0.10}
    assert {s.gain for s in settings} == {1.0, 3.0}
    assert 0 < sum(s.per_activation for s in settings) < 6


def test_ensembles_share_seeds_across_kinds_and_none_within():
    found = plan(STANDARD)
    assert STANDARD.seeds >= 5 and list(found) == [VARIED, SEEDS]
    seeds = {kind: [[t.seed for t in e] for e in these] for kind, these in found.items()}
    assert seeds[VARIED] == seeds[SEEDS]
    assert sorted(np.ravel(seeds[SEEDS])) == list(range(6 * STANDARD.seeds))
    assert {t.setting for e in found[SEEDS] for t in e} == {BASE}
    assert [t.setting for t in found[VARIED][1]] == list(six(STANDARD.gain))
    runs = [name(t) for these in found.values() for e in these for t in e]
    assert len(set(runs)) == len(runs)


def test_published_numbers():
    for top, reduction in (("top-1", 0.086), ("top-5", 0.158)):
        assert 1 - PUBLISHED[top].left == pytest.approx(reduction, abs=5e-4)


# --- networks; the programs are those of the smoke run ---


def created(images, network, seed=0):
    create = training.training_programs(network, training.task_of(CONFIG, images)).create
    return create(jax.random.key(seed), network.traced)


def shaken(state, seed=1):
    """Off the initial values, or a bias of zero at every BN would let a wrong one pass."""
    rng = np.random.default_rng(seed)
    leaves, tree = jax.tree.flatten((state.params, state.batch_stats))
    leaves = [leaf + 0.2 * np.abs(rng.standard_normal(leaf.shape)) for leaf in leaves]
    return jax.tree.map(np.float32, jax.tree.unflatten(tree, leaves))


def kernels(tree):
    """Kernels by path, of convolutions and of the head."""
    leaves = {path: leaf for path, leaf in flatten_dict(tree).items() if path[-1] == "kernel"}
    head = {path: leaves.pop(path) for path in list(leaves) if "head" in path}
    return leaves, head


def test_gain_scales_initial_kernels_of_convolutions_alone(finished, images):
    plain, scaled = (created(images, BASE.replace(gain=gain)).params for gain in (1.0, 3.0))
    (convolutions, head), (larger, same) = kernels(plain), kernels(scaled)
    assert len(convolutions) == 6 and len(head) == 1
    for name, kernel in convolutions.items():
        np.testing.assert_allclose(larger[name], 3 * kernel, rtol=1e-6)
    np.testing.assert_array_equal(same["head", "kernel"], head["head", "kernel"])


def test_statistics_and_predictions(finished, images, tmp_path):
    """Against the model itself: algorithm 2, MC-BN, and the mean of its probabilities."""
    network, task = six(CONFIG.gain)[-1], training.task_of(CONFIG, images)  # BN per activation
    params, batch_stats = shaken(created(images, network))
    model = training.make_model(task, network)

    @jax.jit
    def train_mode(variables, image):
        return model.apply(variables, image, train=True, mutable=[MOMENTS, "batch_stats"])

    predictor = Predictor(task, images, tmp_path)
    batches = predictor.batches(5)
    rows = np.random.default_rng(5).permutation(96)
    assert np.array_equal(batches[2], images.train.image[rows[64:96]])

    program = training.statistics_program(network, task)
    population, of_batches = program(params, batch_stats, batches)
    variables = {"params": params, "batch_stats": batch_stats}
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
    moments = [flatten_dict(train_mode(variables, batch)[1][MOMENTS]) for batch in batches]
    population, of_batches = jax.device_get((population, of_batches))
    layers = flatten_dict(population)
    assert len(layers) == len(moments[0]) == 2 * 6  # mean and var; moments and momentum
    for path in [path for path in moments[0] if path[-1] == "moments"]:
        seen = [of_batch[path] for of_batch in moments]
        unbiased = [m.m2 / (m.count - 1) for m in seen]
        close(layers[*path[:-1], "mean"], np.mean([m.mean for m in seen], axis=0))
        close(layers[*path[:-1], "var"], np.mean(unbiased, axis=0))
    assert {leaf.ndim for leaf in jax.tree.leaves(population["inception_3c"])} == {3}
    assert {leaf.ndim for leaf in jax.tree.leaves(population["stem_3x3"])} == {1}

    # Training mode is inference by the batch's own statistics.
    @jax.jit
    def inference(batch_stats, image):
        return model.apply({"params": params, "batch_stats": batch_stats}, image, train=False)

    second = jax.tree.map(lambda leaf: leaf[1], of_batches)
    close(inference(second, batches[1]), train_mode(variables, batches[1])[0], atol=2e-3)

    image, label = images.test.image, np.asarray(images.test.label)
    found = predictor.predict(network, params, population)
    close(found, jax.nn.log_softmax(inference(population, image)), atol=1e-3)
    assert found.shape == (50, 10)

    probabilities = [
        np.float64(jax.nn.softmax(inference(jax.tree.map(lambda s, i=i: s[i], of_batches), image)))
        for i in range(3)
    ]
    sampled = predictor.sample(network, params, of_batches)
    assert list(sampled) == ["2", "3"]
    for draws, scores in sampled.items():
        p = np.mean(probabilities[: int(draws)], axis=0)
        nll = -np.mean(np.log(p[np.arange(50), label]))
        assert scores["nll"] == pytest.approx(nll, rel=1e-4)


def test_a_lost_network_predicts_nothing(finished, images, tmp_path):
    predictor = Predictor(training.task_of(CONFIG, images), images, tmp_path)
    state = created(images, BASE)
    lost = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), state.params)
    found = predictor.predict(BASE, lost, state.batch_stats)
    np.testing.assert_allclose(found, math.log(0.1), rtol=1e-6)
    scores = predictions.scores(np.exp(found), np.asarray(images.test.label))
    assert scores["error"] == 1 and scores["nll"] == pytest.approx(math.log(10))


# --- verdicts, on made-up records ---


def scored(error, nll=1.0, ece=0.1, confidence=0.8):
    bins = {"count": [10] * 15, "confidence": [0.5] * 15, "accuracy": [0.5] * 15}
    scores = {"error": error, "error 2": error / 2, "error 5": error / 10, "nll": nll}
    return scores | {"brier": 0.3, "ece": ece, "confidence": confidence, "bins": bins}


def ensemble(single, together, *, gain=0.1, ece=0.05, diverged=0):
    """Six networks of the error `single`, on the average; MC-BN's nll is lower by gain."""
    members = [
        {
            "scores": scored(single + 0.01 * (i - 2.5)),
            "diverged": diverged if i == 3 else 0,
            "strategy": "devices",
            "mc_bn": {"6": scored(single, 1.0), "32": scored(single - 0.01, 1.0 - gain)},
        }
        for i in range(6)
    ]
    sizes = {"error": np.linspace(single, together, 6).tolist(), "nll": [1.0] * 6}
    scores = scored(together, 0.9, ece)
    return {"members": members, "scores": scores, "sizes": sizes, "disagreement": 0.2}


def made_up(left=(0.90, 0.91, 0.92), seeds_left=(0.95, 0.96, 0.96), gains=(0.1,) * 3, **options):
    """Three ensembles of each kind, single networks of error 0.2."""
    return {
        VARIED: [ensemble(0.2, 0.2 * x, **options) for x in left],
        SEEDS: [ensemble(0.2, 0.2 * x, gain=g) for x, g in zip(seeds_left, gains, strict=True)],
    }


def judged(ensembles, index):
    return judge(CONFIG, Records(ensembles, 10))[index]


@pytest.mark.parametrize(
    ("claim", "given", "verdict"),
    [
        (0, dict(left=(0.90, 0.91, 0.92)), REPRODUCED),
        (0, dict(left=(0.96, 0.96, 0.97)), INCONCLUSIVE),  # less than expected, but something
        (0, dict(left=(0.70, 0.95, 1.00)), INCONCLUSIVE),
        (0, dict(left=(1.00, 0.99, 1.01)), INCONCLUSIVE),
        (0, dict(left=(1.05, 1.06, 1.07)), NOT_REPRODUCED),
        (1, dict(seeds_left=(0.95, 0.96, 0.97)), REPRODUCED),
        (1, dict(seeds_left=(0.95, 0.90, 0.91)), INCONCLUSIVE),
        (1, dict(seeds_left=(0.88, 0.89, 0.90)), NOT_REPRODUCED),
        (2, dict(ece=0.05), REPRODUCED),
        (2, dict(ece=0.12), NOT_REPRODUCED),
        (3, dict(gains=(0.10, 0.11, 0.12)), REPRODUCED),
        (3, dict(gains=(0.10, -0.11, 0.12)), INCONCLUSIVE),
        (3, dict(gains=(-0.10, -0.11, -0.12)), NOT_REPRODUCED),
    ],
)
def test_verdicts(claim, given, verdict):
    found = judged(made_up(**given), claim)
    assert found.verdict == verdict
    (mean,) = map(np.mean, given.values())
    # Single networks have an error of 0.2, an ECE of 0.1 and a confidence of 0.8. The first one
    # errs by 0.175, by 32 draws 0.19; six of one setting save 4.33 % of 0.2.
    expected = (
        {"relative error reduction": 1 - mean},
        {"error, one setting − six settings": 0.2 * (mean - 0.91)},
        {
            "ECE, single − ensemble": 0.1 - mean,
            "confidence − accuracy, single": 0.0,
            "confidence − accuracy, ensemble": 0.8 - 0.818,
        },
        {
            "NLL, population − 32 draws": mean,
            "NLL, population − 6 draws": 0,
            "error, saved by 32 draws over saved by six": -0.015 / (0.2 * (0.13 / 3)),
        },
    )[claim]
    assert {name: found.measured[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert found.interval[0] == found.measured[f"{next(iter(expected))}, low"]


def test_one_ensemble_decides_nothing():
    records = {kind: these[:1] for kind, these in made_up().items()}
    assert {judged(records, i).verdict for i in range(4)} == {INCONCLUSIVE}


def test_networks_that_have_not_learned_decide_nothing():
    """An accuracy of 0.8 is less than 3 times chance of 3 classes."""
    found = judge(CONFIG, Records(made_up(), 3))
    assert {finding.verdict for finding in found} == {INCONCLUSIVE}


def test_notes_tell_of_lost_networks_and_of_large_reductions():
    found = judged(made_up(diverged=2, left=(0.70, 0.71, 0.72)), 0)
    assert "Of 36 networks 3 had steps" in found.note and "above the 20%" in found.note
    found = judged(made_up(), 0)
    assert "not finite" not in found.note and "above the" not in found.note


def test_nothing_to_reduce():
    perfect = ensemble(0.2, 0.0)
    for member in perfect["members"]:
        member["scores"] = scored(0.0)
    assert left(perfect) == 1


def test_the_first_of_each_six_of_one_setting_predicts_by_mc_bn(finished):
    records = records_of(finished)
    assert len(records) == 2 * 2 * 6 + 2 * 2
    sampled = {found for found, record in records.items() if "mc_bn" in record}
    assert sampled == {f"{BASE.name} seed={seed}" for seed in (0, 6)}


def test_results_are_those_of_the_predictions(finished, images):
    claims = json.loads((finished / "results.json").read_text())["claims"]
    records, label = records_of(finished), np.asarray(images.test.label)
    reductions = []
    for trainings in plan(CONFIG)[VARIED]:
        files = [records[name(t)]["predictions"] for t in trainings]
        p = [np.exp(np.load(finished / "predictions" / file)) for file in files]
        errors = [np.mean(one.argmax(axis=1) != label) for one in p]
        together = np.mean(np.mean(p, axis=0).argmax(axis=1) != label)
        reductions.append(1 - together / np.mean(errors))
    found = claims[0]["measured"]
    assert found["relative error reduction"] == pytest.approx(np.mean(reductions))
    assert found["NLL, ensemble"] <= found["NLL, single"]  # −log is convex
    assert found["Brier score, ensemble"] <= found["Brier score, single"]


def test_missing_or_damaged_predictions_are_one_line(finished, tmp_path):
    record = next(iter(records_of(finished).values()))
    file = record["predictions"]
    assert training.load_predictions(finished / "predictions", record).shape == (50, 10)
    with pytest.raises(WorkdirError, match="predictions of the network .* cannot be read"):
        training.load_predictions(tmp_path, record)
    (tmp_path / file).write_bytes((finished / "predictions" / file).read_bytes()[:-1])
    with pytest.raises(WorkdirError, match="is damaged"):
        training.load_predictions(tmp_path, record)


def test_figures_of_many_seeds(tmp_path):
    config = dataclasses.replace(CONFIG, seeds=3)
    figures = draw(config, Records(made_up(), 10), tmp_path)
    assert [figure.path.stem for figure in figures] == ["errors", "sizes", "reliability"]


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("image_size=2", "2×2"),
        ("train_examples=5000", "at most 898, as digits has"),
        ("eval_examples=5000", "at most 899, as digits has"),
        ("modules=('3a', '9z')", "9z"),
        ("steps_per_dispatch=3", "a multiple of steps_per_dispatch=3"),
        ("draws=(1, 4)", "at most 3, the batches of 32 in train_examples=96"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, flag, said):
    ended = smoke.launch("ensemble", tmp_path / "run", f"--config.{flag}")
    assert (ended.status, ended.out, ended.err.count("\n")) == (2, "", 1) and said in ended.err
    assert not (tmp_path / "run").exists()
