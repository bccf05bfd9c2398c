"""What the layers of linen and nnx have in common: against Flax's, and where it is wrong numpy."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from both_layers import APIS, LINEN, NNX, data
from devices import spread

each_api = pytest.mark.parametrize("api", APIS.values(), ids=APIS.keys())


def of_each_api(cases, *only_nnx):
    """Cases of both, and then those of nnx alone."""
    return [(api, *case) for api in APIS.values() for case in cases] + [
        (NNX, *case) for case in only_nnx
    ]


@each_api
def test_mask(api):
    """Statistics of flax with a mask; its unmasked outputs; NaN in masked places does no harm."""
    x, mask = data((8, 4)), np.array([1, 1, 0, 1, 1, 1, 0, 1], bool)[:, None]
    flax, flax_new = api.flax(x, mask)
    own, new = api.own(np.where(mask, x, np.nan), mask)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), new, flax_new)
    np.testing.assert_allclose(own[mask[:, 0]], flax[mask[:, 0]], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(own[~mask[:, 0]], np.zeros((2, 4)))


@each_api
def test_update_by_hand(api):
    """0.99·0 + 0.01·μ and 0.99·1 + 0.01·σ², biased; once per call."""
    x = data((16, 3))
    _, new = api.own(x)
    assert set(new) == {"mean", "var"}
    x = x.astype(np.float64)
    np.testing.assert_allclose(new["mean"], 0.01 * x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(new["var"], 0.99 + 0.01 * x.var(0), rtol=1e-6)


def unpromoted(**options):
    return ("bfloat16", dict(promote_dtype=lambda args, dtype: args, **options), None)


@pytest.mark.parametrize(
    ("api", "x_dtype", "options", "expected"),
    of_each_api(
        [
            ("bfloat16", dict(), {LINEN: "float32", NNX: "float32"}),
            ("bfloat16", dict(param_dtype=jnp.bfloat16), {LINEN: "bfloat16", NNX: "float32"}),
            (
                "bfloat16",
                dict(use_bias=False, use_scale=False),
                {LINEN: "bfloat16", NNX: "float32"},
            ),
            ("float32", dict(dtype=jnp.bfloat16), dict.fromkeys(APIS.values(), "bfloat16")),
            ("float32", dict(dtype=jnp.float16), dict.fromkeys(APIS.values(), "float16")),
            ("float16", dict(dtype=jnp.float32), dict.fromkeys(APIS.values(), "float32")),
        ],
        unpromoted(),
        unpromoted(param_dtype=jnp.bfloat16),
        unpromoted(use_bias=False),
    ),
)
@pytest.mark.parametrize("train", [False, True])
def test_dtype_of_the_output(api, x_dtype, options, expected, train):
    """Flax's: `dtype`, or the promotion of input and parameters; in nnx of the statistics, too.

    The statistics themselves stay in float32.
    """
    x = jnp.asarray(data((4, 3)), x_dtype)
    run = functools.partial(api.own, train=train, **options)
    y, new = jax.eval_shape(run, x)
    theirs, _ = jax.eval_shape(functools.partial(api.flax, train=train, **options), x)
    assert y.dtype == theirs.dtype
    assert expected is None or y.dtype == expected[api]
    assert new["mean"].dtype == new["var"].dtype == jnp.float32


@each_api
def test_statistics_are_a_scan_carry_with_float64_input(api):
    """Flax's change dtype there in linen, and the scan fails; in nnx a warning casts them back."""
    stats = {"mean": jnp.zeros(2), "var": jnp.ones(2)}
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        x = np.random.default_rng(1).standard_normal((3, 8, 2))
        theirs, new = jax.eval_shape(LINEN.flax, x[0])
        assert theirs.dtype == new["mean"].dtype == jnp.float64

        def step(stats, x):
            return api.own(x, stats=stats, momentum=0.5)[::-1]

        stats, y = jax.lax.scan(step, stats, x)
        assert y.dtype == jnp.float64
        assert stats["mean"].dtype == stats["var"].dtype == jnp.float32
        expected = 1 / 8 + x.var(1).T @ [1 / 8, 1 / 4, 1 / 2]
        np.testing.assert_allclose(stats["var"], expected, rtol=1e-5)


