"""Sweeps: every member's numbers, whatever the lanes, divergence, and where it was interrupted."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bn_research.normalization import BatchStats, batch_norm, update_batch_stats
from bn_research.training import sweep as sweep_module
from bn_research.training.checkpoint import Checkpointer
from bn_research.training.lanes import STRATEGIES, Lanes
from bn_research.training.loop import run_steps, train
from bn_research.training.preemption import Stopped
from bn_research.training.state import create_train_state
from bn_research.training.step import Batch, make_train_step
from bn_research.training.sweep import Member, Sweep

STEPS = 5
EXAMPLES = Batch(
    jnp.asarray(np.random.default_rng(0).standard_normal((40, 6)), jnp.float32),
    jnp.arange(40) % 3,
)


def apply_fn(variables, image, *, train):
    params, stats = variables["params"], variables["batch_stats"]
    h, moments = batch_norm(image @ params["w1"], params["scale"], params["bias"])
    stats = {"norm": update_batch_stats(stats["norm"], moments)}
    return jnp.tanh(h) @ params["w2"], stats


@jax.jit
def create(key, hyper):
    def init(key):
        keys = jax.random.split(key)
        params = {
            "w1": hyper["a"] * jax.random.normal(keys[0], (6, 8)),
            "w2": jax.random.normal(keys[1], (8, 3)),
            "scale": jnp.ones(8),
            "bias": jnp.zeros(8),
        }
        stats = {"norm": BatchStats(jnp.zeros(8), jnp.ones(8))}
        return {"params": params, "batch_stats": stats}

    return create_train_state(init, optax.sgd(hyper["rate"], momentum=0.9), key)


def advance(state, hyper, examples):
    step = make_train_step(apply_fn, optax.sgd(hyper["rate"], momentum=0.9))
    state, metrics = run_steps(step, state, examples, batch_size=8, num_steps=STEPS)
    observed = {"step": state.step, "w2": state.params["w2"][0]}  # after the dispatch
    return state, metrics._replace(observed=observed)


def member(seed=0, rate=0.1, a=1.0, steps=15):
    hyper = {"rate": np.float32(rate), "a": np.float32(a)}
    return Member(f"seed={seed} rate={rate} a={a}", seed, hyper, steps)


# Seeds, rates, lengths; one that is lost in its first steps (a rate of inf makes every update NaN).
MEMBERS = [
    member(0),
    member(1, steps=30),
    member(0, rate=0.5),
    member(2, rate=np.inf, steps=30),
    member(1, a=10.0),
    member(3),
    member(4, steps=5),
]


@functools.cache
def alone(name):
    """Losses, divergences and last state of a member trained by `train` in a program of its own."""
    found = next(m for m in MEMBERS if m.name == name)
    program, observed = jax.jit(advance), []
    state, history = train(
        lambda state: program(state, found.hyper, EXAMPLES),
        lambda: create(jax.random.key(found.seed), found.hyper),
        name=name,
        num_steps=found.num_steps,
        steps_per_dispatch=STEPS,
        on_metrics=lambda steps, metrics: observed.append(metrics.observed),
    )
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *observed)
    return history._replace(observed=stacked), state


@functools.cache
def programs(strategy, devices):
    return Sweep(
        advance,
        steps_per_dispatch=STEPS,
        strategy=strategy,
        devices=jax.devices()[:devices],
    )


def silent(choice):
    pass


def swept(strategy, members=MEMBERS, devices=2, **options):
    sweep = programs(strategy, devices)
    return list(sweep.run(create, members, EXAMPLES, on_choice=silent, **options))


def raw(tree):
    def plain(leaf):
        key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if key else leaf)

    return jax.tree.map(plain, tree)


def same_bits(results, members=MEMBERS):
    assert [result[0].name for result in results] == [m.name for m in members]
    for found, state, history in results:
        expected, last = alone(found.name)
        np.testing.assert_array_equal(history.loss, expected.loss)
        assert history.diverged == expected.diverged
        assert len(history.observed["step"]) == len(history.loss) // STEPS
        jax.tree.map(np.testing.assert_array_equal, history.observed, expected.observed)
        jax.tree.map(np.testing.assert_array_equal, raw(state), raw(last))


# --- a member's numbers ---


@pytest.mark.parametrize(("strategy", "devices"), [("in_turn", 1), ("devices", 2), ("devices", 3)])
def test_numbers_are_those_of_a_run_of_its_own(strategy, devices):
    assert jax.device_count() >= devices
    same_bits(swept(strategy, devices=devices))


def test_batched_numbers_agree_to_rounding():
    """In float64 where training has not amplified it: 15 steps, about 1e-15."""
    with jax.enable_x64(True):
        examples = Batch(EXAMPLES.image.astype(jnp.float64), EXAMPLES.label)
        members = [member(0), member(1), member(0, rate=0.5)]

        def results(strategy):
            sweep = Sweep(advance, steps_per_dispatch=STEPS, strategy=strategy)
            cast = jax.jit(lambda key, hyper: jax.tree.map(_to_float64, create(key, hyper)))
            return list(sweep.run(cast, members, examples, on_choice=silent))

        for batched, single in zip(results("vmap"), results("in_turn"), strict=True):
            np.testing.assert_allclose(batched[2].loss, single[2].loss, rtol=1e-6)
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-13),
                raw(batched[1]),
                raw(single[1]),
            )


def _to_float64(leaf):
    return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_lost_member_ends_early_and_no_other_notices(strategy):
    results = swept(strategy)
    lost = results[3]
    assert lost[2].diverged >= 2 and len(lost[2].loss) == STEPS
    others = [m for m in MEMBERS if m is not MEMBERS[3]]
    without = swept(strategy, others)
    kept = [result for result in results if result[0] is not MEMBERS[3]]
    for one, two in zip(kept, without, strict=True):
        np.testing.assert_array_equal(one[2].loss, two[2].loss)
        assert np.isfinite(one[2].loss).all() and one[2].diverged == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_member_that_is_told_to_stop_ends_alone(strategy):
    def stop(found, loss):
        return found is MEMBERS[1] and len(loss) >= 10

    lengths = [len(history.loss) for _, _, history in swept(strategy, stop_when=stop)]
    assert lengths == [15, 10, 15, 5, 15, 15, 5]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_settings_compile_nothing_anew(strategy):
    swept(strategy)
    compiled = []

    def listen(event, seconds, **_):
        compiled.extend([event] if "compile" in event else [])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        swept(strategy, [m._replace(name=f"{m.name} again", seed=m.seed + 10) for m in MEMBERS])
        assert compiled == []
        jax.jit(lambda x: x + 1)(0)
        assert compiled  # the listener listens
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


# --- scheduling ---


def test_a_free_lane_takes_the_next_member(monkeypatch):
    """On 2 lanes 15, 30, 15, 5, 15, 15, 5 steps take 10 dispatches, not the 13 of pairs."""
    dispatches = []
    dispatch = Lanes.advance

    def counted(self, data):
        dispatches.append(self.count)
        return dispatch(self, data)

    monkeypatch.setattr(Lanes, "advance", counted)
    swept("devices")
    assert dispatches == [2] * 10
    dispatches.clear()
    swept("vmap")
    assert dispatches == [8] * 6


def test_members_come_in_order_as_soon_as_those_before_are_done():
    taken, seen = [], []
    for found, _, _ in programs("devices", 2).run(
        create, MEMBERS, EXAMPLES, on_choice=silent, on_steps=taken.append
    ):
        seen.append((found.name, sum(taken)))
    assert [name for name, _ in seen] == [m.name for m in MEMBERS]
    assert seen[0][1] == 30 and seen[-1][1] == 100


def test_known_members_are_not_trained():
    done = {MEMBERS[0].name, MEMBERS[3].name}
    taken = []
    results = swept("devices", done=done, on_steps=taken.append)
    rest = [m for m in MEMBERS if m.name not in done]
    same_bits(results, rest)
    assert sum(taken) == 80
    assert swept("devices", done={m.name for m in MEMBERS}) == []


# --- the choice ---


def test_the_fastest_is_chosen_and_printed(capsys, monkeypatch):
    cost = {"in_turn": 3.0, "devices": 1.0, "vmap": 2.0}
    clock = [0.0]
    dispatch = Lanes.advance

    def slow(self, data):
        kind = "vmap" if self.in_step else ("in_turn" if self.count == 1 else "devices")
        clock[0] += cost[kind] * min(self.count, len(MEMBERS))
        return dispatch(self, data)

    monkeypatch.setattr(Lanes, "advance", slow)
    monkeypatch.setattr(sweep_module.time, "perf_counter", lambda: clock[0])
    for fastest in cost:
        cost[fastest] /= 100
        sweep = Sweep(advance, steps_per_dispatch=STEPS, devices=jax.devices()[:2])
        results = list(sweep.run(create, MEMBERS, EXAMPLES))
        said = capsys.readouterr().out
        assert sweep.choice.strategy == fastest and f"sweep: {fastest} (ms per member" in said
        assert set(sweep.choice.seconds) == set(STRATEGIES)
        assert sweep.choice.seconds[fastest] == pytest.approx(cost[fastest] / STEPS)
        if fastest != "vmap":
            same_bits(results)
        cost[fastest] *= 100


@pytest.mark.parametrize(("vmap", "chosen"), [(0.9, "devices"), (0.7, "vmap")])
def test_what_rounds_otherwise_must_be_clearly_faster(monkeypatch, vmap, chosen):
    cost = {1: 2.0, 2: 1.0, 8: vmap}
    clock = [0.0]

    def dispatch(self, data):
        clock[0] += cost[self.count] * min(self.count, len(MEMBERS))

    monkeypatch.setattr(Lanes, "advance", dispatch)
    monkeypatch.setattr(sweep_module.time, "perf_counter", lambda: clock[0])
    sweep = Sweep(advance, steps_per_dispatch=STEPS, devices=jax.devices()[:2])
    assert sweep.measure(create, MEMBERS, EXAMPLES).strategy == chosen


def test_one_member_or_one_device_leaves_less_to_choose():
    sweep = Sweep(advance, steps_per_dispatch=STEPS, devices=jax.devices()[:1])
    assert set(sweep.measure(create, MEMBERS, EXAMPLES).seconds) == {"in_turn", "vmap"}
    sweep = Sweep(advance, steps_per_dispatch=STEPS)
    assert set(sweep.measure(create, MEMBERS[:1], EXAMPLES).seconds) == {"in_turn"}


# --- interruption ---


@pytest.mark.parametrize(
    ("strategy", "other_devices"),
    # The number of lanes of a device is part of the batched program, so it keeps its devices.
    [("in_turn", 1), ("devices", 1), ("devices", 3), ("vmap", 2)],
)
def test_interrupted_anywhere_it_ends_with_the_same_bits(tmp_path, strategy, other_devices):
    """SIGTERM after some dispatch, at which members stand at different steps."""
    whole = swept(strategy)
    for stop_at in (1, 2, 5, 9):
        saver = Checkpointer(tmp_path / str(stop_at))
        asked, results = [], []

        def stop(step, asked=asked, stop_at=stop_at):
            asked.append(step)
            return len(asked) == stop_at

        with contextlib.suppress(Stopped):
            for result in programs(strategy, 2).run(
                create,
                MEMBERS,
                EXAMPLES,
                saver=saver,
                save_when=lambda: False,
                on_choice=silent,
                preempted=stop,
            ):
                results.append(result)
        done = {result[0].name for result in results}
        taken = []
        assert len(asked) == stop_at or len(done) == len(MEMBERS)
        results += swept(
            strategy, devices=other_devices, done=done, saver=saver, on_steps=taken.append
        )
        left = len(MEMBERS) - len(done)
        assert left == 0 or max(taken[:left]) > 0  # a member went on from where it was
        for one, two in zip(results, whole, strict=True):
            np.testing.assert_array_equal(one[2].loss, two[2].loss)
            assert one[2].diverged == two[2].diverged
            jax.tree.map(np.testing.assert_array_equal, one[2].observed, two[2].observed)
            jax.tree.map(np.testing.assert_array_equal, raw(one[1]), raw(two[1]))
        saver.close()


def test_members_at_different_steps_can_go_on_batched(tmp_path):
    """Stopped over devices, where lanes are refilled; gone on with vmap, which keeps step."""
    saver = Checkpointer(tmp_path)
    asked = []
    with pytest.raises(Stopped):
        swept("devices", saver=saver, preempted=lambda step: asked.append(step) or len(asked) == 4)
    assert len({note["steps"] for note in saver.newest()[1]["members"]}) > 1
    done = {MEMBERS[0].name}
    results = swept("vmap", done=done, saver=saver)
    assert [result[0] for result in results] == MEMBERS[1:]
    for found, _, history in results:
        np.testing.assert_allclose(history.loss, alone(found.name)[0].loss, rtol=1e-4)
    saver.close()


def test_a_checkpoint_of_other_members_is_left_alone(tmp_path):
    saver = Checkpointer(tmp_path)
    with pytest.raises(Stopped):
        swept("devices", MEMBERS[:3], saver=saver, preempted=lambda step: True)
    taken = []
    same_bits(swept("devices", MEMBERS[3:], saver=saver, on_steps=taken.append), MEMBERS[3:])
    assert taken[: len(MEMBERS[3:])] == [0] * 4
    saver.close()


# --- bad input ---


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([], "a sweep has no members: give at least one"),
        ([member(0), member(1), member(0)], "are the same run"),
        ([member(0), member(0)._replace(name="another name")], "'seed=0 rate=0.1 a=1.0' and"),
        ([member(0, steps=7)], "num_steps=7 is not allowed"),
        ([member(0, steps=0)], "multiple of steps_per_dispatch=5"),
    ],
)
def test_bad_members_are_named_before_anything_runs(members, said):
    def never(*args):
        raise AssertionError("something was computed")

    with pytest.raises(ValueError, match=said) as error:
        Sweep(never, steps_per_dispatch=STEPS).run(never, members)
    assert "\n" not in str(error.value)


def test_bad_strategies_are_named():
    with pytest.raises(ValueError, match="strategy='fast' is unknown: allowed are auto, in_turn"):
        Sweep(advance, steps_per_dispatch=STEPS, strategy="fast")
    with pytest.raises(ValueError, match="steps_per_dispatch=0"):
        Sweep(advance, steps_per_dispatch=0)
