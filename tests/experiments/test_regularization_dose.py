"""Tests of the noise in the logits, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_research.lab.runner import Runner
from bn_research.lab.workdir import Ledger
from bn_research.training.state import TrainState
from bn_research.training.step import Batch
from experiments.regularization.arms import Setting, make_model
from experiments.regularization.data import Data
from experiments.regularization.groups_dose import dose
from experiments.regularization.training import Trainer

SETTING = Setting("f5 f3", group_size=4, batch_size=8)


@pytest.fixture
def trainer(tmp_path):
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.standard_normal((18, 2, 2, 1)), jnp.float32)
    examples = Batch(image, jnp.arange(18) % 3)
    with Runner(tmp_path, Ledger(tmp_path / "metrics.jsonl"), total_steps=1) as runner:
        data = Data(examples, examples, examples)
        yield Trainer(runner, data, num_steps=1, steps_per_dispatch=1)


def state_of(setting):
    variables = make_model(setting).init(jax.random.key(1), jnp.zeros((1, 2, 2, 1)), train=False)
    stats = variables.get("batch_stats", {})
    return TrainState(jnp.int32(0), variables["params"], stats, (), jax.random.key(0))


def test_dose_of_groups_by_hand(trainer):
    """Eight orders of sixteen examples, in groups of four, in float64."""
    state = state_of(SETTING)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.params)
    x = np.asarray(trainer.data.train.image[:16], np.float64).reshape(16, -1)
    hidden = x @ params["dense1"]["kernel"] + params["dense1"]["bias"]
    z = np.empty((8, 16, 3))
    for number, key in enumerate(jax.random.split(jax.random.key(40_000), 8)):
        order = np.asarray(jax.random.permutation(jax.random.split(key)[0], 16))
        for group in order.reshape(4, 4):
            h = hidden[group]
            h = (h - h.mean(axis=0)) / np.sqrt(h.var(axis=0) + 1e-5)
            z[number, group] = np.maximum(h, 0) @ params["dense2"]["kernel"]
    z += params["dense2"]["bias"]
    z -= z.mean(axis=2, keepdims=True)
    noise = z.var(axis=0, ddof=1).mean(axis=0).sum()
    signal = z.mean(axis=0).var(axis=0).sum()
    assert dose(trainer, SETTING, state)["dose"] == pytest.approx(noise / signal, rel=1e-4)


def test_what_adds_no_noise_has_no_dose(trainer):
    """Without BN, and by the statistics of the whole set, whatever its order."""
    for setting in (SETTING._replace(norm="none"), SETTING._replace(group_size=0, batch_size=16)):
        assert dose(trainer, setting, state_of(setting))["dose"] < 1e-10


def test_drawn_noise_has_a_dose(trainer):
    for norm in ("measured", "borrowed", "additive"):
        setting = SETTING._replace(norm=norm, population="batch", batch_size=16)
        assert dose(trainer, setting, state_of(setting))["dose"] > 1e-3
