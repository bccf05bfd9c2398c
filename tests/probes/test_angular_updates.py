"""Tests of angular updates against float64 NumPy, and of the log in a real, interrupted run."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bn_research.layers.linen import BatchNorm
from bn_research.models.mlp import MLP
from bn_research.probes.angular_updates import (
    AngularUpdate,
    ScaleLog,
    angular_update,
    equilibrium_angle,
)
from bn_research.training.checkpoint import Checkpointer
from bn_research.training.loop import run_steps, train
from bn_research.training.parallel import create_parallel
from bn_research.training.state import create_train_state
from bn_research.training.step import Batch, StepMetrics, make_train_step


def turned(angle, length, size=200, seed=0, stretch=1.0):
    """A vector and the same turned by an angle and stretched, float64."""
    rng = np.random.default_rng(seed)
    w, v = rng.standard_normal((2, size))
    w *= length / np.linalg.norm(w)
    v -= w * (v @ w) / (w @ w)
    v *= length / np.linalg.norm(v)
    return w, stretch * (math.cos(angle) * w + math.sin(angle) * v)


@pytest.mark.parametrize("angle", [1e-6, 1e-5, 1e-4, 1e-2, 0.3, 1.5, 3.0])
@pytest.mark.parametrize("stretch", [1.0, 0.9, 3.0])
def test_angle_in_float32(angle, stretch):
    """Arccos has nothing left below 3e-4 there, nor have ‖d‖² and ⟨w, d⟩ where decay shrinks w."""
    w, new = turned(angle, 5.0, stretch=stretch)
    tree = {"w": jnp.float32(w)}
    found = angular_update(tree, tree, {"w": jnp.float32(new)}, groups=["['w']"])
    assert found.angle[0] == pytest.approx(angle, rel=2e-6, abs=2e-7)
    assert found.norm[0] == pytest.approx(5, rel=1e-6)
    assert found.gradient_norm[0] == found.norm[0]


def test_without_gradients():
    w, new = ({"w": jnp.float32(v)} for v in turned(0.1, 5.0))
    found = angular_update(w, None, new, groups=["['w']"])
    assert found.gradient_norm is None
    assert found.angle[0] == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("angle", [1e-7, 1e-5, 1e-3])
def test_small_angles_are_not_lost_as_by_arccos(angle):
    with jax.enable_x64(True):
        w, new = turned(angle, 2.0)
        found = angular_update({"w": w}, {"w": w}, {"w": new}, groups=["['w']"])
        assert found.angle[0] == pytest.approx(angle, rel=1e-7)


def test_leaves_of_a_group_are_one_vector():
    w, new = turned(0.2, 3.0, size=60)
    g = np.arange(60.0)

    def tree(v):
        return {"a": {"kernel": v[:40].reshape(8, 5), "bias": v[40:50]}, "b": v[50:]}

    group = ("['a']['kernel']", "['a']['bias']", "['b']")
    with jax.enable_x64(True):
        found = angular_update(tree(w), tree(g), tree(new), groups=[group, "['b']"])
    assert found.angle[0] == pytest.approx(0.2, rel=1e-9)
    cosine = w[50:] @ new[50:] / np.linalg.norm(w[50:]) / np.linalg.norm(new[50:])
    assert found.angle[1] == pytest.approx(math.acos(cosine), rel=1e-9)
    np.testing.assert_allclose(found.norm, [3, np.linalg.norm(w[50:])], rtol=1e-12)
    expected = [np.linalg.norm(g), np.linalg.norm(g[50:])]
    np.testing.assert_allclose(found.gradient_norm, expected, rtol=1e-12)


def test_no_weights_have_no_angle():
    zero = {"w": jnp.zeros(3)}
    found = angular_update(zero, zero, {"w": jnp.ones(3)}, groups=["['w']"])
    assert found.angle[0] == 0 and found.norm[0] == 0


def test_bfloat16_is_summed_in_float32():
    w = jnp.full(1003, 1.0, jnp.bfloat16)
    found = angular_update({"w": w}, {"w": w}, {"w": w}, groups=["['w']"])
    assert found.norm.dtype == jnp.float32
    assert found.norm[0] == pytest.approx(math.sqrt(1003), rel=1e-6)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((), "groups is empty"),
        (["['w']", ()], "empty group"),
        ([("['w']", "['v']")], r"\['v'\].*among \['w'\]"),
    ],
)
def test_groups_that_do_not_exist(groups, message):
    tree = {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match=message):
        angular_update(tree, tree, tree, groups=groups)


@pytest.mark.parametrize(
    "options",
    [
        dict(learning_rate=-1.0, weight_decay=0.1),
        dict(learning_rate=math.nan, weight_decay=0.1),
        dict(learning_rate=0.1, weight_decay=-0.1),
        dict(learning_rate=0.1, weight_decay=0.1, momentum=1.0),
    ],
)
def test_equilibrium_of_bad_settings(options):
    with pytest.raises(ValueError, match="is not allowed"):
        equilibrium_angle(**options)


@pytest.mark.parametrize(("momentum", "product"), [(0.0, 2e-3), (0.9, 1e-3), (0.5, 4e-3)])
def test_equilibrium_of_a_random_walk(momentum, product):
    """Isotropic gradients at right angles to w, of a size 1/‖w‖ as scale invariance has it."""
    rng = np.random.default_rng(0)
    rate, decay = 0.5, product / 0.5
    w, v, angles = rng.standard_normal(400), np.zeros(400), []
    for _ in range(6000):
        g = rng.standard_normal(400)
        g = (g - w * (g @ w) / (w @ w)) / np.linalg.norm(w)
        v = momentum * v + g + decay * w
        new = w - rate * v
        cosine = w @ new / np.linalg.norm(w) / np.linalg.norm(new)
        angles.append(math.acos(min(cosine, 1)))
        w = new
    found = np.sqrt(np.mean(np.square(angles[3000:])))
    assert found == pytest.approx(equilibrium_angle(rate, decay, momentum), rel=0.02)


# --- in training ---

GROUPS = ("['dense1']['kernel']", ("['batch_norm1']['scale']", "['batch_norm1']['bias']"))
RATE, DECAY, MOMENTUM = 0.1, 1e-2, 0.9
STEPS = 4  # of a dispatch


def network():
    model = MLP("f8 f3", functools.partial(BatchNorm, epsilon=0.0), "hidden", use_bias=False)

    def apply_fn(variables, image, *, train):
        logits, new = model.apply(variables, image, train=True, mutable=["batch_stats"])
        return logits, new["batch_stats"]

    optimizer = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE, momentum=MOMENTUM))

    def create():
        shape = (1, 4, 4, 1)
        return create_train_state(
            lambda key: model.init(key, jnp.zeros(shape), train=False),
            optimizer,
            jax.random.key(0),
        )

    key = jax.random.key(1)
    examples = Batch(jax.random.normal(key, (32, 4, 4, 1)), jax.random.randint(key, (32,), 0, 3))
    return apply_fn, optimizer, create, examples


def scale_log(path=None):
    return ScaleLog(GROUPS, learning_rate=RATE, weight_decay=DECAY, momentum=MOMENTUM, path=path)


@functools.cache
def compiled():
    """What the logs below observe is the same, that of GROUPS."""
    apply_fn, optimizer, create, examples = network()
    step = make_train_step(apply_fn, optimizer, observe=scale_log().observe)
    advance = jax.jit(lambda state: run_steps(step, state, examples, batch_size=8, num_steps=STEPS))
    return advance, create


def train_with(log, **options):
    advance, create = compiled()
    return train(
        advance, create, name="x", num_steps=5 * STEPS, steps_per_dispatch=STEPS,
        on_metrics=log, **options,
    )  # fmt: skip


def test_the_log_of_a_run_is_what_its_states_say(tmp_path):
    path = tmp_path / "log" / "scale.jsonl"
    log = scale_log(path)
    train_with(log)
    apply_fn, optimizer, state, examples = network()
    state = state()
    step = make_train_step(apply_fn, optimizer)
    single = jax.jit(lambda state: run_steps(step, state, examples, batch_size=8, num_steps=1)[0])
    for i in range(3):
        new = single(state)
        w, after = (np.float64(s.params["dense1"]["kernel"]).ravel() for s in (state, new))
        unit, unit_after = w / np.linalg.norm(w), after / np.linalg.norm(after)
        angle = 2 * math.asin(np.linalg.norm(unit - unit_after) / 2)
        assert log["angle"][i, 0] == pytest.approx(angle, rel=1e-3)
        assert log["norm"][i, 0] == pytest.approx(np.linalg.norm(w), rel=1e-6)
        assert log["effective_rate"][i, 0] == pytest.approx(RATE / (w @ w), rel=1e-5)
        state = new
    assert log["equilibrium"].shape == (5 * STEPS, 2)
    np.testing.assert_allclose(log["equilibrium"], math.sqrt(2 * RATE * DECAY / 1.9), rtol=1e-7)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(5 * STEPS)) == list(log.steps)
    assert records[0]["group"] == [GROUPS[0], list(GROUPS[1])]
    for field in log.FIELDS:
        written = np.float32([record[field] for record in records])
        np.testing.assert_array_equal(written, log[field])


@pytest.mark.parametrize(("saved", "torn"), [(1, 0), (1, 7), (2, 7), (0, 7)])
def test_the_log_of_an_interrupted_run_ends_the_same(tmp_path, saved, torn):
    """Interrupted in the third dispatch; of those before, the first `saved` have a checkpoint."""
    whole, path = tmp_path / "whole.jsonl", tmp_path / "scale.jsonl"
    train_with(scale_log(whole))
    count = iter(range(100))

    class Killed(Exception):
        pass

    def kill(state, steps):
        if next(count) == 2:
            raise Killed

    saver = Checkpointer(tmp_path / "checkpoints")
    dispatches = iter(range(100))
    options = dict(saver=saver, save_when=lambda: next(dispatches) < saved)
    with pytest.raises(Killed):
        train_with(scale_log(path), on_dispatch=kill, **options)
    saver.close()
    if torn:
        path.write_bytes(path.read_bytes()[:-torn])
    log = scale_log(path)
    saver = Checkpointer(tmp_path / "checkpoints")
    train_with(log, saver=saver)
    saver.close()
    assert path.read_text() == whole.read_text()
    assert list(log.steps) == list(range(5 * STEPS))
    records = [json.loads(line)["norm"] for line in whole.read_text().splitlines()]
    np.testing.assert_array_equal(np.float32(records), log["norm"])


def metrics(norm, angle):
    """What a dispatch reports, [steps, groups] each."""
    observed = AngularUpdate(jnp.float32(norm), None, jnp.float32(angle))
    return StepMetrics(jnp.zeros(len(norm)), jnp.zeros(len(norm)), jnp.zeros(len(norm)), observed)


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_log_that_is_told_steps_again_takes_them_back(tmp_path, on_disk):
    path = tmp_path / "log.jsonl" if on_disk else None
    log = ScaleLog(["a%d"], learning_rate=1.0, weight_decay=0.5, path=path)
    log(0, metrics([[1.0], [2.0], [3.0]], [[0.1], [0.2], [0.3]]))
    log(3, metrics([[4.0]], [[0.4]]))
    log(2, metrics([[5.0]], [[0.5]]))
    np.testing.assert_array_equal(log.steps, [0, 1, 2])
    np.testing.assert_array_equal(log["norm"], [[1], [2], [5]])
    np.testing.assert_allclose(log["effective_rate"], [[1], [0.25], [0.04]], rtol=1e-7)
    np.testing.assert_allclose(log["equilibrium"], 1)
    if path is not None:
        records = [json.loads(line) for line in path.open()]
        assert [record["norm"] for record in records] == [[1.0], [2.0], [5.0]]
        assert records[0]["group"] == ["a%d"]


def test_a_log_begun_in_the_middle_goes_on(tmp_path):
    """Its lines are not counted: they say which step they are of."""
    path = tmp_path / "log.jsonl"
    for steps in (10, 12, 11):
        log = ScaleLog(["a"], learning_rate=1.0, weight_decay=0.5, path=path)
        log(steps, metrics([[steps], [steps]], [[0.1], [0.1]]))
    np.testing.assert_array_equal(log.steps, [10, 11, 12])
    np.testing.assert_array_equal(log["norm"], [[10], [11], [11]])


def test_a_log_with_nothing_left_to_log_is_that_of_the_file(tmp_path):
    """As of a run that was stopped after its last step."""
    path = tmp_path / "log.jsonl"
    assert not ScaleLog(["a"], learning_rate=1.0, weight_decay=0.5, path=path).steps.size
    ScaleLog(["a"], learning_rate=1.0, weight_decay=0.5, path=path)(
        0, metrics([[1], [2]], [[0.1]] * 2)
    )
    log = ScaleLog(["a"], learning_rate=1.0, weight_decay=0.5, path=path)
    np.testing.assert_array_equal(log["norm"], [[1], [2]])
    log(2, metrics([[3]], [[0.1]]))
    np.testing.assert_array_equal(log.steps, [0, 1, 2])


def test_a_line_cut_short_is_dropped(tmp_path):
    """The first after a checkpoint, by a kill; or one of before it, by a crash of the system."""
    path = tmp_path / "log.jsonl"
    for steps in (2, 3):
        log = ScaleLog(["a"], learning_rate=1.0, weight_decay=0.5, path=path)
        log(0, metrics([[1], [2], [3]], [[0.1]] * 3))
        path.write_bytes(path.read_bytes()[:-7])
        log = ScaleLog(["a"], learning_rate=1.0, weight_decay=0.5, path=path)
        log(steps, metrics([[4]], [[0.1]]))
        np.testing.assert_array_equal(log.steps, [0, 1, steps])
        assert [json.loads(line)["norm"] for line in path.open()] == [[1], [2], [4]]


def test_a_log_of_other_groups_is_not_continued(tmp_path):
    path = tmp_path / "log.jsonl"
    ScaleLog(["a"], learning_rate=1.0, weight_decay=0.5, path=path)(0, metrics([[1]], [[1]]))
    other = ScaleLog(["b"], learning_rate=1.0, weight_decay=0.5, path=path)
    with pytest.raises(ValueError, match=r"log of \['a'\], not of \['b'\]"):
        other(1, metrics([[1]], [[1]]))
    other(0, metrics([[2]], [[1]]))  # of another run: nothing of the file is kept
    assert json.loads(path.read_text())["norm"] == [2]


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_weights_of_zero_have_no_effective_rate(tmp_path):
    path = tmp_path / "log.jsonl"
    for steps in (0, 1):
        log = ScaleLog(["nan", "b", "c"], learning_rate=1.0, weight_decay=0.5, path=path)
        log(steps, metrics([[0.0, 1.0, 1e-22]], [[0.0, 0.0, 0.0]]))
    np.testing.assert_array_equal(log["effective_rate"], [[np.nan, 1, np.nan]] * 2)
    records = [json.loads(line) for line in path.open()]
    assert [record["effective_rate"] for record in records] == [[None, 1, None]] * 2
    assert records[0]["group"] == ["nan", "b", "c"]


def test_a_schedule_of_rates():
    """Optax's, whose rate at step i is that of the update from i to i + 1."""
    schedule = optax.join_schedules([optax.linear_schedule(0.1, 0.2, 3), lambda step: 0.05], [4])
    log = ScaleLog(["a"], learning_rate=schedule, weight_decay=DECAY)
    log(2, metrics([[2.0]] * 4, [[0.0]] * 4))
    rate = np.array([0.1 + 0.2 / 3, 0.2, 0.05, 0.05])[:, None]
    np.testing.assert_allclose(log["equilibrium"], np.sqrt(2 * DECAY * rate), rtol=1e-6)
    np.testing.assert_allclose(log["effective_rate"], rate / 4, rtol=1e-6)


