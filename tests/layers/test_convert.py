"""Converted layers against the libraries that they come from: evaluation and further training."""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_research.layers.convert import (
    PortableBatchNorm,
    from_haiku,
    from_keras,
    from_torch,
    to_haiku,
    to_keras,
    to_torch,
)
from bn_research.layers.linen import BatchNorm
from bn_research.normalization import BatchStats, batch_norm, normalize, update_batch_stats

MOMENTUM = 0.7  # ours, far from every default
RATE = 0.1  # of gradient descent in scale and bias
SHAPES = [(6, 3), (4, 3, 2, 3)]


def data(shape, seed):
    """Inputs and weights g of the loss Σ g·y."""
    rng = np.random.default_rng(seed)
    spread = np.linspace(0.5, 2, shape[-1])
    x, g = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    return (x * spread + 1).astype(np.float32), g


def elements(shape):
    return int(np.prod(shape[:-1]))


def descent(run):
    """A step of gradient descent in params, where run(params, state, x) -> y, new state."""

    @jax.jit
    def step(params, state, x, g):
        def loss(params):
            y, new = run(params, state, x)
            return jnp.sum(y * g), (y, new)

        grads, (y, new) = jax.grad(loss, has_aux=True)(params)
        return y, jax.tree.map(lambda p, d: p - RATE * d, params, grads), new

    return step


class Torch:
    """PyTorch's layer, channels second."""

    unbiased = True
    flags = [(True, True), (False, False)]

    def __init__(self, shape, use_scale=True, use_bias=True):
        self.torch = pytest.importorskip("torch")
        options = {"momentum": 1 - MOMENTUM, "eps": 1e-4, "affine": use_scale or use_bias}
        self.make(shape, options)

    def make(self, shape, options):
        kind = {2: self.torch.nn.BatchNorm1d, 4: self.torch.nn.BatchNorm2d}[len(shape)]
        self.layer = kind(shape[-1], **options)

    def run(self, x):
        images = self.layer(self.torch.tensor(np.moveaxis(x, -1, 1)))
        return images.movedim(1, -1)

    def step(self, x, g):
        self.layer.train().zero_grad()
        y = self.run(x)
        if list(self.layer.parameters()):
            (y * self.torch.tensor(g)).sum().backward()
        with self.torch.no_grad():
            for parameter in self.layer.parameters():
                parameter -= RATE * parameter.grad
        return y.detach().numpy()

    def evaluate(self, x):
        self.layer.eval()
        return self.run(x).detach().numpy()

    def stats(self):
        return [v.numpy().copy() for v in (self.layer.running_mean, self.layer.running_var)]

    def portable(self, **options):
        # Parameters, which need gradients, among them.
        entries = dict(self.layer.named_parameters()) | dict(self.layer.named_buffers())
        return from_torch(entries, momentum=self.layer.momentum, eps=self.layer.eps, **options)

    def load(self, layer, shape, **options):
        state_dict, arguments = to_torch(layer, **options)
        self.make(shape, arguments)
        tensors = {name: self.torch.tensor(value) for name, value in state_dict.items()}
        self.layer.load_state_dict(tensors, strict=True)

    def next_momentum(self):
        return MOMENTUM


class Haiku:
    """Haiku's module, within another one."""

    unbiased = False
    flags = [(True, True), (True, False), (False, True), (False, False)]
    name = "net/~/bn"

    def __init__(self, shape, use_scale=True, use_bias=True):
        self.make(dict(create_scale=use_scale, create_offset=use_bias, decay_rate=MOMENTUM))
        self.params, self.state = self.net.init(None, np.ones(shape, np.float32), True)
        self.options.setdefault("eps", 1e-5)

    def make(self, options):
        hk = pytest.importorskip("haiku")

        class Net(hk.Module):
            def __init__(self, name="net"):
                super().__init__(name)
                self.bn = hk.BatchNorm(**options, name="bn")

            def __call__(self, x, is_training):
                return self.bn(x, is_training)

        self.options = options
        self.net = hk.transform_with_state(lambda x, train: Net()(x, train))
        self.compiled = descent(lambda p, state, x: self.net.apply(p, state, None, x, True))

    def step(self, x, g):
        y, self.params, self.state = self.compiled(self.params, self.state, x, g)
        return y

    def evaluate(self, x):
        return self.net.apply(self.params, self.state, None, x, False)[0]

    def stats(self):
        return [
            self.state[f"{self.name}/~/{v}_ema"]["average"].reshape(-1) for v in ("mean", "var")
        ]

    def portable(self):
        rates = {name: self.options[name] for name in ("decay_rate", "eps")}
        return from_haiku(self.params, self.state, name=self.name, **rates)

    def load(self, layer, shape, **options):
        self.params, self.state, arguments = to_haiku(
            layer, ndim=len(shape), name=self.name, **options
        )
        self.make(arguments)

    def next_momentum(self):
        """As the docstring of `from_haiku` has it."""
        t = int(self.state[f"{self.name}/~/mean_ema"]["counter"])
        return MOMENTUM * (1 - MOMENTUM**t) / (1 - MOMENTUM ** (t + 1))


