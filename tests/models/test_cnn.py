"""`CNN`: shapes, placement of BN, what it sows, against a network written out by hand."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_research.layers.linen import BatchNorm
from bn_research.models.cnn import CNN
from bn_research.models.initializers import kernel_initializer

SPEC = "c4 P c5k5 P c6 c3 P f8 f7 f10"  # seven weight layers; 8×8 images
NORM = functools.partial(BatchNorm, epsilon=1e-3)


def images(shape=(4, 8, 8, 2), seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture(scope="module")
def trained():
    """Variables of SPEC with BN on every layer, drawn in numpy; variances are positive."""
    net, rng = CNN(SPEC, NORM, "all"), np.random.default_rng(1)

    def draw(leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        return noise / np.sqrt(noise[..., 0].size) if noise.ndim > 1 else 1 + np.abs(noise) / 4

    init = functools.partial(net.init, train=False)
    return jax.tree.map(draw, jax.eval_shape(init, jax.random.key(0), images()))


def test_default_network_by_hand():
    """Weights and biases of c64 P c128 P c256 c256 P f512 f512 f10 on 32×32×3.

    3·3·3·64 + 64 = 1,792            3·3·64·128 + 128 = 73,856
    3·3·128·256 + 256 = 295,168      3·3·256·256 + 256 = 590,080
    4·4·256·512 + 512 = 2,097,664    512·512 + 512 = 262,656    512·10 + 10 = 5,130
    """
    x = jnp.zeros((1, 32, 32, 3))
    init = functools.partial(CNN().init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), x)["params"]
    counts = [
        sum(leaf.size for leaf in jax.tree.leaves(params[name]))
        for name in ("conv1", "conv2", "conv3", "conv4", "dense5", "dense6", "dense7")
    ]
    assert counts == [1792, 73856, 295168, 590080, 2097664, 262656, 5130]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 3326346
    run = functools.partial(CNN(norm=NORM, placement="all").init_with_output, train=False)
    assert jax.eval_shape(run, jax.random.key(0), x)[0].shape == (1, 10)


@pytest.mark.parametrize(
    ("placement", "numbers"),
    [("none", []), ("last", [7]), ("all", [1, 2, 3, 4, 5, 6, 7]), (1, [1]), (4, [4]), (7, [7])],
)
def test_placement(placement, numbers):
    net = CNN(SPEC, NORM, placement)
    variables = jax.eval_shape(
        functools.partial(net.init, train=False), jax.random.key(0), images()
    )
    names = {f"batch_norm{number}" for number in numbers}
    assert set(variables.get("batch_stats", {})) == names
    assert {name for name in variables["params"] if name.startswith("batch")} == names
    widths = dict(zip(range(1, 8), (4, 5, 6, 3, 8, 7, 10), strict=True))
    for number in numbers:
        assert variables["params"][f"batch_norm{number}"]["scale"].shape == (widths[number],)


def test_use_bias_and_initializer():
    net = CNN("c4 f3", use_bias=False, kernel_init=nn.initializers.constant(0.5))
    params = net.init(jax.random.key(0), images(), train=False)["params"]
    assert all(set(layer) == {"kernel"} for layer in params.values())
    assert all(np.all(layer["kernel"] == 0.5) for layer in params.values())


def test_the_head_may_have_an_initializer_of_its_own():
    net = CNN("c4 f5 f3", kernel_init=nn.initializers.ones, head_init=nn.initializers.zeros)
    params = net.init(jax.random.key(0), images(), train=False)["params"]
    kernels = {name: np.unique(layer["kernel"]).tolist() for name, layer in params.items()}
    assert kernels == {"conv1": [1], "dense2": [1], "dense3": [0]}


def test_logits_do_not_depend_on_other_examples_in_evaluation(trained):
    """Not a bit, whatever the others are."""
    x = images()
    apply = jax.jit(lambda x: CNN(SPEC, NORM, "all").apply(trained, x, train=False))
    others = x.at[1:].set(jnp.array([np.nan, 1e6, 0])[:, None, None, None])
    np.testing.assert_array_equal(apply(x)[0], apply(others)[0])
    assert np.all(np.isfinite(apply(x)))


def by_hand(variables, x, placement, train, drop=lambda x, number, place: x):
    """The network written out: weights → BN → relu, pooling between; its pre-activations.

    drop(x, layer, place) is called "before" BN and "after" the relu of each hidden layer.
    """
    params, sown = variables["params"], {}
    tokens, number = SPEC.split(), 0
    for token in tokens:
        if token == "P":
            batch, height, width, channels = x.shape
            x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))
            continue
        number += 1
        if token[0] == "c":
            layer = params[f"conv{number}"]
            x = jax.lax.conv_general_dilated(
                x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        else:
            layer = params[f"dense{number}"]
            x = x.reshape(len(x), -1) @ layer["kernel"]
        x = np.asarray(x + layer["bias"])
        sown[f"pre_activation_{number}"] = x
        if number < 7:
            x = drop(x, number, "before")
        if placement in ("all", number) or (placement == "last" and number == 7):
            bn = params[f"batch_norm{number}"]
            axes = tuple(range(x.ndim - 1))
            stats = variables["batch_stats"][f"batch_norm{number}"]
            mean, var = (x.mean(axes), x.var(axes)) if train else (stats["mean"], stats["var"])
            x = np.asarray(bn["scale"] * (x - mean) / np.sqrt(var + 1e-3) + bn["bias"])
        if number < 7:
            x = drop(np.maximum(x, 0), number, "after")
    return x, sown


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("placement", ["none", "last", "all", 3])
def test_sown_pre_activations_and_logits(trained, placement, train):
    """Each pre-activation is the layer's output before BN; the activation comes after BN."""
    x = images()
    net = CNN(SPEC, NORM, placement)
    logits, new = jax.jit(
        lambda v, x: net.apply(v, x, train=train, mutable=["intermediates", "batch_stats"])
    )(trained, x)
    expected, sown = by_hand(trained, x, placement, train)
    assert set(new["intermediates"]) == set(sown)
    for name, value in sown.items():
        (got,) = new["intermediates"][name]
        np.testing.assert_allclose(got, value, rtol=1e-3, atol=1e-3, err_msg=name)
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)


