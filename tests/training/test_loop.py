"""Scanned steps, padded evaluation and resumable runs, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax

from bn_research.normalization import BatchStats, batch_norm, normalize, update_batch_stats
from bn_research.training import loop
from bn_research.training.checkpoint import Checkpointer
from bn_research.training.loop import (
    batch_at,
    epoch_order,
    epoch_order_of_groups,
    evaluate,
    every,
    padded_batches,
    run_steps,
    streamed,
    train,
)
from bn_research.training.preemption import Stopped
from bn_research.training.state import TrainState, create_train_state
from bn_research.training.step import Batch, StepMetrics, make_eval_step, make_train_step


def same_bits(a, b):
    def raw(leaf):
        key = jnp.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if key else leaf)

    jax.tree.map(lambda x, y: np.testing.assert_array_equal(raw(x), raw(y)), a, b)


def numbered(count):
    """Examples that are told apart by their label and by their image."""
    label = jnp.arange(count)
    return Batch(label[:, None].astype(jnp.float32), label)


def recorded(state, batch):
    """A step that reports the labels it saw."""
    metrics = StepMetrics(batch.label, batch.image[:, 0], jnp.zeros((), bool))
    return state._replace(step=state.step + 1), metrics


@functools.partial(jax.jit, static_argnames=("count", "batch_size", "num_steps"))
def labels_seen(key, start, *, count, batch_size, num_steps):
    state = TrainState(start, (), (), (), key)
    new, metrics = run_steps(
        recorded, state, numbered(count), batch_size=batch_size, num_steps=num_steps
    )
    return new.step, metrics.loss, metrics.accuracy


def seen(seed=0, start=0, **options):
    step, label, image = labels_seen(jax.random.key(seed), jnp.int32(start), **options)
    assert step == start + options["num_steps"]
    np.testing.assert_array_equal(label, image)
    return np.asarray(label)


@pytest.mark.parametrize(("count", "batch_size"), [(12, 4), (13, 5), (7, 7)])
def test_each_example_once_in_an_epoch(count, batch_size):
    """Less the remainder that fills no batch; and in another order in the next epoch."""
    steps = count // batch_size
    labels = seen(count=count, batch_size=batch_size, num_steps=3 * steps)
    epochs = labels.reshape(3, steps * batch_size)
    for epoch in epochs:
        assert len(set(epoch.tolist())) == steps * batch_size
        if count % batch_size == 0:
            assert set(epoch.tolist()) == set(range(count))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3


def test_a_remainder_is_not_left_out_for_ever():
    labels = seen(count=13, batch_size=5, num_steps=40)
    assert set(labels.ravel().tolist()) == set(range(13))


def test_batches_do_not_depend_on_the_cuts():
    """Dispatches of 5 and of 1 step, across epochs of 3, see what one of 10 sees."""
    options = dict(count=12, batch_size=4)
    whole = seen(num_steps=10, **options)
    halves = [seen(start=start, num_steps=5, **options) for start in (0, 5)]
    np.testing.assert_array_equal(whole, np.concatenate(halves))
    single = [seen(start=start, num_steps=1, **options) for start in range(10)]
    np.testing.assert_array_equal(whole, np.concatenate(single))


def test_the_batch_at_a_step_is_the_one_that_is_taken():
    """13 examples in batches of 5 are two steps an epoch; one ahead of the second is the first."""
    taken = seen(count=13, batch_size=5, num_steps=6).reshape(6, 5)
    for step in range(6):
        state = TrainState(jnp.int32(step), (), (), (), jax.random.key(0))
        np.testing.assert_array_equal(batch_at(state, numbered(13), 5).label, taken[step])
        ahead = batch_at(state, numbered(13), 5, ahead=1)
        np.testing.assert_array_equal(ahead.label, taken[step + 1 if step % 2 == 0 else step - 1])


def epochs(regrouped, count=4, num_examples=23, group_size=4, seed=0):
    """Groups of examples, [epochs, groups, group_size]."""
    order = functools.partial(
        epoch_order_of_groups, num_examples=num_examples, group_size=group_size
    )
    key = jax.random.key(seed)
    found = [order(key, jnp.int32(e), regrouped=jnp.bool_(regrouped)) for e in range(count)]
    return np.array(found).reshape(count, -1, group_size)


def companies(groups):
    return {frozenset(group) for group in groups.tolist()}


def test_frozen_groups_keep_their_company_and_change_places():
    found = epochs(regrouped=False)
    first = np.asarray(epoch_order(jax.random.key(0), jnp.int32(0), 23))[:20].reshape(5, 4)
    for groups in found:
        assert companies(groups) == companies(first)
    assert not np.array_equal(found[0], found[1])
    assert companies(epochs(regrouped=False, seed=1)[0]) != companies(first)


def test_groups_drawn_anew_are_those_of_run_steps():
    found = epochs(regrouped=True)
    for epoch, groups in enumerate(found):
        order = np.asarray(epoch_order(jax.random.key(0), jnp.int32(epoch), 23))
        assert groups.ravel().tolist() == order[:20].tolist()
        assert len(np.unique(groups)) == 20
    assert companies(found[0]).isdisjoint(companies(found[1]))


@pytest.mark.parametrize("regrouped", [False, True])
def test_batches_of_groups_do_not_depend_on_the_cuts(regrouped):
    """Groups of 3 in batches of 6, of 20 examples: 18 are seen in an epoch, by 3 batches."""
    order = functools.partial(epoch_order_of_groups, group_size=3, regrouped=regrouped)

    @functools.partial(jax.jit, static_argnames="num_steps")
    def dispatch(start, num_steps):
        state = TrainState(start, (), (), (), jax.random.key(3))
        return run_steps(
            recorded,
            state,
            numbered(20),
            batch_size=6,
            num_steps=num_steps,
            order_of_epoch=order,
        )[1].loss

    whole = np.asarray(dispatch(jnp.int32(0), 8))
    parts = [dispatch(jnp.int32(start), 2) for start in (0, 2, 4, 6)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    expected = epochs(regrouped, 3, num_examples=20, group_size=3, seed=3)
    np.testing.assert_array_equal(whole, expected.reshape(-1, 6)[:8])


def test_the_order_depends_on_the_seed():
    options = dict(count=12, batch_size=4, num_steps=3)
    np.testing.assert_array_equal(seen(0, **options), seen(0, **options))
    assert not np.array_equal(seen(0, **options), seen(1, **options))


@pytest.mark.parametrize("batch_size", [0, -1, 13])
def test_bad_batch_size(batch_size):
    state = TrainState(jnp.int32(0), (), (), (), jax.random.key(0))
    with pytest.raises(ValueError, match=f"batch_size={batch_size} .*12.*between 1 and 12"):
        run_steps(recorded, state, numbered(12), batch_size=batch_size, num_steps=1)


def model(variables, images, train):
    """Dense → BN."""
    params, stats = variables["params"], BatchStats(**variables["batch_stats"])
    h = images @ params["w"]
    if not train:
        return normalize(h, *stats, params["scale"], params["bias"]), stats._asdict()
    y, moments = batch_norm(h, params["scale"], params["bias"])
    return y, update_batch_stats(stats, moments, momentum=0.9)._asdict()


def init(key):
    return {
        "params": {
            "w": jax.random.normal(key, (3, 4)),
            "scale": jnp.ones(4),
            "bias": jnp.zeros(4),
        },
        "batch_stats": {"mean": jnp.zeros(4), "var": jnp.ones(4)},
    }


def examples(count=10, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((count, 3)).astype(np.float32)
    return Batch(image, rng.integers(0, 4, count).astype(np.int32))


OPTIMIZER = optax.adam(0.1)
DATA = examples()
STEP = make_train_step(model, OPTIMIZER)


@functools.partial(jax.jit, static_argnames="num_steps")
def dispatch(state, num_steps):
    return run_steps(STEP, state, DATA, batch_size=4, num_steps=num_steps)


def create_state(seed=0):
    return create_train_state(init, OPTIMIZER, jax.random.key(seed))


def test_the_bits_do_not_depend_on_the_cuts():
    """Params, batch_stats, optimizer and losses of 6 steps: 6, 2 + 2 + 2 and 3 + 3."""
    whole, metrics = dispatch(create_state(), 6)
    assert len(set(np.asarray(metrics.loss).tolist())) == 6
    for length in (2, 3):
        state, parts = create_state(), []
        for _ in range(6 // length):
            state, part = dispatch(state, length)
            parts.append(part)
        same_bits(state, whole)
        same_bits(jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts), metrics)


def test_scanned_steps_equal_single_steps():
    """The batches that an epoch's order gives, stepped one by one outside the scan."""
    whole, metrics = dispatch(create_state(), 2)
    state, step = create_state(), jax.jit(STEP)
    rows = labels_seen(state.key, state.step, count=10, batch_size=4, num_steps=2)[1]
    for row, loss in zip(rows, metrics.loss, strict=True):
        state, one = step(state, Batch(DATA.image[row], DATA.label[row]))
        np.testing.assert_allclose(one.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(state.params["w"], whole.params["w"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        state.batch_stats["var"], whole.batch_stats["var"], rtol=1e-4, atol=1e-5
    )


eval_step = jax.jit(make_eval_step(model))


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (9, 4), (3, 4), (4, 4), (1, 1)])
def test_evaluation_of_the_whole_set(count, batch_size):
    """Equals numpy over all examples, whether or not the batch size divides them."""
    data, params = examples(count, seed=1), create_state().params
    stats = {"mean": np.full(4, 0.3, np.float32), "var": np.full(4, 2.0, np.float32)}
    state = create_state()._replace(params=params, batch_stats=stats)
    result = evaluate(eval_step, state, padded_batches(data, batch_size))
    h = data.image.astype(float) @ np.asarray(params["w"], float)
    log_p = log_softmax((h - 0.3) / np.sqrt(2 + 1e-5), 1)
    assert result["count"] == count
    assert result["loss"] == pytest.approx(-log_p[np.arange(count), data.label].mean(), rel=1e-5)
    assert result["accuracy"] == pytest.approx((log_p.argmax(1) == data.label).mean(), rel=1e-6)