class Keras:
    """Keras's layer, on JAX."""

    unbiased = False
    flags = Haiku.flags

    def __init__(self, shape, use_scale=True, use_bias=True):
        self.make(shape, dict(scale=use_scale, center=use_bias, momentum=MOMENTUM, epsilon=1e-3))

    def make(self, shape, options):
        os.environ["KERAS_BACKEND"] = "jax"
        keras = pytest.importorskip("keras")
        self.layer = keras.layers.BatchNormalization(**options)
        self.layer.build(shape)
        self.options = options
        self.compiled = descent(functools.partial(self.layer.stateless_call, training=True))

    def step(self, x, g):
        variables = self.layer.trainable_variables, self.layer.non_trainable_variables
        y, *new = self.compiled(*([v.value for v in group] for group in variables), x, g)
        for group, values in zip(variables, new, strict=True):
            for variable, value in zip(group, values, strict=True):
                variable.assign(value)
        return y

    def evaluate(self, x):
        return self.layer(x, training=False)

    def stats(self):
        return [np.asarray(v) for v in (self.layer.moving_mean, self.layer.moving_variance)]

    def portable(self):
        return from_keras(self.layer.get_weights(), **self.options)

    def load(self, layer, shape):
        weights, arguments = to_keras(layer)
        self.make(shape, arguments)
        self.layer.set_weights(weights)

    def next_momentum(self):
        return MOMENTUM


PEERS = [Torch, Haiku, Keras]
CASES = [(peer, shape, *flags) for peer in PEERS for shape in SHAPES for flags in peer.flags]


def evaluate(layer, x):
    return BatchNorm(**layer.options).apply(layer.variables, x, True)


@functools.cache
def transform_step(unbiased):
    def run(params, state, x):
        stats, epsilon, momentum = state
        y, moments = batch_norm(x, **params, epsilon=epsilon)
        return y, update_batch_stats(stats, moments, momentum=momentum, unbiased=unbiased)

    return descent(run)


def own_step(layer, x, g, unbiased=False, momentum=None):
    """One step of the pure functions."""
    momentum = layer.momentum if momentum is None else momentum
    state = BatchStats(**layer.batch_stats), layer.epsilon, momentum
    y, params, stats = transform_step(unbiased)(layer.params, state, x, g)
    return y, layer._replace(params=params, batch_stats=stats._asdict())


def linen_step(layer, x):
    """One step of `BatchNorm` with frozen params."""
    y, new = BatchNorm(**layer.options).apply(layer.variables, x, False, mutable=["batch_stats"])
    return y, layer._replace(batch_stats=new["batch_stats"])


def close(got, expected):
    expected = np.asarray(expected)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def close_stats(layer, theirs, factor=1):
    """Means and, up to a factor of ours, variances."""
    mean, var = theirs.stats()
    close(layer.batch_stats["mean"], mean)
    close(layer.batch_stats["var"] * factor, var)


def own_layer(features, use_scale=True, use_bias=True, epsilon=1e-3):
    """A layer of ours in the middle of training."""
    rng = np.random.default_rng(50)
    params = {"scale": rng.uniform(0.5, 2, features), "bias": rng.standard_normal(features)}
    flags = {"scale": use_scale, "bias": use_bias}
    params = {name: jnp.float32(value) for name, value in params.items() if flags[name]}
    stats = {"mean": rng.standard_normal(features), "var": rng.uniform(0.5, 3, features)}
    stats = {name: jnp.float32(value) for name, value in stats.items()}
    return PortableBatchNorm(params, stats, MOMENTUM, epsilon)


