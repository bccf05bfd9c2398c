"""One step under jit, pmap and shard_map on 1 to 8 devices: the same numbers, few collectives."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bn_research.layers.linen import BatchNorm
from bn_research.training.parallel import MODES, create_parallel
from bn_research.training.state import create_train_state
from bn_research.training.step import Batch, make_eval_step, make_train_step

BATCH = 16
COLLECTIVE = re.compile(
    r" (?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


class Network(nn.Module):
    """Dense layers with BN, over six positions of each example, and a dense head."""

    layers: int = 1
    axis_name: str | None = None
    group_size: int | None = None

    @nn.compact
    def __call__(self, x, *, train, keys=None):
        norm = functools.partial(
            BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            axis_name=self.axis_name,
            group_size=self.group_size,
        )
        for _ in range(self.layers):
            x = nn.relu(norm()(nn.Dense(6, use_bias=False)(x)))
        x = jnp.mean(x, axis=(1, 2))
        if keys is not None:
            x *= jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, x.shape[1:]))(keys)
        return nn.Dense(5)(x)


def examples(seed=0):
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((BATCH, 3, 2, 4)).astype(np.float32)
    return Batch(image, rng.integers(0, 5, BATCH).astype(np.int32))


OPTIMIZER = optax.sgd(0.1, momentum=0.9)


@functools.cache
def initial_state(layers):
    """No parameter is zero: the change of one that is, a gradient that cancels, is all rounding."""
    key = jax.random.key(3)
    sample = jnp.zeros((1, 3, 2, 4))
    state = jax.jit(
        lambda: create_train_state(
            lambda key: Network(layers).init(key, sample, train=False), OPTIMIZER, key
        )
    )()
    rng = np.random.default_rng(4)
    away = jax.tree.map(lambda p: p + rng.normal(size=p.shape).astype(p.dtype), state.params)
    return state._replace(params=away)


def build(mode, devices, *, group_size=None, accumulated=None, stochastic=False, layers=1):
    """The mapped step, a state and a batch on so many devices."""
    assert jax.device_count() == 8
    parallel = create_parallel(mode, jax.devices()[:devices])
    model = Network(layers, parallel.axis_name, group_size)

    def apply_fn(variables, images, *, train, keys=None):
        logits, new = model.apply(
            variables, images, train=train, keys=keys, mutable=["batch_stats"]
        )
        return logits, new["batch_stats"]

    state = initial_state(layers)
    step = make_train_step(
        apply_fn,
        OPTIMIZER,
        axis_name=parallel.axis_name,
        accumulated_statistics=accumulated,
        stochastic=stochastic,
    )
    batch, axis = examples(), 0
    if jax.config.jax_enable_x64:
        wide = jax.tree.map(jnp.float64, (state.params, state.batch_stats))
        state = state._replace(
            params=wide[0], batch_stats=wide[1], opt_state=OPTIMIZER.init(wide[0])
        )
        batch = batch._replace(image=batch.image.astype(np.float64))
    if accumulated:
        batch = jax.tree.map(lambda leaf: leaf.reshape(4, -1, *leaf.shape[1:]), batch)
        axis = 1
    mapped = parallel.map(step, batch_axis=axis)
    return parallel, mapped, parallel.replicate(state), parallel.shard(batch, batch_axis=axis)


def one_step(*args, **options):
    """Params, batch_stats and metrics after a step."""
    _, step, state, batch = build(*args, **options)
    state, metrics = step(state, batch)
    return (state.params, state.batch_stats), metrics


def agree(got, expected, tolerance=1e-6):
    """Relative to the largest number of each leaf."""

    def compare(a, b):
        a, b = (np.asarray(leaf, np.float64) for leaf in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.max(np.abs(b)))

    jax.tree.map(compare, got, expected)


def test_everything_agrees_in_float64():
    """The optimizer's state too, which holds gradients that cancel, after three steps."""
    results = []
    with jax.enable_x64(True):
        for mode, devices in (("jit", 1), ("jit", 8), ("pmap", 8), ("shard_map", 4)):
            _, step, state, batch = build(mode, devices)
            for _ in range(3):
                state, metrics = step(state, batch)
            assert state.params["Dense_0"]["kernel"].dtype == jnp.float64
            results.append(jax.tree.map(np.asarray, (state[1:4], metrics)))
    for result in results[1:]:
        agree(result, results[0], 1e-12)


@functools.cache
def on_one_device(**options):
    return one_step("jit", 1, **options)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("group_size", [None, 2, 4, 8])
@pytest.mark.parametrize("mode", MODES)
def test_modes_and_devices_agree(mode, devices, group_size):
    """Whatever the mode and the number of devices: only the group size sets the numbers."""
    agree(one_step(mode, devices, group_size=group_size), on_one_device(group_size=group_size))


def test_group_sizes_do_not_agree():
    """The control: the comparison above sees a change of the group."""
    with pytest.raises(AssertionError):
        agree(on_one_device(group_size=4), on_one_device(group_size=8))


def count_collectives(step, state, batch):
    return len(COLLECTIVE.findall(step.lower(state, batch).compile().as_text()))


@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
@pytest.mark.parametrize(
    ("devices", "group_size", "most"),
    [
        (8, None, 2 * 2 + 1),
        (8, 8, 2 * 2 + 1),
        (8, 2, 1),  # a group within a device: the gradients' alone
        (4, 2, 1),
        (4, 4, 1),
    ],
)
def test_collectives_of_the_compiled_step(mode, devices, group_size, most):
    """At most two for each BN layer, and one for gradients, metrics and running statistics."""
    _, step, state, batch = build(mode, devices, group_size=group_size, layers=2)
    assert count_collectives(step, state, batch) == most