def masks(keys, rate):
    """Of `by_hand`: mask/(1 − rate) of layer l from each example's key folded with l."""

    def drop(x, number):
        folded = [jax.random.fold_in(key, number) for key in keys]
        kept = [jax.random.bernoulli(key, 1 - rate, x.shape[1:]) for key in folded]
        return x * np.stack(kept) / (1 - rate)

    return drop


@pytest.mark.parametrize(
    ("dropout_placement", "where"),
    [
        ("before", {(number, "before") for number in range(1, 7)}),
        ("after", {(number, "after") for number in range(1, 7)}),
        ("last", {(6, "after")}),
    ],
)
def test_dropout_in_training(trained, dropout_placement, where):
    """Whole pre-activations are sown; BN, where dropout is before it, sees what is left of them."""
    x, keys, rate = images(), jax.random.split(jax.random.key(3), 4), 0.3

    @jax.jit
    def run(variables, x, rate):
        net = CNN(SPEC, NORM, "all", dropout=rate, dropout_placement=dropout_placement)
        mutable = ["intermediates", "batch_stats"]
        return net.apply(variables, x, train=True, keys=keys, mutable=mutable)

    logits, new = run(trained, x, rate)
    undropped, _ = run(trained, x, 0.0)
    drop = masks(keys, rate)
    expected, sown = by_hand(
        trained,
        x,
        "all",
        True,
        lambda x, number, place: drop(x, number) if (number, place) in where else x,
    )
    assert set(new["intermediates"]) == set(sown)
    for name, value in sown.items():
        (got,) = new["intermediates"][name]
        np.testing.assert_allclose(got, value, rtol=1e-3, atol=1e-3, err_msg=name)
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=2e-3)
    whole, _ = by_hand(trained, x, "all", True)
    np.testing.assert_allclose(undropped, whole, rtol=1e-3, atol=2e-3)
    assert np.abs(whole - expected).max() > 0.1


