"""Settings as pytrees, programs by structure, and the one trainer of all experiments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bn_research.lab.runner import Runner
from bn_research.lab.settings import (
    Programs,
    Setting,
    Training,
    creator,
    per_structure,
    sweep,
    train,
)
from bn_research.lab.workdir import Ledger
from bn_research.training.loop import run_steps
from bn_research.training.step import Batch, make_train_step

DATA = Batch(
    jnp.asarray(np.random.default_rng(0).standard_normal((24, 4)), jnp.float32),
    jnp.arange(24) % 3,
)


class Linear(Setting, traced="rate is_scaled", unseen="num_steps"):
    """A linear network."""

    batch_size: int
    rate: float
    is_scaled: bool = False
    num_steps: int = 4


def apply_fn(setting):
    def apply(variables, image, *, train):
        scale = jnp.where(setting.is_scaled, 2.0, 1.0)
        return scale * image @ variables["params"]["w"], {}

    return apply


def init(key, setting):
    return {"params": {"w": jax.random.normal(key, (4, 3))}}


def optimizer(setting):
    return optax.sgd(setting.rate)


BUILT = []


@per_structure
def programs(setting, num_steps=2):
    BUILT.append(setting)
    batch_size = setting.batch_size

    def advance(state, setting, data):
        step = make_train_step(apply_fn(setting), optimizer(setting))
        return run_steps(step, state, data, batch_size=batch_size, num_steps=num_steps)

    return Programs(
        creator(init, optimizer), sweep(advance, steps_per_dispatch=num_steps, strategy="in_turn")
    )


def test_a_setting_is_a_pytree_of_its_traced_fields():
    setting = Linear(8, 0.1)
    assert jax.tree.leaves(setting) == [0.1, False]
    assert jax.tree.structure(setting) == jax.tree.structure(Linear(8, 0.3, True, num_steps=6))
    assert jax.tree.structure(setting) != jax.tree.structure(Linear(12, 0.1))
    assert setting.replace(rate=0.2) == Linear(8, 0.2) and setting == Linear(8, 0.1)
    assert setting.name == "batch_size=8 rate=0.1 is_scaled=False num_steps=4"
    assert setting.as_record() == {
        "batch_size": 8,
        "rate": 0.1,
        "is_scaled": False,
        "num_steps": 4,
    }
    with pytest.raises(AttributeError):
        setting.rate = 0.5
    traced = Linear(8, 0.1, True).traced
    assert (traced.rate.dtype, traced.is_scaled.dtype) == (np.float32, np.bool_)
    assert traced.rate == np.float32(0.1) and traced.batch_size == 8


def test_what_is_built_for_a_structure_is_built_once_and_sees_no_traced_field():
    BUILT.clear()
    first, again, other = programs(Linear(8, 0.1)), programs(Linear(8, 9.0)), programs(Linear(4, 1))
    assert first is again and other is not first
    assert [(b.batch_size, b.rate, b.is_scaled) for b in BUILT] == [
        (8, None, None),
        (4, None, None),
    ]
    assert programs(Linear(8, 0.1), 4) is not first


def record(training, state, history):
    return {
        **training.setting.as_record(),
        "seed": training.seed,
        "loss": history.loss,
        "sum": jnp.sum(state.params["w"]),
    }


def run(path, trainings, **options):
    with Runner(path, Ledger(path / "metrics.jsonl"), total_steps=1, strategy="in_turn") as runner:
        return train(runner, trainings, programs, DATA, record=record, **options)


TRAININGS = [
    Training(Linear(8, 0.1), 0, 4, arm="slow"),
    Training(Linear(12, 0.1), 0, 4, arm="large batch"),
    Training(Linear(8, 0.3), 1, 6),
    Training(Linear(8, 0.1), 0, 4, arm="the slow one again"),
    Training(Linear(8, 0.1, True), 0, 4),
]


def test_records_stand_in_the_order_of_the_trainings_and_equal_ones_are_one(tmp_path):
    records = run(tmp_path, TRAININGS)
    kept = Ledger(tmp_path / "metrics.jsonl")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    assert f"{Linear(8, 0.3).name} seed=1" in kept
    for training, found in zip(TRAININGS, records, strict=True):
        setting, num_steps = training.setting, training.num_steps
        assert found["rate"] == setting.rate and found["seed"] == training.seed
        assert found.get("arm", "") == training.arm
        assert len(found["loss"]) == num_steps
    assert {**records[0], "arm": ""} == {**records[3], "arm": ""}
    assert "arm" not in kept.get(f"{Linear(8, 0.1).name} seed=0", dict)


def test_a_training_of_a_sweep_is_that_of_the_plain_loop(tmp_path):
    records = run(tmp_path, TRAININGS)
    for training, found in zip(TRAININGS, records, strict=True):
        setting = training.setting
        step = jax.jit(make_train_step(apply_fn(setting), optimizer(setting)))
        state = creator(init, optimizer)(jax.random.key(training.seed), setting.traced)
        losses = []
        for _ in range(training.num_steps // 2):
            state, metrics = run_steps(
                step, state, DATA, batch_size=setting.batch_size, num_steps=2
            )
            losses += list(np.asarray(metrics.loss))
        np.testing.assert_allclose(found["loss"], losses, rtol=2e-6)
        np.testing.assert_allclose(found["sum"], jnp.sum(state.params["w"]), rtol=2e-6)


def test_names_words_and_stops_are_of_the_training(tmp_path):
    asked = []

    def stop_when(training, loss):
        asked.append((training.setting.rate, len(loss)))
        return training.setting.rate == 0.3

    records = run(
        tmp_path,
        TRAININGS[:3],
        name=lambda t: f"{t.setting.batch_size} {t.setting.rate} {t.seed}",
        describe=lambda t: f"batch {t.setting.batch_size}",
        stop_when=stop_when,
    )
    assert [r["name"] for r in records] == ["8 0.1 0", "12 0.1 0", "8 0.3 1"]
    assert len(records[0]["loss"]) == 4 and len(records[2]["loss"]) == 2
    assert (0.3, 2) in asked