def test_jit_needs_no_collective_for_groups_within_a_device():
    """The compiler's own are the gradients' and the metrics'."""
    _, step, state, batch = build("jit", 4, group_size=4, layers=2)
    assert 1 <= count_collectives(step, state, batch) <= 3


@pytest.mark.parametrize("mode", MODES)
def test_one_compilation_and_a_donated_state(mode):
    """Steps after the first compile nothing, and the memory of each state is used again."""
    _, step, state, batch = build(mode, 4)
    compiled = []
    listener = lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None  # noqa: E731
    state, _ = step(state, batch)
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        for _ in range(3):
            before = state
            state, _ = step(state, batch)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert compiled == [] and state.step == 4


@pytest.mark.parametrize(
    ("mode", "accumulated"), [("jit", None), ("pmap", None), ("shard_map", "microbatch")]
)
def test_randomness_belongs_to_the_example(mode, accumulated):
    """Masks drawn from the keys of examples: on 1 and on 4 devices the same, each step its own."""
    options = dict(stochastic=True, accumulated=accumulated)
    agree(one_step(mode, 4, **options), on_one_device(**options))
    assert not np.allclose(
        on_one_device(**options)[1].loss, on_one_device(accumulated=accumulated)[1].loss
    )
    parallel, step, state, batch = build(mode, 4, **options)
    later = parallel.replicate(state._replace(step=np.int32(1)))
    later = jax.tree.map(jnp.copy, later)
    losses = [float(step(start, batch)[1].loss) for start in (state, later)]
    assert losses[0] != losses[1]  # the same params and examples, other keys


@pytest.mark.parametrize(("mode", "devices"), [("jit", 1), ("jit", 4), ("pmap", 4)])
def test_accumulation_with_statistics_of_the_microbatch(mode, devices):
    """Four microbatches of 4 equal one batch of 16 whose layers share statistics by fours.

    Its running statistics too: they move once. In float64, as sums are taken in another order.
    """
    with jax.enable_x64(True):
        got = one_step(mode, devices, accumulated="microbatch")
        agree(got, one_step("jit", 1, group_size=4), 1e-12)


@pytest.mark.parametrize(("mode", "devices"), [("jit", 1), ("jit", 4), ("pmap", 4)])
def test_accumulation_with_statistics_of_the_batch(mode, devices):
    """Equals one batch of 16; and is not what microbatches of their own statistics give."""
    with jax.enable_x64(True):
        got = one_step(mode, devices, accumulated="batch")
        agree(got, one_step("jit", 1), 1e-12)
    with pytest.raises(AssertionError):
        agree(got, on_one_device(accumulated="microbatch"))


def test_collectives_of_accumulation():
    """The scan holds two for each layer; nothing is summed twice when the rest is recomputed."""
    named = {}
    for accumulated in (None, "microbatch", "batch"):
        _, step, state, batch = build("shard_map", 4, accumulated=accumulated, layers=2)
        if accumulated == "microbatch":
            assert count_collectives(step, state, batch) == 2 * 2 + 1
        named[accumulated] = str(jax.make_jaxpr(step)(state, batch)).count("= psum")
    assert named["batch"] == named["microbatch"] == named[None] > 2 * 2


def test_a_bad_step_is_not_taken_under_any_mode():
    """A NaN on one device: no device moves, nor do its running statistics."""
    for mode in MODES:
        parallel, step, state, _ = build(mode, 4)
        before = jax.tree.map(np.asarray, state[1:4])
        batch = examples()
        batch.image[-1, 0, 0, 0] = np.nan
        state, metrics = step(state, parallel.shard(batch))
        assert metrics.diverged and state.step == 1
        jax.tree.map(np.testing.assert_array_equal, state[1:4], before)


@pytest.mark.parametrize("mode", MODES)
def test_evaluation(mode):
    """Sums over all devices of the unmasked examples; the state may be used again."""

    def apply_fn(variables, images, *, train):
        assert not train
        return Network().apply(variables, images, train=False), variables["batch_stats"]

    batch = examples()._replace(where=np.arange(BATCH) < 11)
    results = []
    for kind, devices in (("jit", 1), (mode, 8)):
        parallel, _, state, _ = build(kind, devices)
        step = parallel.map(
            make_eval_step(apply_fn, axis_name=parallel.axis_name), donate_state=False
        )
        for _ in range(2):
            metrics = step(state, parallel.shard(batch))
        results.append(metrics)
    agree(results[1], results[0])
    assert results[1].count == 11


def test_auto():
    assert create_parallel("auto", jax.devices()[:1]).mode == "jit"
    assert create_parallel("auto").mode == "pmap" and create_parallel().mesh.size == 8


def test_a_checkpointed_state_has_no_device_axis():
    """What pmap returns is what jit on one device returns: one copy."""
    shapes = [
        jax.tree.map(jnp.shape, one_step(mode, devices)[0])
        for mode, devices in (("pmap", 8), ("jit", 1))
    ]
    assert shapes[0] == shapes[1]


def test_bad_arguments():
    with pytest.raises(ValueError, match="parallel='tpu' is unknown: allowed are auto, jit, pmap"):
        create_parallel("tpu")
    for mode in MODES:
        with pytest.raises(ValueError, match="12 examples does not divide over 8 devices"):
            create_parallel(mode).shard(jax.tree.map(lambda leaf: leaf[:12], examples()))
    with pytest.raises(ValueError, match="accumulated_statistics='group' is not allowed"):
        make_train_step(lambda: None, optax.sgd(0.1), accumulated_statistics="group")
