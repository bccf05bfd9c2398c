"""Tests of experiments.audit: what it says of each parameter, and its verdict."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest

from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from bn_research.probes.scale_invariance import Audit, Row
from experiments.audit import MODELS, PRESETS, Config
from experiments.audit.measurements import create_model, prepare
from experiments.audit.verdicts import ARMS, WHY, explained, judge, restored, why


def test_it_counts_every_parameter(smoke_run):
    (claim,) = json.loads((smoke_run("audit") / "results.json").read_text())["claims"]
    assert claim["verdict"] == REPRODUCED
    measured = claim["measured"]
    assert measured["kernels with BN after them"] == measured["of them, invariant alone"] == 4
    assert measured["parameters without BN after them"] == 2 * 4
    assert measured["parameters without any BN"] == 2 * 6


def test_it_says_why(smoke_run):
    """The answer of every parameter of dense, BN, ReLU, dense, BN, ReLU, head."""
    path = smoke_run("audit")
    record = json.loads((path / "metrics.jsonl").read_text().splitlines()[0])
    found = restored(PRESETS["smoke"], record)
    reasons = {path: why(found, record["normalized"], path) for path in found}
    assert reasons == {
        "['dense1']['kernel']": "invariant",
        "['dense1']['bias']": "no effect",
        "['batch_norm1']['scale']": "group",
        "['batch_norm1']['bias']": "group",
        "['dense2']['kernel']": "invariant",
        "['dense2']['bias']": "no effect",
        "['batch_norm2']['scale']": "last",
        "['batch_norm2']['bias']": "last",
        "['dense3']['kernel']": "kernel",
        "['dense3']['bias']": "bias",
    }
    text = (path / "audit.txt").read_text()
    assert "1 not invariant: no BN comes after it, and it scales the logits:" in text
    assert "6 not invariant: there is no BN:" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "resnet"}, "network='f8 f8 f10' is the spec of cnn and mlp"),
        ({"network": "c4 f10"}, "more than dense layers"),
        ({"network": "f8 f9"}, "9 logits"),
        ({"batch_size": 5000}, "batch_size=5000"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(dataclasses.replace(PRESETS["smoke"], **changes))


@pytest.mark.parametrize("model", MODELS)
def test_models(model):
    """BN in one arm and not in the other, and nothing else is different in what they take."""
    config = dataclasses.replace(Config(), model=model, width=1 / 16)
    image = jnp.zeros((2, 32, 32, 1))
    models = [create_model(config, arm, 10) for arm in ARMS]
    init = [
        jax.eval_shape(lambda m=m: m.init(jax.random.key(0), image, train=False)) for m in models
    ]
    assert "batch_stats" in init[0] and "batch_stats" not in init[1]
    trees = [jax.tree_util.tree_leaves_with_path(found["params"]) for found in init]
    kernels = [[(p, leaf.shape) for p, leaf in tree if p[-1].key == "kernel"] for tree in trees]
    assert kernels[0] == kernels[1]


def audit_of(kinds, groups=()):
    rows = [
        Row(path, kind, math.nan, deviation=0.1, radial_share=0.1, norm=1, gradient_norm=1, size=1)
        for path, kind in kinds.items()
    ]
    return Audit(rows, groups, loss=1.0, scales=(0.5, 2), tolerance=1e-4)


KERNEL, BIAS, SCALE, SHIFT = "['a']['kernel']", "['a']['bias']", "['n']['scale']", "['n']['bias']"


@pytest.mark.parametrize(
    ("kind", "path", "normalized", "groups", "reason"),
    [
        ("invariant", KERNEL, [KERNEL], (), "invariant"),
        ("no effect", BIAS, [BIAS], (), "no effect"),
        ("no effect", BIAS, [], (), "unused"),
        ("none", KERNEL, [KERNEL], ((KERNEL, BIAS),), "group"),
        ("none", KERNEL, [KERNEL], (), "around"),
        ("none", KERNEL, [], (), "nothing"),
        ("none", KERNEL, [SCALE], (), "kernel"),
        ("homogeneous", KERNEL, [SCALE], (), "kernel"),
        ("none", BIAS, [SCALE], (), "bias"),
        ("none", SHIFT, [KERNEL], (), "last"),
        ("none", SCALE, [KERNEL], (), "last"),
    ],
)
def test_reasons(kind, path, normalized, groups, reason):
    kinds = dict.fromkeys((KERNEL, BIAS, SCALE, SHIFT), "none") | {path: kind}
    found = audit_of(kinds, groups)
    assert why(found, normalized, path) == reason
    assert WHY[reason] in explained(found, normalized)


def test_a_long_list_is_cut():
    found = audit_of({f"['a{i}']['kernel']": "none" for i in range(9)})
    assert "9 not invariant: there is no BN:" in explained(found, [])
    assert "['a5']['kernel'], and 3 more" in explained(found, [])


@pytest.mark.parametrize(
    ("kinds", "groups", "plain", "verdict"),
    [
        ({}, (), "none", REPRODUCED),
        ({KERNEL: "none"}, ((KERNEL, SCALE),), "none", REPRODUCED),
        ({KERNEL: "none"}, (), "none", NOT_REPRODUCED),
        ({SHIFT: "invariant"}, (), "none", INCONCLUSIVE),
        ({SHIFT: "invariant", BIAS: "invariant"}, (), "none", NOT_REPRODUCED),
        ({}, ((SHIFT, BIAS),), "none", NOT_REPRODUCED),
        ({}, (), "invariant", NOT_REPRODUCED),
    ],
)
def test_verdict(kinds, groups, plain, verdict):
    """KERNEL and SCALE have BN after them, BIAS and SHIFT have not."""
    kinds = {KERNEL: "invariant", BIAS: "none", SCALE: "none", SHIFT: "none"} | kinds

    def record(kinds, groups, normalized):
        found = audit_of(kinds, groups)
        rows = [dataclasses.asdict(row) | {"degree": None} for row in found.values()]
        shared = {"loss": 1.0, "scales": [0.5, 2.0]}
        return {"rows": rows, "groups": groups, "normalized": normalized, **shared}

    normalized = [record(kinds, groups, [KERNEL, SCALE])]
    unnormalized = [record(dict.fromkeys(kinds, plain), (), [])]
    (found,) = judge(PRESETS["smoke"], {"BN": normalized, "no BN": unnormalized})
    assert found.verdict == verdict
