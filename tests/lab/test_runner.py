"""The runner of trainings: each once in the life of a workdir, resumed, stopped and recorded."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bn_research.lab.runner import Runner
from bn_research.lab.workdir import Ledger
from bn_research.training.checkpoint import Checkpointer
from bn_research.training.loop import run_steps
from bn_research.training.preemption import Stopped
from bn_research.training.state import create_train_state
from bn_research.training.step import Batch, make_train_step
from bn_research.training.sweep import Member, Sweep

DATA = Batch(
    jnp.asarray(np.random.default_rng(0).standard_normal((24, 4)), jnp.float32),
    jnp.arange(24) % 3,
)
MEMBERS = [Member(f"rate={rate}", 0, np.float32(rate), 6) for rate in (0.1, 0.3)]


def apply_fn(variables, image, *, train):
    return image @ variables["params"]["w"], {}


@jax.jit
def create(key, rate):
    def init(key):
        return {"params": {"w": jax.random.normal(key, (4, 3))}}

    return create_train_state(init, optax.sgd(rate), key)


def advance(state, rate, data):
    step = make_train_step(apply_fn, optax.sgd(rate))
    state, metrics = run_steps(step, state, data, batch_size=8, num_steps=2)
    return state, metrics._replace(observed=jnp.sum(state.params["w"]))


SWEEP = Sweep(advance, steps_per_dispatch=2, strategy="in_turn")


def record(member, state, history):
    return {"loss": history.loss, "seen": history.observed, "sum": jnp.sum(state.params["w"])}


def run(path, members=MEMBERS, strategy="in_turn", **options):
    ledger = Ledger(path / "metrics.jsonl")
    with Runner(path, ledger, total_steps=12, strategy=strategy) as runner:
        return runner.train(create, SWEEP, members, DATA, record=record, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    return path, run(path)


def test_records_are_of_the_members_in_order(whole):
    path, records = whole
    assert [found["name"] for found in records] == [member.name for member in MEMBERS]
    assert all(len(found["loss"]) == 6 and len(found["seen"]) == 3 for found in records)
    assert all(found["seen"][-1] == pytest.approx(found["sum"]) for found in records)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert lines == records
    saver = Checkpointer(path / "checkpoints")
    assert saver.newest()[1]["name"] == MEMBERS[-1].name  # the last trained state is kept
    saver.close()


def test_what_is_in_the_ledger_is_not_trained_again(whole, monkeypatch):
    path, records = whole

    def anew(*_, **__):
        raise AssertionError

    monkeypatch.setattr(Sweep, "run", anew)
    assert run(path) == records


def test_new_members_join_those_that_are_done(tmp_path, whole, monkeypatch):
    trained = []
    run(tmp_path, MEMBERS[:1])
    first = (tmp_path / "metrics.jsonl").read_bytes()
    yielded = Sweep.run

    def told(self, *arguments, **options):
        for result in yielded(self, *arguments, **options):
            trained.append(result[0].name)
            yield result

    monkeypatch.setattr(Sweep, "run", told)
    assert run(tmp_path) == whole[1]
    assert trained == [MEMBERS[1].name]
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(first)


def test_stopped_by_sigterm_it_goes_on_from_there_with_the_same_bits(tmp_path, whole, monkeypatch):
    asked, restored = [], []

    def stop_in_the_middle(member, loss):
        asked.append(member.name)
        if len(asked) == 4:  # the second dispatch of the second member
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Stopped):
            run(tmp_path, stop_when=stop_in_the_middle)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert asked[-1] == MEMBERS[1].name and len(asked) < 6
    restore = Checkpointer.restore

    def counted(self, number, template):
        restored.append(number)
        return restore(self, number, template)

    monkeypatch.setattr(Checkpointer, "restore", counted)
    assert run(tmp_path) == whole[1]
    assert len(restored) == 1


def test_a_measurement_is_made_once_and_sigterm_is_noticed_after_it(tmp_path):
    calls = []

    def measure():
        calls.append(1)
        return {"x": 1.0}

    def measure_and_signal():
        os.kill(os.getpid(), signal.SIGTERM)
        return measure()

    ledger = Ledger(tmp_path / "metrics.jsonl")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Stopped), Runner(tmp_path, ledger, total_steps=1) as runner:
            assert runner.get("first", measure) == runner.get("first", measure)
            runner.get("second", measure_and_signal)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert len(calls) == 2 and "second" in ledger  # it was done, so it is kept


def test_the_measured_strategy_is_kept(tmp_path, monkeypatch, capsys):
    first = run(tmp_path, MEMBERS, strategy="auto")
    assert "sweep: " in capsys.readouterr().out

    def anew(*_, **__):
        raise AssertionError

    monkeypatch.setattr(Sweep, "measure", anew)
    extra = Member("rate=0.5", 0, np.float32(0.5), 6)
    assert run(tmp_path, [*MEMBERS, extra], strategy="auto")[:2] == first