@pytest.mark.parametrize(("peer", "shape", "use_scale", "use_bias"), CASES)
def test_from_a_trained_peer(peer, shape, use_scale, use_bias):
    """Three steps there; then ours evaluates alike, and so does a fourth step in both."""
    theirs = peer(shape, use_scale, use_bias)
    for seed in range(3):
        theirs.step(*data(shape, seed))
    ours = theirs.portable()
    assert (ours.options["use_scale"], ours.options["use_bias"]) == (use_scale, use_bias)
    assert ours.momentum == pytest.approx(MOMENTUM)
    x, g = data(shape, 10)
    close(evaluate(ours, x), theirs.evaluate(x))

    momentum = theirs.next_momentum()
    y, ours = own_step(ours, x, g, theirs.unbiased, momentum)
    close(y, theirs.step(x, g))
    close_stats(ours, theirs)
    x, _ = data(shape, 11)
    close(evaluate(ours, x), theirs.evaluate(x))


@pytest.mark.parametrize(("peer", "shape", "use_scale", "use_bias"), CASES)
def test_to_a_fresh_peer(peer, shape, use_scale, use_bias):
    """Ours in the middle of training; the peer evaluates alike, and so do two steps in both."""
    ours, theirs = own_layer(shape[-1], use_scale, use_bias), peer(shape)
    theirs.load(ours, shape)
    x, g = data(shape, 12)
    close(theirs.evaluate(x), evaluate(ours, x))
    for seed in (12, 13):
        x, g = data(shape, seed)
        y, ours = own_step(ours, x, g, theirs.unbiased)
        close(theirs.step(x, g), y)
        close_stats(ours, theirs)
    close(theirs.evaluate(x), evaluate(ours, x))
    # And back.
    returned = theirs.portable()
    assert returned.options == pytest.approx(ours.options)
    jax.tree.map(close, dict(returned.variables), dict(ours.variables))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [0, 3])
def test_pytorch_continues_as_linen_up_to_the_factor_of_bessel(shape, steps):
    """With n elements converted, var·n/(n − 1) is PyTorch's at every later step, from the first."""
    theirs, n = Torch(shape), elements(shape)
    for seed in range(steps):
        theirs.step(*data(shape, seed))
    ours = theirs.portable(elements=n)
    if not steps:
        np.testing.assert_allclose(ours.batch_stats["var"], (n - 1) / n, rtol=1e-6)
    for seed in range(10, 15):
        x, g = data(shape, seed)
        y, ours = linen_step(ours, x)
        close(theirs.step(x, 0 * g), y)
        close_stats(ours, theirs, n / (n - 1))