def test_without_dropout_nothing_changes(trained):
    """Not a bit, of variables, logits or moments: keys alone, and a rate in evaluation."""
    x, keys = images(), jax.random.split(jax.random.key(3), 4)
    plain, dropped = CNN("c4 P f5 f3", NORM, "all"), CNN("c4 P f5 f3", NORM, "all", dropout=0.4)
    variables = plain.init(jax.random.key(0), x, train=False)
    jax.tree.map(
        np.testing.assert_array_equal, variables, dropped.init(jax.random.key(0), x, train=False)
    )
    mutable = ["intermediates", "batch_stats"]

    def apply(net, train, **options):
        run = functools.partial(net.apply, train=train, mutable=mutable, **options)
        return jax.jit(run)(variables, x)

    jax.tree.map(np.testing.assert_array_equal, apply(plain, True), apply(plain, True, keys=keys))
    evaluated = apply(plain, False)
    jax.tree.map(np.testing.assert_array_equal, evaluated, apply(dropped, False, keys=keys))


def test_without_bn_dropout_before_a_relu_is_dropout_after_it():
    x, keys = images(), jax.random.split(jax.random.key(3), 4)
    nets = [CNN("f6 f5 f3", dropout=0.4, dropout_placement=place) for place in ("before", "after")]
    variables = nets[0].init(jax.random.key(0), x, train=False)
    before, after = (net.apply(variables, x, train=True, keys=keys) for net in nets)
    np.testing.assert_array_equal(before, after)


def test_activation_is_the_one_given():
    x = images((2, 3))
    net = CNN("f4 f2", activation=jnp.tanh)
    logits, variables = net.init_with_output(jax.random.key(0), x, train=False)
    first, second = (variables["params"][name]["kernel"] for name in ("dense1", "dense2"))
    np.testing.assert_allclose(logits, np.tanh(x @ first) @ second, rtol=1e-4, atol=1e-6)


def test_one_program_serves_every_traced_initialization():
    """The initializer's width may be traced through `init`."""
    net = functools.partial(CNN, "c4 f3")
    init = jax.jit(
        lambda a: net(kernel_init=kernel_initializer("uniform", a=a)).init(
            jax.random.key(0), images(), train=False
        )
    )
    small, large = init(1e-3), init(1e-1)
    kernel = small["params"]["conv1"]["kernel"]
    assert np.abs(kernel).max() <= 1e-3
    np.testing.assert_allclose(large["params"]["conv1"]["kernel"], 100 * kernel, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "x", "message"),
    [
        (dict(spec="c4 P P P P f3"), images(), "'c4 P P P P f3' pools images that are only 1×1"),
        (dict(spec="P f3"), images((1, 4, 1, 2)), "only 4×1.*remove a P or use larger images"),
        (dict(placement="first"), images(), "placement='first' is unknown: allowed are none, last"),
        (dict(placement=8, norm=NORM, spec=SPEC), images(), "placement=8.*layer, 1 to 7"),
        (dict(placement=0, norm=NORM, spec=SPEC), images(), "placement=0 is unknown"),
        (dict(placement=True, norm=NORM), images(), "placement=True is unknown"),
        (dict(placement=1), images(), "placement=1 needs norm"),
        (dict(placement="all"), images(), "placement='all' needs norm"),
        (dict(placement="last"), images(), "placement='last' needs norm"),
        (dict(spec="c4"), images(), "does not end in a dense layer"),
        (dict(dropout_placement="first"), images(), "placement='first' is unknown.*before, after"),
        (dict(dropout=1.0), images(), r"dropout=1.0 is not allowed: it must be in \[0, 1\)"),
    ],
)
def test_errors(options, x, message):
    with pytest.raises(ValueError, match=message):
        CNN(**options).init(jax.random.key(0), x, train=False)


@pytest.mark.parametrize(
    ("keys", "message"),
    [(None, "dropout=0.4 needs keys in training"), (3, r"one for each example is \(4,\)")],
)
def test_errors_of_dropout_in_training(keys, message):
    if keys is not None:
        keys = jax.random.split(jax.random.key(0), keys)
    with pytest.raises(ValueError, match=message):
        CNN("f4 f3", dropout=0.4).init(jax.random.key(0), images(), train=True, keys=keys)