@each_api
def test_right_at_a_mean_of_ten_thousand(api):
    """Where flax's one-pass variance has lost every digit: E[x²] and E[x]² are steps of 8."""
    x = (1e4 + np.random.default_rng(2).standard_normal((4096, 2))).astype(np.float32)
    truth = x.astype(np.float64)
    (y, own), (_, flax) = (jax.jit(functools.partial(step, momentum=0.0))(x) for step in api)
    np.testing.assert_allclose(own["var"], truth.var(0), rtol=1e-5)
    expected = (truth - truth.mean(0)) / np.sqrt(truth.var(0) + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert np.all(np.abs(flax["var"] - truth.var(0)) > 0.5 * truth.var(0))


def grouped_step(api, **options):
    """Per device: outputs, gradient of Σ g·y² in x, and the statistics after a step."""

    def run(x, g):
        def loss(x):
            y, new = api.own(x, momentum=0.5, **options)
            return jnp.sum(g * jnp.square(y)), (y, new["mean"], new["var"])

        (_, (y, *stats)), dx = jax.value_and_grad(loss, has_aux=True)(x)
        return y, dx, *stats

    return run


@each_api
@pytest.mark.parametrize("group_size", [None, 2, 4, 8])
def test_groups_do_not_depend_on_the_number_of_devices(api, group_size):
    """Outputs against numpy; all else as on one device; statistics are those of all groups."""
    x = data((16, 3)) + np.arange(16, dtype=np.float32)[:, None]
    g = data((16, 3), 1)
    one = jax.jit(grouped_step(api, group_size=group_size))(x, g)
    groups = x.astype(np.float64).reshape(-1, group_size or 16, 3)
    mean, var = (reduce(groups, 1, keepdims=True) for reduce in (np.mean, np.var))
    expected = (groups - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(one[0], expected.reshape(16, 3), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one[2], 0.5 * mean.mean(0)[0], rtol=1e-5)
    np.testing.assert_allclose(one[3], 0.5 + 0.5 * var.mean(0)[0], rtol=1e-5)
    step = grouped_step(api, group_size=group_size, axis_name="batch")
    for kind, devices in (("vmap", 2), ("shard_map", 8)):
        split = [a.reshape(devices, -1, 3) for a in (x, g)]
        y, dx, *stats = spread(kind, step, devices)(*split)
        np.testing.assert_allclose(np.reshape(y, x.shape), one[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.reshape(dx, x.shape), one[1], rtol=1e-3, atol=1e-4)
        for ours, theirs in zip(stats, one[2:], strict=True):
            np.testing.assert_allclose(np.mean(ours, 0), theirs, rtol=1e-5)


@each_api
def test_groups_of_devices(api):
    """Devices 0, 3 and 1, 2 share; Flax's layer cannot do that under vmap, so against numpy."""
    x = data((4, 4, 3)) + np.arange(4, dtype=np.float32)[:, None, None]
    pairs = [[0, 3], [1, 2]]
    step = grouped_step(api, axis_name="batch", axis_index_groups=pairs)
    y, _, mean, _ = spread("vmap", step)(x, x)
    for pair in pairs:
        group = x[pair].astype(np.float64)
        expected = (group - group.mean((0, 1))) / np.sqrt(group.var((0, 1)) + 1e-5)
        np.testing.assert_allclose(y[np.array(pair)], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(mean[np.array(pair)], [0.5 * group.mean((0, 1))] * 2, rtol=1e-5)


@each_api
def test_group_size_is_not_looked_at_in_evaluation(api):
    x = data((3, 2))
    y, _ = api.own(x, train=False, group_size=2)
    np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)


@pytest.mark.parametrize("train", [False, True])
def test_both_give_the_same_bits(train):
    options = dict(momentum=0.9, epsilon=1e-3, group_size=4, train=train)
    x, mask = data((8, 2, 3)), np.arange(16).reshape(8, 2, 1) % 3 > 0
    params = {"scale": np.float32([1, -2, 3]), "bias": np.float32([0, 1, 2])}
    stats = {"mean": np.float32([0.5, 1, 1.5]), "var": np.ones(3, np.float32)}
    found = [
        jax.jit(functools.partial(api.own, **options))(x, mask, params, stats)
        for api in APIS.values()
    ]
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize(
    ("api", "options", "message"),
    of_each_api(
        [
            (dict(momentum=1.7), r"momentum=1.7 is not allowed: it must lie in \[0, 1\]"),
            (dict(momentum=-0.1), "momentum=-0.1 is not allowed"),
            (dict(epsilon=-1.0), "epsilon=-1.0 is not allowed"),
            (dict(axis=-5), "=-5 is out of range for an array of rank 2: allowed are -2 to 1"),
            (dict(axis=(1, -1)), r"=\(1, -1\) names an axis twice"),
        ],
        (dict(axis=(0, 1)), r"axis=\(0, 1\) is not allowed: num_features is the length of one"),
        (dict(axis=0), r"num_features=3 does not match x of shape \(4, 3\): its axis 0 must be"),
        (dict(axis=0, use_bias=False, use_scale=False), "num_features=3 does not match x"),
        (dict(dtype=jnp.int32), "Dtype must be inexact"),
    ),
)
@pytest.mark.parametrize("train", [False, True])
def test_bad_arguments(api, options, message, train):
    with pytest.raises(ValueError, match=message) as error:
        api.own(data((4, 3)), train=train, **options)
    assert "\n" not in str(error.value)


@each_api
@pytest.mark.parametrize("options", [dict(train=False), dict(frozen=True)])
def test_mask_in_inference(api, options):
    """Masked elements come out as bias, whatever they hold, and have no gradient."""
    x, mask = data((8, 3)), np.arange(8)[:, None] < 5
    dirty = np.where(mask, x, np.float32(np.nan))
    params = {"scale": np.float32([1, 2, -3]), "bias": np.float32([4, 5, 6])}
    stats = {"mean": np.float32([1, 0, -1]), "var": np.float32([2, 1, 0.5])}

    def apply(x):
        return api.own(x, mask, params, stats, **options)[0]

    slope = params["scale"] / np.sqrt(stats["var"] + 1e-5) * mask
    expected = (x - stats["mean"]) * slope + params["bias"]
    np.testing.assert_allclose(apply(dirty), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(lambda x: apply(x).sum())(dirty), slope, rtol=1e-5)


@pytest.mark.parametrize("step", [*LINEN, *NNX], ids=["linen", "flax.linen", "nnx", "flax.nnx"])
def test_variables_cast_to_bfloat16(step):
    """An average in bfloat16 stands still, as that of flax.nnx does.

    At 0.25 of 0.30 and 1.17 of 1.44; 1,000 steps of momentum 0.99.
    """
    x = 0.3 + 1.2 * np.random.default_rng(0).standard_normal((8, 64, 3))
    x = jnp.asarray(x, jnp.bfloat16)
    one, zero = jnp.ones(3, jnp.bfloat16), jnp.zeros(3, jnp.bfloat16)

    def move(stats, x):
        y, new = step(x, params={"scale": one, "bias": zero}, stats=stats)
        return new, y.dtype == jnp.bfloat16

    with warnings.catch_warnings():  # flax.nnx scatters float32 into bfloat16
        warnings.simplefilter("ignore")
        stats, _ = move({"mean": zero, "var": one}, x[-1])
        xs = jnp.tile(x, (125, 1, 1))
        stats, same = jax.jit(lambda stats: jax.lax.scan(move, stats, xs))(stats)
    if step is NNX.flax:
        assert np.all(np.float32(stats["var"]) < 1.3)
        return
    x = np.asarray(x, np.float64)
    assert np.all(same) == (step in LINEN)  # nnx promotes by the statistics, too
    assert stats["mean"].dtype == stats["var"].dtype == jnp.float32
    np.testing.assert_allclose(stats["mean"], x.mean((0, 1)), atol=5e-3)
    np.testing.assert_allclose(stats["var"], x.var(1).mean(0), rtol=1e-2)