def test_padded_batches():
    """One shape for all, every example once and in order, the rest masked."""
    batches = list(padded_batches(numbered(10), 4))
    assert [b.image.shape for b in batches] == [(4, 1)] * 3
    where = np.concatenate([b.where for b in batches])
    np.testing.assert_array_equal(where, np.arange(12) < 10)
    labels = np.concatenate([b.label for b in batches])
    np.testing.assert_array_equal(labels[where], np.arange(10))
    assert np.all(np.isfinite(np.concatenate([b.image for b in batches])))


def test_examples_masked_by_the_caller_are_left_out():
    """Equal to evaluating the others alone, to the bit of the counts."""
    data, state = examples(9, seed=2), create_state()
    keep = np.arange(9) % 3 > 0
    masked = evaluate(eval_step, state, padded_batches(data._replace(where=jnp.asarray(keep)), 4))
    kept = data._replace(image=data.image[keep], label=data.label[keep])
    alone = evaluate(eval_step, state, padded_batches(kept, 4))
    assert masked["count"] == alone["count"] == 6
    assert masked["accuracy"] == alone["accuracy"]
    assert masked["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_nothing_to_evaluate():
    nothing = examples(4)._replace(where=jnp.zeros(4, bool))
    for batches in ([], padded_batches(examples(0), 4), [nothing]):
        with pytest.raises(ValueError, match="at least one example"):
            evaluate(eval_step, create_state(), batches)


RUN = dict(name="run", num_steps=6, steps_per_dispatch=2)


def advance(state):
    return dispatch(state, 2)


class Interrupt(Exception):
    """Stands for a killed process."""


@pytest.fixture(scope="module")
def undisturbed():
    return train(advance, create_state, **RUN)


def test_train_takes_the_steps(undisturbed):
    state, history = undisturbed
    expected, metrics = dispatch(create_state(), 6)
    same_bits(state, expected)
    same_bits(history.loss, np.asarray(metrics.loss))
    assert state.step == 6 and history.diverged == 0 and history.loss.dtype == np.float32


@pytest.mark.parametrize("interrupted_at", [1, 2, 3])
@pytest.mark.parametrize("save_every", [1, 2])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, undisturbed, interrupted_at, save_every):
    dispatches = 0

    def interrupt(*_):
        nonlocal dispatches
        dispatches += 1
        if dispatches == interrupted_at:
            raise Interrupt

    first = Checkpointer(tmp_path)
    with pytest.raises(Interrupt):
        train(
            advance,
            create_state,
            saver=first,
            on_dispatch=interrupt,
            save_when=lambda: dispatches % save_every == 0,
            **RUN,
        )
    first.close()
    told = []
    second = Checkpointer(tmp_path)

    def tell(state, steps):
        told.append(steps)
        assert state.step == sum(told)

    state, history = train(advance, create_state, saver=second, on_dispatch=tell, **RUN)
    second.close()
    restored = 2 * ((interrupted_at - 1) // save_every * save_every)
    assert told == ([restored] if restored else []) + [2] * ((6 - restored) // 2)
    same_bits(state, undisturbed[0])
    same_bits(history.loss, undisturbed[1].loss)
    assert history.diverged == undisturbed[1].diverged


def test_metrics_are_given_before_the_state_is_saved(tmp_path, undisturbed):
    """What is saved was told; what was not saved is told again."""
    told, happened = {}, []

    def tell(steps, metrics):
        happened.append(steps)
        told[steps] = np.asarray(metrics.loss)

    def save_when():
        happened.append("saved")
        return True

    saver = Checkpointer(tmp_path)
    options = dict(saver=saver, save_when=save_when, on_metrics=tell, **RUN)

    def interrupt(*_):
        if happened[-1] == 2:
            raise Interrupt

    with pytest.raises(Interrupt):
        train(advance, create_state, on_dispatch=interrupt, **options)
    train(advance, create_state, **options)
    assert happened == [0, "saved", 2, 2, "saved", 4, "saved"]
    same_bits(np.concatenate([told[steps] for steps in (0, 2, 4)]), undisturbed[1].loss)


def test_a_finished_run_is_not_taken_again(tmp_path, undisturbed):
    saver = Checkpointer(tmp_path)
    train(advance, create_state, saver=saver, **RUN)

    def never(_):
        raise AssertionError

    state, history = train(never, create_state, saver=saver, **RUN)
    same_bits(state, undisturbed[0])
    same_bits(history.loss, undisturbed[1].loss)


def test_a_checkpoint_of_another_run_is_not_taken(tmp_path, undisturbed):
    saver = Checkpointer(tmp_path)
    train(advance, lambda: create_state(1), saver=saver, **{**RUN, "name": "other"})
    state, _ = train(advance, create_state, saver=saver, **RUN)
    same_bits(state, undisturbed[0])
    assert saver.newest() == (6, {"name": "run", "steps": 6, "diverged": 0})


def test_stop_when(tmp_path):
    """Asked with the losses so far; a stopped run stays stopped when started again."""
    asked = []

    def stop(loss):
        asked.append(len(loss))
        assert np.all(np.isfinite(loss))
        return len(loss) >= 4

    saver = Checkpointer(tmp_path)
    for _ in range(2):
        state, history = train(advance, create_state, saver=saver, stop_when=stop, **RUN)
        assert state.step == 4 and history.loss.shape == (4,)
    assert asked == [2, 4, 4]
    same_bits(state, dispatch(create_state(), 4)[0])


def poisoned_at(*bad_steps):
    """A run of single-step dispatches, some of whose batches hold a NaN."""
    bad = jnp.array(bad_steps, int)

    @jax.jit
    def advance(state):
        spoil = jnp.where(jnp.any(state.step == bad), jnp.nan, 0)
        return run_steps(STEP, state, DATA._replace(image=DATA.image + spoil), **ONE)

    return advance


ONE = dict(batch_size=10, num_steps=1)


def test_one_divergence_is_survived():
    """The bad step is counted, leaves the state as it was, and the run goes on to its end."""
    options = {**RUN, "steps_per_dispatch": 1}
    state, history = train(poisoned_at(2), create_state, **options)
    assert state.step == 6 and history.diverged == 1
    np.testing.assert_array_equal(np.isfinite(history.loss), np.arange(6) != 2)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(state.params))
    before, _ = train(poisoned_at(), create_state, **{**options, "num_steps": 2})
    spoilt, _ = train(poisoned_at(2), create_state, **{**options, "num_steps": 3})
    same_bits(spoilt, before._replace(step=jnp.int32(3)))


def test_a_divergence_that_recurs_ends_the_run(tmp_path):
    """With the dispatch in which it happens the second time, also after resuming."""
    saver = Checkpointer(tmp_path)
    for _ in range(2):
        state, history = train(
            poisoned_at(1, 3), create_state, saver=saver, **{**RUN, "steps_per_dispatch": 1}
        )
        assert state.step == 4 and history.diverged == 2 and history.loss.shape == (4,)


class Preempting:
    """Asks the run to leave after so many steps."""

    def __init__(self, step):
        self.step = step

    def __call__(self, step):
        return step == self.step


def test_a_preempted_run_saves_and_ends_with_the_same_bits(tmp_path, undisturbed):
    """Saved though nobody asked for it otherwise."""
    saver = Checkpointer(tmp_path)
    options = dict(saver=saver, save_when=lambda: False, **RUN)
    with pytest.raises(Stopped) as stopped:
        train(advance, create_state, preempted=Preempting(4), **options)
    assert stopped.value.step == 4 and saver.newest()[1]["steps"] == 4
    told = []
    state, history = train(
        advance, create_state, on_dispatch=lambda _, steps: told.append(steps), **options
    )
    assert told == [4, 2]
    same_bits(state, undisturbed[0])
    same_bits(history.loss, undisturbed[1].loss)


def stream_of(opened):
    """Batches that depend on the step alone; notes where it was opened."""

    def open_stream(step):
        opened.append(step)
        while True:
            yield examples(8, seed=step)
            step += 1

    return open_stream


def test_streamed_steps(tmp_path):
    """Equal to the steps one by one, mean losses; resumed at the step of the checkpoint."""
    step = jax.jit(STEP)
    expected, losses = create_state(), []
    for index in range(6):
        expected, metrics = step(expected, examples(8, seed=index))
        losses.append(metrics.loss)
    opened, saver = [], Checkpointer(tmp_path)
    options = dict(saver=saver, losses_per_dispatch=1, **RUN)

    def fresh():
        return streamed(step, stream_of(opened), num_steps=2)

    with pytest.raises(Stopped):
        train(fresh(), create_state, preempted=Preempting(2), **options)
    state, history = train(fresh(), create_state, **options)
    assert opened == [0, 2]
    same_bits(state, expected)
    np.testing.assert_allclose(history.loss, np.reshape(losses, (3, 2)).mean(1), rtol=1e-6)


def test_streamed_steps_count_every_divergence():
    def open_stream(step):
        while True:
            yield examples(8)._replace(image=np.full((8, 3), np.nan, np.float32))

    advance = streamed(jax.jit(STEP), open_stream, num_steps=3)
    _, metrics = advance(create_state())
    assert metrics.diverged.sum() == 3 and metrics.loss.shape == (1,)


def test_what_is_observed_of_each_step():
    """Stacked by scanned and by streamed steps alike: those of steps one by one."""

    def observe(params, grads, new_params):
        return {"moved": new_params["w"] - params["w"], "gradient": jnp.sum(grads["w"] ** 2)}

    step = make_train_step(model, OPTIMIZER, observe=observe)
    state, one_by_one = create_state(), []
    for index in range(3):
        new, metrics = jax.jit(step)(state, examples(8, seed=index))
        np.testing.assert_array_equal(
            metrics.observed["moved"], new.params["w"] - state.params["w"]
        )
        one_by_one.append(metrics)
        state = new
    _, streaming = streamed(jax.jit(step), stream_of([]), num_steps=3)(create_state())
    observed = jax.tree.map(lambda *leaves: np.stack(leaves), *(m.observed for m in one_by_one))
    assert observed["moved"].shape == (3, 3, 4) and streaming.loss.shape == (1,)
    same_bits(streaming.observed, observed)
    scan = functools.partial(run_steps, step, examples=DATA, batch_size=4)
    whole = jax.jit(functools.partial(scan, num_steps=3))(create_state())[1].observed
    one, state, parts = jax.jit(functools.partial(scan, num_steps=1)), create_state(), []
    for _ in range(3):
        state, metrics = one(state)
        parts.append(metrics.observed)
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, whole, joined)


@pytest.mark.parametrize(("num_steps", "length"), [(0, 2), (-2, 2), (5, 2), (1, 2)])
def test_bad_num_steps(num_steps, length):
    options = {**RUN, "num_steps": num_steps, "steps_per_dispatch": length}
    with pytest.raises(ValueError, match=f"num_steps={num_steps} .*steps_per_dispatch={length}"):
        train(advance, create_state, **options)


def test_every_so_many_seconds(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])
    is_due, always = every(10.0), every(0.0)
    found = []
    for clock[0] in (105.0, 109.9, 110.0, 110.1, 119.9, 135.0, 136.0):
        found.append(is_due())
        assert always()
    assert found == [False, False, True, False, False, True, False]
