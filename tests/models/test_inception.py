"""`Inception`: the paper's table at full size, by shapes; small copies against numpy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.lib.stride_tricks import sliding_window_view

from bn_research.layers.linen import BatchNorm
from bn_research.models.inception import ConvBlock, Inception, InceptionModule, _avg_pool

# Figure 5 of Ioffe & Szegedy (2015): 1×1, 3×3 reduce, 3×3, double 3×3 reduce, double 3×3, pooling,
# projection; the widths of the outputs as they add up; and height and width for images of 224×224.
TABLE = """
    3a   64  64  64  64  96  avg  32   256 28
    3b   64  64  96  64  96  avg  64   320 28
    3c    0 128 160  64  96  max   0   576 14
    4a  224  64  96  96 128  avg 128   576 14
    4b  192  96 128  96 128  avg 128   576 14
    4c  160 128 160 128 160  avg 128   608 14
    4d   96 128 192 160 192  avg 128   608 14
    4e    0 128 192 192 256  max   0  1056  7
    5a  352 192 320 160 224  avg 128  1024  7
    5b  352 192 320 192 224  max 128  1024  7
"""
ROWS = [
    (name, pool, *map(int, numbers), int(projection), int(width), int(size))
    for name, *numbers, pool, projection, width, size in map(str.split, TABLE.split("\n")[1:-1])
]
NORM = functools.partial(BatchNorm, epsilon=1e-3, momentum=0.9)


def shapes_of(net, shape=(2, 224, 224, 3), outputs_of=(), **options):
    """Logits and variables, `intermediates` of some classes too: nothing is computed."""
    captured = dict(
        mutable=True, capture_intermediates=lambda layer, _: isinstance(layer, outputs_of)
    )
    init = functools.partial(net.init_with_output, **captured, **dict(train=False) | options)
    return jax.eval_shape(init, jax.random.key(0), jnp.zeros(shape))


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def convolutions(width=1.0, channels=3):
    """{block: [(kernel size, inputs, outputs)]}, from the table."""

    def scaled(n):
        return max(1, round(n * width)) if n else 0

    w64, w192 = scaled(64), scaled(192)
    found = {
        "stem_7x7": [(7, channels, w64)],
        "stem_reduce_3x3": [(1, w64, w64)],
        "stem_3x3": [(3, w64, w192)],
    }
    c = w192
    for name, _, *numbers, _, _ in ROWS:
        a, b, d, e, f, p = map(scaled, numbers)
        convs = [(1, c, a), (1, c, b), (3, b, d), (1, c, e), (3, e, f), (3, f, f), (1, c, p)]
        found[f"inception_{name}"] = [conv for conv in convs if conv[2]]
        c = a + d + f + (p or c)
    return found


def weights(convs):
    return sum(k * k * inputs * outputs for k, inputs, outputs in convs)


def features(convs):
    return sum(outputs for _, _, outputs in convs)


def test_full_size_with_bn():
    """A kernel, a scale and a bias in every convolution, and 1024·1000 + 1000 in the head."""
    logits, variables = shapes_of(Inception(norm=NORM), outputs_of=InceptionModule)
    assert logits.shape == (2, 1000)
    for name, *_, width, height in ROWS:
        (output,) = variables["intermediates"][f"inception_{name}"]["__call__"]
        assert output.shape == (2, height, height, width), name
    params = variables["params"]
    assert size(params) == 11_285_224 and size(params["head"]) == 1_025_000
    blocks = convolutions()
    assert set(params) == {*blocks, "head"}
    for name, convs in blocks.items():
        assert size(params[name]) == weights(convs) + 2 * features(convs), name
        assert size(variables["batch_stats"][name]) == 2 * features(convs), name
    layers = {path[:-1] for path in flatten_dict(variables["batch_stats"])}
    convs = {path[:-2] for path in flatten_dict(params) if path[-1] == "kernel"} - {()}
    assert len(layers) == 69 and layers == {(*path, "batch_norm") for path in convs}


def test_full_size_without_norm():
    """No scale and no running statistics; every convolution has a bias instead."""
    net = Inception(num_classes=7, local_response_norm=True)
    logits, variables = shapes_of(net)
    assert logits.shape == (2, 7) and set(variables) == {"params"}
    leaves = [path[-1] for path in flatten_dict(variables["params"])]
    assert leaves.count("kernel") == leaves.count("bias") == 70 and len(leaves) == 140
    convs = sum(convolutions().values(), [])
    assert size(variables) == weights(convs) + features(convs) + 1024 * 7 + 7


def test_half_precision_computes_but_does_not_keep():
    """Activations are bfloat16; parameters, statistics, pooled features and logits float32."""
    net = Inception(norm=NORM, dtype=jnp.bfloat16, local_response_norm=True, separable_stem=True)
    logits, variables = shapes_of(net, outputs_of=(ConvBlock, InceptionModule), train=True)
    outputs = jax.tree.leaves(variables.pop("intermediates"))
    assert len(outputs) == 69 + 10 and {leaf.dtype for leaf in outputs} == {jnp.dtype("bfloat16")}
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((variables, logits))}
    assert set(variables) == {"params", "batch_stats"} and dtypes == {jnp.dtype("float32")}


def test_norm_without_a_dtype_gives_the_bits_of_one_with_it():
    x, kernel = (jnp.asarray(images(shape), jnp.bfloat16) for shape in [(8, 6, 6, 4), (3, 3, 4, 5)])
    params = dict(conv=dict(kernel=kernel), batch_norm=dict(scale=jnp.ones(5), bias=jnp.zeros(5)))
    stats = dict(batch_norm=dict(mean=jnp.zeros(5), var=jnp.ones(5)))
    results = []
    for options in (dict(), dict(dtype=jnp.bfloat16)):
        norm = functools.partial(NORM, use_running_average=False, **options)
        block = ConvBlock(5, 3, norm, jax.nn.relu, jax.nn.initializers.zeros, dtype=jnp.bfloat16)
        run = jax.jit(functools.partial(block.apply, mutable="batch_stats"))
        results.append(run(dict(params=params, batch_stats=stats), x))
    jax.tree.map(np.testing.assert_array_equal, *results)
    mean = results[0][1]["batch_stats"]["batch_norm"]["mean"]
    expected = 0.1 * convolve(np.float64(x), np.float64(kernel)).mean((0, 1, 2))
    np.testing.assert_allclose(mean, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("width", [1 / 64, 0.3, 1e-3])
def test_width_multiplies_every_number_of_channels(width):
    """1/64 makes halves (96 → 1.5, 160 → 2.5), rounded to even; 0 stays 0 and others at least 1."""
    logits, variables = shapes_of(Inception(11, width=width), (1, 32, 47, 2))
    for name, convs in convolutions(width, channels=2).items():
        assert size(variables["params"][name]) == weights(convs) + features(convs), name
    assert logits.shape == (1, 11)


@pytest.mark.parametrize("train", [False, True])
def test_every_norm_layer_is_told_whether_it_trains(train):
    told = []

    def norm(*, name, use_running_average):
        told.append(use_running_average)
        return NORM(name=name, use_running_average=use_running_average)

    shapes_of(Inception(3, norm, width=1 / 64), (2, 32, 32, 3), train=train)
    assert told == [not train] * 69


# The network again, in numpy.


def padded(x, kernel, stride, value):
    """Padding "SAME": the output has ⌈n/stride⌉ pixels, and less is padded before than after."""
    pads = [(0, 0)]
    for n in x.shape[1:3]:
        total = max((-(-n // stride) - 1) * stride + kernel - n, 0)
        pads.append((total // 2, total - total // 2))
    return np.pad(x, [*pads, (0, 0)], constant_values=value)


def windows(x, kernel, stride, value=0.0):
    """[batch, height, width, channels, kernel, kernel]."""
    view = sliding_window_view(padded(x, kernel, stride, value), (kernel, kernel), (1, 2))
    return view[:, ::stride, ::stride]


def convolve(x, kernel, stride=1):
    return np.tensordot(windows(x, len(kernel), stride), kernel, ((4, 5, 3), (0, 1, 2)))


def max_pool(x, stride):
    return windows(x, 3, stride, -np.inf).max((-2, -1))


def avg_pool(x):
    return np.nanmean(windows(x, 3, 1, np.nan), (-2, -1))


def local_response(x):
    """5 channels, k = 2, α = 10⁻⁴, β = 3/4."""
    around = sliding_window_view(np.pad(x**2, [(0, 0)] * 3 + [(2, 2)]), 5, -1)
    return x / (2 + 1e-4 * around.sum(-1)) ** 0.75


def relu(x):
    return np.maximum(x, 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class ByHand:
    """Logits of the network in float64; with BN, `moments` holds each layer's of the batch."""

    per_activation = ""  # name of a module whose BN is

    def __init__(self, params, activation=relu, response=False, mask=1.0):
        self.params, self.activation, self.mask = params, activation, mask
        self.response = local_response if response else lambda x: x
        self.moments = {}

    def block(self, x, stride, *path):
        params = functools.reduce(dict.__getitem__, path, self.params)
        if "depthwise" in params:
            kernel = params["depthwise"]["kernel"]
            filters = kernel.shape[-1] // x.shape[-1]
            parts = [
                convolve(x[..., i : i + 1], kernel[..., i * filters : (i + 1) * filters], stride)
                for i in range(x.shape[-1])
            ]
            x, stride = np.concatenate(parts, -1), 1
        x = convolve(x, params["conv"]["kernel"], stride)
        if "batch_norm" in params:
            axes = (0,) if path[0] == self.per_activation else (0, 1, 2)
            mean, var = self.moments[path] = x.mean(axes), x.var(axes)
            scale, bias = params["batch_norm"]["scale"], params["batch_norm"]["bias"]
            x = scale * (x - mean) / np.sqrt(var + 1e-3) + bias
        else:
            x = x + params["conv"]["bias"]
        return self.activation(x)

    def module(self, x, name, pool, with_1x1, with_projection, stride):
        path = f"inception_{name}"
        parts = [self.block(x, 1, path, "conv_1x1")] if with_1x1 else []
        y = self.block(x, 1, path, "reduce_3x3")
        parts.append(self.block(y, stride, path, "conv_3x3"))
        y = self.block(x, 1, path, "reduce_double_3x3")
        y = self.block(y, 1, path, "double_3x3_1")
        parts.append(self.block(y, stride, path, "double_3x3_2"))
        y = avg_pool(x) if pool == "avg" else max_pool(x, stride)
        parts.append(self.block(y, 1, path, "projection") if with_projection else y)
        return np.concatenate(parts, -1)

    def __call__(self, x):
        x = self.response(max_pool(self.block(x, 2, "stem_7x7"), 2))
        x = self.block(self.block(x, 1, "stem_reduce_3x3"), 1, "stem_3x3")
        x = max_pool(self.response(x), 2)
        for name, pool, *numbers, projection, _, _ in ROWS:
            stride = 2 if name in ("3c", "4e") else 1
            x = self.module(x, name, pool, numbers[0], projection, stride)
        head = self.params["head"]
        return (x.mean((1, 2)) * self.mask) @ head["kernel"] + head["bias"]