@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_devices_observe_the_same(mode):
    assert jax.device_count() > 1
    apply_fn, optimizer, create, examples = network()
    batch = jax.tree.map(lambda leaf: leaf[:8], examples)
    observe = functools.partial(angular_update, groups=GROUPS)
    one = make_train_step(apply_fn, optimizer, observe=observe)
    alone = jax.jit(one)(create(), batch)[1].observed

    model = MLP(
        "f8 f3",
        functools.partial(BatchNorm, epsilon=0.0, axis_name="batch"),
        "hidden",
        use_bias=False,
    )

    def synced(variables, image, *, train):
        logits, new = model.apply(variables, image, train=True, mutable=["batch_stats"])
        return logits, new["batch_stats"]

    parallel = create_parallel(mode, jax.devices()[:2])
    step = parallel.map(
        make_train_step(synced, optimizer, axis_name=parallel.axis_name, observe=observe)
    )
    _, metrics = step(parallel.replicate(create()), parallel.shard(batch))
    for found, expected in zip(metrics.observed, alone, strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_a_step_that_diverged_turns_nothing():
    apply_fn, optimizer, create, examples = network()
    batch = Batch(examples.image[:8].at[0].set(jnp.nan), examples.label[:8])
    observe = functools.partial(angular_update, groups=GROUPS)
    _, metrics = jax.jit(make_train_step(apply_fn, optimizer, observe=observe))(create(), batch)
    assert metrics.diverged and np.all(metrics.observed.angle == 0)


def test_nothing_observed_costs_nothing():
    apply_fn, optimizer, create, examples = network()
    batch = jax.tree.map(lambda leaf: leaf[:8], examples)
    _, metrics = jax.jit(make_train_step(apply_fn, optimizer))(create(), batch)
    assert metrics.observed == ()