def test_pytorch_started_from_one_instead_differs_by_what_the_docstring_says():
    shape, steps = SHAPES[0], 4
    theirs, n = Torch(shape), elements(shape)
    ours = theirs.portable()  # var of 1
    for seed in range(steps):
        x, g = data(shape, seed)
        theirs.step(x, g)
        ours = linen_step(ours, x)[1]
    difference = ours.batch_stats["var"] - theirs.stats()[1] * (n - 1) / n
    np.testing.assert_allclose(difference, MOMENTUM**steps / n, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_to_pytorch_with_the_factor_of_bessel(shape):
    ours, theirs, n = own_layer(shape[-1]), Torch(shape), elements(shape)
    theirs.load(ours, shape, elements=n, num_batches_tracked=7)
    assert int(theirs.layer.num_batches_tracked) == 7
    for seed in range(3):
        x, g = data(shape, seed)
        ours = linen_step(ours, x)[1]
        theirs.step(x, 0 * g)
        close_stats(ours, theirs, n / (n - 1))
    returned = theirs.portable(elements=n)
    close(returned.batch_stats["var"], ours.batch_stats["var"])


def test_one_of_scale_and_bias_becomes_both_in_pytorch():
    for name, other, value in (("scale", "bias", 0), ("bias", "weight", 1)):
        layer = own_layer(3, use_scale=name == "scale", use_bias=name == "bias")
        state_dict, options = to_torch(layer)
        assert options["affine"]
        np.testing.assert_array_equal(state_dict[other], np.full(3, value, np.float32))
        theirs, (x, _) = Torch((6, 3)), data((6, 3), 1)
        theirs.load(layer, (6, 3))
        close(theirs.evaluate(x), evaluate(layer, x))


def test_pytorch_without_a_bias():
    """Recent versions have scale alone."""
    layer = from_torch({k: np.ones(3) for k in ("weight", "running_mean", "running_var")})
    assert layer.options == dict(momentum=0.9, epsilon=1e-5, use_scale=True, use_bias=False)


def test_conversion_copies_what_pytorch_will_change_in_place():
    """JAX may share memory with NumPy: `jax.device_put` does where it is aligned."""
    torch = pytest.importorskip("torch")
    source = torch.nn.BatchNorm1d(4096)
    layer = from_torch(source.state_dict())
    source.running_mean += 1
    np.testing.assert_array_equal(layer.batch_stats["mean"], np.zeros(4096))
    exported = to_torch(layer)[0]["running_mean"]
    exported += 1  # writable, and not ours
    np.testing.assert_array_equal(layer.batch_stats["mean"], np.zeros(4096))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_types_of_pytorch_become_float32(dtype):
    torch = pytest.importorskip("torch")
    source = torch.nn.BatchNorm1d(3, dtype=getattr(torch, dtype))
    torch.nn.init.constant_(source.weight, 1.5)
    layer = from_torch(source.state_dict())
    assert {v.dtype for v in jax.tree.leaves(layer.variables)} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(layer.params["scale"], np.full(3, 1.5))
    with jax.enable_x64(True):
        wide = from_torch(source.state_dict())
        expected = "float64" if dtype == "float64" else "float32"
        assert {v.dtype for v in jax.tree.leaves(wide.variables)} == {jnp.dtype(expected)}


def test_haiku_continues_from_a_counter():
    """What Haiku trained goes to ours and back at its counter: all later steps are its own."""
    shape = SHAPES[1]
    theirs = Haiku(shape)
    for seed in range(3):
        theirs.step(*data(shape, seed))
    copy = Haiku(shape)
    copy.load(theirs.portable(), shape, counter=3)
    assert jax.tree.structure((copy.params, copy.state)) == jax.tree.structure(
        (theirs.params, theirs.state)
    )
    jax.tree.map(close, copy.state, theirs.state)
    for seed in range(10, 13):
        x, g = data(shape, seed)
        close(copy.step(x, g), theirs.step(x, g))
        jax.tree.map(close, copy.state, theirs.state)
        close(copy.evaluate(x), theirs.evaluate(x))


def test_linen_continues_haiku_once_its_correction_is_negligible():
    shape = SHAPES[0]
    theirs = Haiku(shape)
    for seed in range(45):  # 0.7⁴⁵ = 1e-7
        theirs.step(*data(shape, seed))
    ours = theirs.portable()
    x, g = data(shape, 50)
    ours = linen_step(ours, x)[1]
    theirs.step(x, g)
    close_stats(ours, theirs)


def test_haiku_with_channels_first():
    hk = pytest.importorskip("haiku")
    net = hk.transform_with_state(
        lambda x, train: hk.BatchNorm(True, True, 0.9, data_format="channels_first")(x, train)
    )
    x = np.moveaxis(data((4, 3, 2, 5), 0)[0], -1, 1)
    params, state = net.init(None, x, True)
    _, state = net.apply(params, state, None, x, True)
    ours = from_haiku(params, state, decay_rate=0.9)
    expected, _ = net.apply(params, state, None, x, False)
    close(BatchNorm(**ours.options, axis=1).apply(ours.variables, x, True), expected)
    back = to_haiku(ours, ndim=4, axis=1, counter=1)
    jax.tree.map(close, back[:2], (params, state))
    assert back[2] == dict(decay_rate=0.9, eps=1e-5, create_scale=True, create_offset=True)


def test_defaults_are_those_of_the_libraries():
    weights = [np.ones(3, np.float32)] * 4
    assert (from_keras(weights).momentum, from_keras(weights).epsilon) == (0.99, 1e-3)
    state_dict = {"running_mean": weights[0], "running_var": weights[0]}
    assert (from_torch(state_dict).momentum, from_torch(state_dict).epsilon) == (0.9, 1e-5)
    ours = PortableBatchNorm({}, {})
    assert (ours.momentum, ours.epsilon) == (BatchNorm().momentum, BatchNorm().epsilon)


def test_by_hand():
    """Names, orders and formulas, without the libraries."""
    one, two, three, four = (np.full(2, v, np.float32) for v in (1, 2, 3, 4))
    entries = dict(weight=one, bias=two, running_mean=three, running_var=four)
    layer = from_torch(entries, momentum=0.25, eps=0.5, elements=5)
    expected = dict(scale=1, bias=2, mean=3, var=4 * 4 / 5)

    def values(layer):
        return {k: float(v[0]) for group in layer[:2] for k, v in group.items()}

    assert values(layer) == pytest.approx(expected)
    assert layer[2:] == (0.75, 0.5)
    state_dict, options = to_torch(layer, elements=5, num_batches_tracked=3)
    assert options == dict(momentum=0.25, eps=0.5, affine=True)
    assert state_dict.pop("num_batches_tracked") == 3
    assert {k: v[0] for k, v in state_dict.items()} == pytest.approx(
        {k: v[0] for k, v in entries.items()}
    )

    layer = from_keras([one, two, three, four])
    assert values(layer) == dict(scale=1, bias=2, mean=3, var=4)
    np.testing.assert_array_equal(to_keras(layer)[0], [one, two, three, four])
    layer = from_keras([two, three, four], scale=False)
    assert values(layer) == dict(bias=2, mean=3, var=4)
    assert to_keras(layer)[1] == dict(momentum=0.99, epsilon=1e-3, center=True, scale=False)

    params, state, _ = to_haiku(layer._replace(momentum=0.5), ndim=3, counter=2, name="bn")
    assert {k: v.shape for k, v in params["bn"].items()} == dict(offset=(1, 1, 2))
    assert list(state) == ["bn/~/mean_ema", "bn/~/var_ema"]
    np.testing.assert_allclose(state["bn/~/var_ema"]["average"], four.reshape(1, 1, 2))
    np.testing.assert_allclose(state["bn/~/var_ema"]["hidden"], 0.75 * four.reshape(1, 1, 2))
    assert state["bn/~/mean_ema"]["counter"].dtype == jnp.int32
    layer = from_haiku(params, state, decay_rate=0.5, eps=0.1, name="bn")
    assert values(layer) == dict(bias=2, mean=3, var=4)
    assert layer[2:] == (0.5, 0.1)


V = np.ones(3, np.float32)
TORCH = dict(running_mean=V, running_var=V)
STATE = {f"batch_norm/~/{v}_ema": {"average": V[None]} for v in ("mean", "var")}
LAYER = PortableBatchNorm({}, {"mean": V, "var": V})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: from_torch({"bn.weight": V}), r"state_dict lacks 'running_mean'.*\['bn.weight'\]"),
        (lambda: from_torch({"running_mean": V}), "state_dict lacks 'running_var'"),
        (lambda: from_torch(TORCH | {"weight": V[:2]}), r"scale has shape \(2,\).*has \(3,\)"),
        (lambda: from_torch(TORCH | {"bias": V[None]}), r"bias has shape \(1, 3\).*has \(3,\)"),
        (lambda: from_torch(TORCH | {"running_var": V[0]}), r"var has shape \(\)"),
        (lambda: from_torch(TORCH | {"weight": np.ones(3, int)}), "scale has dtype int32"),
        (lambda: from_torch(TORCH, momentum=None), "momentum=None, PyTorch's average over all st"),
        (lambda: from_torch(TORCH, momentum=1.7), r"momentum=1.7 is not allowed.*\[0, 1\]"),
        (lambda: from_torch(TORCH, momentum=-0.1), "momentum=-0.1 is not allowed"),
        (lambda: from_torch(TORCH, eps=-1.0), "eps=-1.0 is not allowed"),
        (lambda: from_torch(TORCH, eps=float("nan")), "eps=nan is not allowed"),
        (lambda: from_torch(TORCH, elements=1), "elements=1 is not allowed: it must be at least 2"),
        (lambda: to_torch(LAYER, elements=0), "elements=0 is not allowed"),
        (lambda: to_torch(LAYER._replace(momentum=2.0)), "momentum=2.0 is not allowed"),
        (lambda: to_torch(LAYER._replace(epsilon=-1.0)), "epsilon=-1.0 is not allowed"),
        (
            lambda: to_keras(LAYER._replace(batch_stats={"mean": V})),
            r"batch_stats has the names \['mean'\]: one layer has \['mean', 'var'\]",
        ),
        (
            lambda: to_keras(LAYER._replace(params={"BatchNorm_0": {"scale": V}})),
            r"params has the names \['BatchNorm_0'\]: one layer has \['bias', 'scale'\]",
        ),
        (
            lambda: to_keras(LAYER._replace(batch_stats={"mean": V[None], "var": V[None]})),
            r"mean has shape \(1, 3\): all must have the same, \(features,\)",
        ),
        (lambda: from_haiku({}, {}, decay_rate=0.9), "name='batch_norm': state lacks the average"),
        (
            lambda: from_haiku({}, STATE, decay_rate=0.9, name="bn"),
            r"name='bn'.*'bn/~/mean_ema' .*\['batch_norm/~/mean_ema', 'batch_norm/~/var_ema'\]",
        ),
        (lambda: from_haiku({}, STATE, decay_rate=1.0), r"decay_rate=1.0.*Haiku's.*\[0, 1\)"),
        (lambda: from_haiku({}, STATE, decay_rate=0.9, eps=-1.0), "eps=-1.0 is not allowed"),
        (
            lambda: from_haiku({"batch_norm": {"scale": np.ones((2, 3))}}, STATE, decay_rate=0.9),
            r"scale has shape \(2, 3\): all axes but one",
        ),
        (lambda: to_haiku(LAYER._replace(momentum=1.0), ndim=2), r"momentum=1.0.*\[0, 1\)"),
        (lambda: to_haiku(LAYER, ndim=2, axis=2), "axis=2 is out of range for ndim=2.*-2 to 1"),
        (lambda: to_haiku(LAYER, ndim=2, counter=-1), "counter=-1 is not allowed"),
        (lambda: to_haiku(LAYER, ndim=2, counter=2**31), "counter=2147483648 is not allowed"),
        (lambda: from_keras([V] * 3), "weights has 3 entries.*scale=True and center=True.* have 4"),
        (lambda: from_keras([V] * 7), "weights has 7 entries"),
        (lambda: from_keras([V] * 4, center=False), "center=False it must have 3"),
        (lambda: from_keras([V, V, V, V[:1]]), r"var has shape \(1,\)"),
        (lambda: from_keras([V] * 4, momentum=-1.0), "momentum=-1.0 is not allowed"),
        (lambda: from_keras([V] * 4, epsilon=-1.0), "epsilon=-1.0 is not allowed"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert not re.search("\n", str(raised.value))


CONVERSIONS = {
    "from_torch": lambda scale, bias, mean, var: from_torch(
        dict(weight=scale, bias=bias, running_mean=mean, running_var=var), elements=4
    ),
    "from_haiku": lambda scale, bias, mean, var: from_haiku(
        {"batch_norm": {"scale": scale, "offset": bias}},
        {
            f"batch_norm/~/{name}_ema": {"average": value[None]}
            for name, value in (("mean", mean), ("var", var))
        },
        decay_rate=0.9,
    ),
    "from_keras": lambda *weights: from_keras(weights),
    "to_torch": lambda *vectors: to_torch(layer_of(*vectors), elements=4),
    "to_haiku": lambda *vectors: to_haiku(layer_of(*vectors), ndim=2),
    "to_keras": lambda *vectors: to_keras(layer_of(*vectors)),
}


def layer_of(scale, bias, mean, var):
    return PortableBatchNorm({"scale": scale, "bias": bias}, {"mean": mean, "var": var})


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "-0.5"])
@pytest.mark.parametrize("which", ["scale", "bias", "mean", "var"])
def test_numbers_that_no_layer_has(conversion, which, number):
    """Of any feature, in every direction; a variance of 0, and a negative of the others, is one."""
    vectors = {name: np.array([0.0, 1, 2], np.float32) for name in ("scale", "bias", "mean", "var")}
    convert = CONVERSIONS[conversion]
    convert(*vectors.values())
    vectors[which][2] = float(number)
    if which != "var" and number == "-0.5":
        convert(*vectors.values())
        return
    found = "-0.*" if number == "-0.5" else number  # from_torch has a factor of (n − 1)/n
    message = rf"{which}\[2\] is {found}: allowed are finite numbers, and variances ≥ 0; take"
    with pytest.raises(ValueError, match=message) as raised:
        convert(*vectors.values())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_of_pytorch_that_diverged(dtype):
    """A NaN that PyTorch's own training left in running_var."""
    torch = pytest.importorskip("torch")
    source = torch.nn.BatchNorm1d(3, dtype=getattr(torch, dtype))
    source(torch.tensor([[0.0, 1, float("inf")], [1, 2, 3]], dtype=getattr(torch, dtype)))
    with pytest.raises(ValueError, match=r"mean\[2\] is inf: allowed are finite"):
        from_torch(source.state_dict())
    source.running_mean.zero_()
    with pytest.raises(ValueError, match=r"var\[2\] is nan: allowed are finite"):
        from_torch(source.state_dict())


def test_normalize_takes_the_variables():
    """The neutral form fits the pure functions as well."""
    layer, (x, _) = own_layer(3), data((6, 3), 1)
    y = normalize(x, **layer.batch_stats, **layer.params, epsilon=layer.epsilon)
    close(y, evaluate(layer, x))