def images(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def drawn(net, x, gain=2.0, seed=1):
    """Variables in float64: kernels of variance gain/fan_in, everything else off its default."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        noise = rng.standard_normal(leaf.shape)
        return noise * np.sqrt(gain / noise[..., 0].size) if noise.ndim > 1 else 1 + noise / 4

    init = functools.partial(net.init, train=False)
    return jax.tree.map(draw, jax.eval_shape(init, jax.random.key(0), jnp.zeros(x.shape)))


def close(got, expected, rtol=1e-9):
    np.testing.assert_allclose(got, expected, rtol=0, atol=rtol * np.abs(expected).max())


def test_training_with_bn_and_all_extras():
    """Logits and the running statistics of every layer, new = 0.9·old + 0.1·batch."""
    net = Inception(5, NORM, width=1 / 16, dropout=0.4, local_response_norm=True)
    x, keys = images((3, 40, 56, 3)), jax.random.split(jax.random.key(2), 3)
    variables = drawn(net, x)
    kept = [jax.random.bernoulli(key, 0.6, (64,)) for key in keys]
    with jax.enable_x64(True):
        run = functools.partial(net.apply, train=True, mutable="batch_stats")
        logits, new = jax.jit(lambda v, x: run(v, x, keys=keys))(variables, x)
    reference = ByHand(variables["params"], response=True, mask=np.stack(kept) / 0.6)
    expected = reference(x)
    close(logits, expected)
    assert logits.shape == (3, 5) and np.ptp(expected) > 0.1
    old, new = flatten_dict(variables["batch_stats"]), flatten_dict(new["batch_stats"])
    assert len(reference.moments) == 69 and set(new) == set(old)
    for path, moments in reference.moments.items():
        for leaf, value in zip(("mean", "var"), moments, strict=True):
            at = (*path, "batch_norm", leaf)
            close(new[at], 0.9 * old[at] + 0.1 * value)


def test_gradients_without_norm():
    """Of a network of sigmoids with a separable stem, by central differences in numpy."""
    net = Inception(4, width=1 / 16, activation=jax.nn.sigmoid, separable_stem=True)
    x, g = images((2, 33, 41, 3), 3), images((2, 4), 4)
    params = drawn(net, x, gain=30.0)["params"]
    assert params["stem_7x7"]["depthwise"]["kernel"].shape == (7, 7, 1, 3)  # round(8/16) filters

    flat = flatten_dict(params)
    leaves = [
        ("stem_7x7", "depthwise", "kernel"),
        ("inception_3c", "double_3x3_2", "conv", "kernel"),
        ("inception_4e", "conv_3x3", "conv", "bias"),
        ("inception_5b", "projection", "conv", "kernel"),
        ("head", "bias"),
    ]
    at = {path: flat[path] for path in leaves}

    def loss(at):
        logits = net.apply({"params": unflatten_dict(flat | at)}, x, train=False)
        return jnp.sum(g * logits), logits

    with jax.enable_x64(True):
        gradients, logits = jax.tree.map(np.asarray, jax.jit(jax.grad(loss, has_aux=True))(at))
    close(logits, ByHand(params, sigmoid)(x))
    for path in leaves:
        direction, h = images(flat[path].shape, 5), 1e-5
        plus, minus = (
            ByHand(unflatten_dict(flat | {path: flat[path] + step * direction}), sigmoid)(x)
            for step in (h, -h)
        )
        slope = np.sum(g * (plus - minus)) / (2 * h)
        np.testing.assert_allclose(np.sum(gradients[path] * direction), slope, rtol=1e-6)


def test_average_pooling_in_half_precision_is_rounded_once():
    x = jnp.asarray(1 + np.abs(images((2, 5, 4, 3))), jnp.bfloat16)
    np.testing.assert_allclose(np.float64(_avg_pool(x)), avg_pool(np.float64(x)), rtol=2.01**-8)


class ChosenByHand(ByHand):
    """The network of some modules, behind either stem."""

    def __init__(self, params, stem, modules):
        super().__init__(params, response=True)
        self.stem, self.rows = stem, [row for row in ROWS if row[0] in modules]

    def __call__(self, x):
        x = self.block(x, 1, "stem_3x3") if self.stem == "small" else self.block(x, 2, "stem_7x7")
        x = self.response(max_pool(x, 2))
        if self.stem == "imagenet":
            x = self.block(self.block(x, 1, "stem_reduce_3x3"), 1, "stem_3x3")
            x = max_pool(self.response(x), 2)
        for name, pool, *numbers, projection, _, _ in self.rows:
            x = self.module(x, name, pool, numbers[0], projection, 2 if name == "3c" else 1)
        head = self.params["head"]
        return x.mean((1, 2)) @ head["kernel"] + head["bias"]


@pytest.mark.parametrize(
    ("stem", "modules", "shape", "options"),
    [
        ("small", ("3a", "3c", "5b"), (3, 9, 14, 1), dict()),
        ("small", ("3b", "3c"), (3, 11, 8, 2), dict(implementation="patches")),
        ("imagenet", ("3c",), (3, 34, 23, 2), dict(implementation="patches")),
    ],
)
def test_chosen_modules_and_stem(stem, modules, shape, options):
    """With even and odd heights and widths at the strides, which are padded differently."""
    options = dict(width=1 / 16, stem=stem, modules=modules, local_response_norm=True) | options
    net, x = Inception(4, NORM, **options), images(shape, 6)
    variables = drawn(net, x)
    with jax.enable_x64(True):
        logits, _ = jax.jit(lambda v, x: net.apply(v, x, train=True, mutable="batch_stats"))(
            variables, x
        )
    reference = ChosenByHand(variables["params"], stem, modules)
    close(logits, reference(x))
    assert len(reference.moments) == len(jax.tree.leaves(variables["batch_stats"])) / 2


def test_per_activation_bn_in_the_last_module():
    """Each pixel of each channel has moments, scale and bias of its own there, and only there."""
    net = Inception(
        4,
        NORM,
        width=1 / 16,
        stem="small",
        modules=("3a", "5b"),
        last_norm=functools.partial(NORM, axis=(1, 2, 3)),
    )
    x = images((5, 6, 9, 2), 6)
    variables = drawn(net, x)
    with jax.enable_x64(True):
        logits, new = jax.jit(lambda v, x: net.apply(v, x, train=True, mutable="batch_stats"))(
            variables, x
        )
    reference = ChosenByHand(variables["params"], "small", ("3a", "5b"))
    reference.response, reference.per_activation = (lambda x: x), "inception_5b"
    close(logits, reference(x))
    old, new = flatten_dict(variables["batch_stats"]), flatten_dict(new["batch_stats"])
    assert len(reference.moments) == 1 + 7 + 7
    for path, (mean, _) in reference.moments.items():
        at = (*path, "batch_norm", "mean")
        assert mean.shape[:-1] == ((3, 5) if path[0] == "inception_5b" else ())
        close(new[at], 0.9 * old[at] + 0.1 * mean)


def test_one_program_serves_many_rates_of_dropout():
    """A traced rate gives the numbers of the same rate as a number; a traced 0 drops nothing."""
    net = Inception(4, width=1 / 16, stem="small", modules=("3c",))
    x, keys = images((3, 8, 8, 1)), jax.random.split(jax.random.key(2), 3)
    params = drawn(net, x)["params"]

    def logits(rate, keys=keys):
        return net.clone(dropout=rate).apply({"params": params}, x, train=True, keys=keys)

    traced = jax.jit(logits)
    for rate in (0.1, 0.5):
        close(traced(rate), logits(rate), rtol=1e-5)
        assert np.abs(traced(rate) - traced(0.0)).max() > 1e-2
    close(traced(0.0), logits(0.0, keys=None), rtol=1e-5)
    assert traced._cache_size() == 1
    with pytest.raises(ValueError, match="needs keys in training"):
        jax.eval_shape(functools.partial(logits, keys=None), 0.1)


def test_gradients_of_patches_are_those_of_convolutions():
    """Weights of stride 1 and 2 in float64; the separable convolution stays XLA's."""
    x, g = images((2, 10, 7, 2), 3), images((2, 4), 4)
    results = []
    for implementation in ("xla", "patches"):
        net = Inception(
            4,
            width=1 / 16,
            separable_stem=True,
            stem="small",
            modules=("3c",),
            implementation=implementation,
        )
        params = drawn(net, x)["params"]

        def loss(params, net=net):
            return jnp.sum(g * net.apply({"params": params}, x, train=False))

        with jax.enable_x64(True):
            results.append(flatten_dict(jax.jit(jax.grad(loss))(params)))
    for path, expected in results[0].items():
        close(results[1][path], np.asarray(expected))


def test_all_modules_by_name_are_the_default():
    names = tuple(row[0] for row in ROWS)
    nets = [Inception(norm=NORM, **options) for options in (dict(), dict(modules=names))]
    one, other = (jax.tree.map(lambda leaf: leaf.shape, shapes_of(net)[1]) for net in nets)
    assert one == other


def test_parameters_of_chosen_modules():
    """A module's inputs are what the one before it puts out: 64/4 and (128 + 32 + 96)/4 in all."""
    net = Inception(3, width=1 / 4, stem="small", modules=("3a", "4e"))
    logits, variables = shapes_of(net, (2, 28, 28, 1), outputs_of=InceptionModule)
    params = variables["params"]
    assert set(params) == {"stem_3x3", "inception_3a", "inception_4e", "head"}
    assert params["stem_3x3"]["conv"]["kernel"].shape == (3, 3, 1, 16)
    assert params["inception_3a"]["projection"]["conv"]["kernel"].shape == (1, 1, 16, 8)
    assert params["inception_4e"]["reduce_3x3"]["conv"]["kernel"].shape == (1, 1, 64, 32)
    sizes = [
        variables["intermediates"][f"inception_{name}"]["__call__"][0] for name in ("3a", "4e")
    ]
    assert [leaf.shape for leaf in sizes] == [(2, 14, 14, 64), (2, 7, 7, 48 + 64 + 64)]
    assert params["head"]["kernel"].shape == (176, 3) and logits.shape == (2, 3)


@pytest.mark.parametrize(
    ("options", "least", "halvings"),
    [
        (dict(), 32, 5),
        (dict(modules=("3a", "3c")), 16, 4),
        (dict(stem="small"), 8, 3),
        (dict(stem="small", modules=("3a", "3b", "4e")), 4, 2),
        (dict(stem="small", modules=("5a",)), 2, 1),
    ],
)
def test_smallest_images(options, least, halvings):
    net = Inception(3, width=1 / 64, **options)
    logits, _ = shapes_of(net, (1, least, least + 1, 1))
    assert logits.shape == (1, 3)
    message = (
        f"{least - 1}×{least}: allowed are {least}×{least} and up, as .* halved {halvings} times"
    )
    with pytest.raises(ValueError, match=message):
        shapes_of(net, (1, least - 1, least, 1))


X = jnp.zeros((2, 32, 32, 3))


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        (dict(), dict(x=X[:, :31]), "x has images of 31×32: allowed are 32×32 and up"),
        (dict(), dict(x=X[:, :, :8]), "x has images of 32×8: allowed"),
        (dict(), dict(x=X[0]), r"x has shape \(32, 32, 3\): allowed is \(batch, height, width"),
        (dict(), dict(x=X.astype(jnp.uint8)), "x has dtype uint8: scale images to floating point"),
        (dict(width=0.0), dict(), "width=0.0 is not allowed: it must be positive and finite"),
        (dict(width=-1.0), dict(), "width=-1.0 is not allowed"),
        (dict(width=float("nan")), dict(), "width=nan is not allowed"),
        (dict(width=float("inf")), dict(), "width=inf is not allowed"),
        (dict(stem="tiny"), dict(), "stem='tiny' is unknown: allowed are 'imagenet' and 'small'"),
        (
            dict(modules=()),
            dict(),
            r"modules=\(\) is not allowed: it must hold names out of 3a, 3b",
        ),
        (dict(modules=("3a", "6a")), dict(), r"modules=\('3a', '6a'\) is not allowed"),
        (dict(modules=("3a", "3a")), dict(), r"modules=\('3a', '3a'\) is not allowed"),
        (dict(modules=("4a", "3a")), dict(), "in this order, each once and at least one"),
        (dict(implementation="fft"), dict(), "implementation='fft' is unknown"),
        (dict(dropout=1.0), dict(), r"dropout=1.0 is not allowed: it must be in \[0, 1\)"),
        (dict(dropout=0.4), dict(train=True), "dropout=0.4 needs keys in training"),
        (
            dict(dropout=0.4, width=1 / 64),
            dict(train=True, keys=jax.random.split(jax.random.key(0), 3)),
            r"keys has shape \(3,\): one for each example is \(2,\)",
        ),
    ],
)
def test_errors(options, call, message):
    call = dict(x=X, train=False) | call
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda key: Inception(3, **options).init(key, **call), jax.random.key(0))
