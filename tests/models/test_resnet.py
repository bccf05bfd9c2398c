"""Tests of residual networks: published sizes, and numbers written out in NumPy."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from bn_research.layers.linen import BatchNorm
from bn_research.models.resnet import ResNet, ResNetBlock

IMAGENET = dict(num_classes=1000, width=64, stem="imagenet")


def variables_of(model, size, channels=3):
    x = jnp.zeros((2, size, size, channels))
    return jax.eval_shape(lambda key: model.init(key, x, train=False), jax.random.key(0))


@pytest.mark.parametrize(
    ("stage_sizes", "bottleneck", "count"),
    [
        ((2, 2, 2, 2), False, 11_689_512),
        ((3, 4, 6, 3), False, 21_797_672),
        ((3, 4, 6, 3), True, 25_557_032),
        ((3, 4, 23, 3), True, 44_549_160),
    ],
)
def test_published_sizes(stage_sizes, bottleneck, count):
    """ResNet-18, 34, 50 and 101 as everybody counts them, with 1000 classes."""
    model = ResNet(stage_sizes, norm=BatchNorm, bottleneck=bottleneck, **IMAGENET)
    leaves = jax.tree.leaves(variables_of(model, 224)["params"])
    assert sum(math.prod(leaf.shape) for leaf in leaves) == count


def test_size_of_resnet_20():
    """Stem, 3 stages of 6 convolutions of 9·c² (their first from c/2), projections, BN, head."""
    convs = 27 * 16 + 6 * 9 * 16**2
    norms = 7 * 2 * 16
    for c in (32, 64):
        convs += 9 * (c // 2) * c + 5 * 9 * c**2 + (c // 2) * c
        norms += 7 * 2 * c
    leaves = jax.tree.leaves(variables_of(ResNet(norm=BatchNorm), 32)["params"])
    count = convs + norms + 64 * 10 + 10
    assert sum(math.prod(leaf.shape) for leaf in leaves) == count == 272_474


# --- numbers ---


def windows(x, k, stride, fill=0.0):
    """Padding as XLA's "SAME": what is odd goes below and to the right."""
    n = x.shape[1]
    pad = max((-(-n // stride) - 1) * stride + k - n, 0)
    around = (pad // 2, pad - pad // 2)
    x = np.pad(x, [(0, 0), around, around, (0, 0)], constant_values=fill)
    return np.lib.stride_tricks.sliding_window_view(x, (k, k), (1, 2))[:, ::stride, ::stride]


def conv(x, kernel, stride=1):
    return np.einsum("bhwcij,ijco->bhwo", windows(x, kernel.shape[0], stride), kernel)


def bn(x, layer):
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) / np.sqrt(var + 1e-5) * layer["scale"] + layer["bias"]


def relu(x):
    return np.maximum(x, 0)


def stem(p, x, *, imagenet=False, preactivation=False):
    x = conv(x, p["stem_conv"]["kernel"], 2 if imagenet else 1)
    x = x if preactivation else relu(bn(x, p["stem_norm"]))
    return windows(x, 3, 2, -np.inf).max((-2, -1)) if imagenet else x


def head(p, x, *, preactivation=False):
    x = relu(bn(x, p["final_norm"])) if preactivation else x
    return x.mean((1, 2)) @ p["head"]["kernel"] + p["head"]["bias"]


def branch_v1(q, x, strides):
    *first, last = range(1, len(strides) + 1)
    for n in first:
        x = relu(bn(conv(x, q[f"conv{n}"]["kernel"], strides[n - 1]), q[f"norm{n}"]))
    return bn(conv(x, q[f"conv{last}"]["kernel"], strides[-1]), q[f"norm{last}"])


def branch_v2(q, x, strides):
    for n, stride in enumerate(strides, start=1):
        x = conv(relu(bn(x, q[f"norm{n}"])), q[f"conv{n}"]["kernel"], stride)
    return x


def block_v1(q, x, strides, projects):
    shortcut = x
    if projects:
        shortcut = bn(conv(x, q["shortcut_conv"]["kernel"], max(strides)), q["shortcut_norm"])
    return relu(shortcut + branch_v1(q, x, strides))


def block_v2(q, x, strides, projects):
    shortcut = x
    if projects:
        shortcut = conv(relu(bn(x, q["norm1"])), q["shortcut_conv"]["kernel"], max(strides))
    return shortcut + branch_v2(q, x, strides)


def apply_64(model, params, x, **options):
    """Logits in double precision, in training, and new batch statistics."""
    stats = variables_of(model, x.shape[1])["batch_stats"]
    with jax.enable_x64(True):
        stats = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), stats)
        run = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
        logits, new = run(dict(params=params, batch_stats=stats), x)
        assert logits.dtype == jnp.float64
        return np.asarray(logits), jax.tree.map(np.asarray, new["batch_stats"])


@pytest.mark.parametrize(("bottleneck", "imagenet"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("preactivation", [False, True])
def test_logits_are_those_written_out(bottleneck, preactivation, imagenet):
    options = dict(norm=BatchNorm, bottleneck=bottleneck, preactivation=preactivation)
    model = ResNet((1, 2), 3, 2, stem="imagenet" if imagenet else "cifar", **options)
    rng = np.random.default_rng(0)
    size = 22 if imagenet else 6  # 22 → 11 → 6: the second stage starts from an even size in both
    x = rng.standard_normal((4, size, size, 3))
    shapes = variables_of(model, size)["params"]
    p = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), shapes)
    logits, stats = apply_64(model, p, x)

    block = block_v2 if preactivation else block_v1
    y = stem(p, x, imagenet=imagenet, preactivation=preactivation)
    y = block(p["stage1_block1"], y, (1, 1, 1) if bottleneck else (1, 1), bottleneck)
    y = block(p["stage2_block1"], y, (1, 2, 1) if bottleneck else (2, 1), True)
    y = block(p["stage2_block2"], y, (1, 1, 1) if bottleneck else (1, 1), False)
    expected = head(p, y, preactivation=preactivation)
    np.testing.assert_allclose(logits, expected, rtol=1e-9, atol=1e-9)
    stats = flatten_dict(stats)
    assert all(np.all(value) for value in stats.values())
    norms = {path[:-1] for path in flatten_dict(p) if path[-1] == "scale"}
    assert {path[:-1] for path in stats} == norms


def zeroed(bottleneck, preactivation):
    options = dict(bottleneck=bottleneck, preactivation=preactivation, zero_init_scale=True)
    model = ResNet((2,), 3, 2, norm=BatchNorm, **options)
    x = np.random.default_rng(0).standard_normal((4, 6, 6, 3))
    init = jax.jit(functools.partial(model.init, train=False))
    params = init(jax.random.key(0), jnp.float32(x))["params"]
    return model, jax.tree.map(np.float64, params), x


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("preactivation", [False, True])
def test_branches_of_zeros_pass_the_input_on(bottleneck, preactivation):
    """Blocks are the identity (ReLU's in v1, of what is positive), or a projection where one is."""
    model, p, x = zeroed(bottleneck, preactivation)
    y = stem(p, x, preactivation=preactivation)
    if bottleneck:
        q = p["stage1_block1"]
        if preactivation:
            y = conv(relu(bn(y, q["norm1"])), q["shortcut_conv"]["kernel"])
        else:
            y = relu(bn(conv(y, q["shortcut_conv"]["kernel"]), q["shortcut_norm"]))
    logits, _ = apply_64(model, p, x)
    expected = head(p, y, preactivation=preactivation)
    np.testing.assert_allclose(logits, expected, rtol=1e-9, atol=1e-9)
    silent = ("conv", "kernel") if preactivation else ("norm", "scale")
    last = f"{silent[0]}{3 if bottleneck else 2}"
    zeros = {path for path, leaf in flatten_dict(p).items() if not np.any(leaf)}
    expected = {(f"stage1_block{i}", last, silent[1]) for i in (1, 2)}
    assert {path for path in zeros if path[-1] != "bias"} == expected


@pytest.mark.parametrize("preactivation", [False, True])
def test_branches_of_zeros_can_learn(preactivation):
    """A scale of zero before ReLU and convolution could not: every gradient would be zero."""
    model, p, x = zeroed(False, preactivation)

    def loss(p):
        return jnp.sum(apply(p)[:, 0] ** 2)

    def apply(p):
        stats = jax.tree.map(jnp.zeros_like, variables_of(model, 6)["batch_stats"])
        return model.apply(
            dict(params=p, batch_stats=stats), jnp.float32(x), train=True, mutable=["batch_stats"]
        )[0]

    gradient = jax.jit(jax.grad(loss))(jax.tree.map(jnp.float32, p))
    layer, leaf = ("conv2", "kernel") if preactivation else ("norm2", "scale")
    for i in (1, 2):
        assert np.abs(gradient[f"stage1_block{i}"][layer][leaf]).max() > 1e-3


# --- shapes, dtypes, errors ---


def test_shapes_of_the_stages():
    model = ResNet((1, 1, 1), norm=BatchNorm, width=2, stem="imagenet")
    x = jnp.zeros((2, 64, 64, 3))

    def run(key):
        variables = model.init(key, x, train=False)
        return model.apply(
            variables, x, train=True, mutable=["batch_stats"], capture_intermediates=True
        )

    _, kept = jax.eval_shape(run, jax.random.key(0))
    shapes = {k: v["__call__"][0].shape for k, v in kept["intermediates"].items() if "block" in k}
    expected = [(2, 16, 16, 2), (2, 8, 8, 4), (2, 4, 4, 8)]
    assert [shapes[f"stage{i}_block1"] for i in (1, 2, 3)] == expected


def test_a_block_of_stride_2_projects_though_channels_stay():
    block = ResNetBlock(4, 2, False, False, nn.Conv, None, jax.nn.relu, False)
    y, _ = jax.eval_shape(block.init_with_output, jax.random.key(0), jnp.zeros((2, 7, 8, 4)))
    assert y.shape == (2, 4, 4, 4)


def test_without_norm_convolutions_have_biases():
    params = flatten_dict(variables_of(ResNet((1, 1)), 8)["params"])
    assert not any("norm" in layer for path in params for layer in path)
    assert {path[:-1] for path in params} == {path[:-1] for path in params if path[-1] == "bias"}


def test_bfloat16():
    model = ResNet((1, 1), norm=BatchNorm, width=2, dtype=jnp.bfloat16)
    x = jnp.zeros((2, 8, 8, 3))

    pooled = []

    def intercept(call, args, options, context):
        if context.module.name == "head":
            pooled.append(args[0].dtype)
        return call(*args, **options)

    def run(key):
        variables = model.init(key, x, train=False)
        with nn.intercept_methods(intercept):
            out, new = model.apply(
                variables, x, train=True, mutable=["batch_stats"], capture_intermediates=True
            )
        return out, new, variables["params"]

    logits, new, params = jax.eval_shape(run, jax.random.key(0))
    assert logits.dtype == jnp.float32 and set(pooled) == {jnp.dtype("float32")}
    assert new["intermediates"]["stage2_block1"]["__call__"][0].dtype == jnp.bfloat16
    kept = jax.tree.leaves((params, new["batch_stats"]))
    assert all(leaf.dtype == jnp.float32 for leaf in kept)


@pytest.mark.parametrize(
    ("options", "x", "message"),
    [
        ({}, jnp.zeros((8, 8, 3)), "x has shape"),
        ({}, jnp.zeros((2, 8, 8, 3), int), "x has dtype"),
        (dict(stage_sizes=()), None, "stage_sizes"),
        (dict(stage_sizes=(1, 0)), None, "stage_sizes"),
        (dict(width=0), None, "width=0"),
        (dict(stem="mnist"), None, "stem='mnist' is unknown: allowed are cifar, imagenet"),
        (dict(padding="VALID"), None, "padding='VALID' is unknown: allowed are SAME, torch"),
        (dict(zero_init_scale=True), None, "zero_init_scale=True needs norm"),
    ],
)
def test_bad_input(options, x, message):
    x = jnp.zeros((2, 8, 8, 3)) if x is None else x
    with pytest.raises(ValueError, match=message):
        ResNet(**options).init(jax.random.key(0), x, train=False)


def test_norm_is_asked_for_batch_statistics_in_training_alone():
    asked = []

    def norm(*, use_running_average, name, **options):
        asked.append((name, use_running_average))
        return BatchNorm(use_running_average=use_running_average, name=name, **options)

    model = ResNet((1, 1), norm=norm, width=2)
    names = ["stem_norm", "norm1", "norm2", "norm1", "norm2", "shortcut_norm"]
    for train in (False, True):
        asked.clear()
        init = functools.partial(model.init, train=train)
        jax.eval_shape(init, jax.random.key(0), jnp.zeros((2, 4, 4, 3)))
        assert asked == [(name, not train) for name in names]


# --- PyTorch's networks ---


def torch_resnet(torch, stage_sizes, width, *, bottleneck, imagenet):
    """A residual network with torchvision's layout and names, random in every number."""
    functional = torch.nn.functional

    class Block(torch.nn.Module):
        def __init__(self, inputs, features, stride):
            super().__init__()
            outputs = features * (4 if bottleneck else 1)
            sizes = [(1, 1), (3, stride), (1, 1)] if bottleneck else [(3, stride), (3, 1)]
            self.count = len(sizes)
            for n, (size, step) in enumerate(sizes, start=1):
                after = outputs if n == self.count else features
                before = inputs if n == 1 else features
                conv = torch.nn.Conv2d(before, after, size, step, size // 2, bias=False)
                setattr(self, f"conv{n}", conv)
                setattr(self, f"bn{n}", torch.nn.BatchNorm2d(after))
            self.downsample = None
            if stride != 1 or inputs != outputs:
                self.downsample = torch.nn.Sequential(
                    torch.nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                    torch.nn.BatchNorm2d(outputs),
                )

        def forward(self, x):
            y = x
            for n in range(1, self.count + 1):
                y = getattr(self, f"bn{n}")(getattr(self, f"conv{n}")(y))
                y = functional.relu(y) if n < self.count else y
            return functional.relu(y + (x if self.downsample is None else self.downsample(x)))

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            if imagenet:
                self.conv1 = torch.nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
                self.maxpool = torch.nn.MaxPool2d(3, stride=2, padding=1)
            else:
                self.conv1 = torch.nn.Conv2d(3, width, 3, padding=1, bias=False)
                self.maxpool = torch.nn.Identity()
            self.bn1 = torch.nn.BatchNorm2d(width)
            inputs = width
            for stage, blocks in enumerate(stage_sizes):
                layers = []
                for block in range(blocks):
                    features = width * 2**stage
                    layers.append(Block(inputs, features, 2 if stage and not block else 1))
                    inputs = features * (4 if bottleneck else 1)
                setattr(self, f"layer{stage + 1}", torch.nn.Sequential(*layers))
            self.fc = torch.nn.Linear(inputs, 5)

        def forward(self, x):
            x = self.maxpool(functional.relu(self.bn1(self.conv1(x))))
            for stage in range(len(stage_sizes)):
                x = getattr(self, f"layer{stage + 1}")(x)
            return self.fc(x.mean((2, 3)))

    network = Network().double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith("num_batches_tracked"):
                continue
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var"):
                drawn = drawn.abs() + 0.5
            elif value.ndim > 1:
                drawn *= (2 / value[0].numel()) ** 0.5
            value.copy_(drawn)
    return network


def from_torchvision(state_dict):
    """Variables of a `ResNet` from the names and layouts of torchvision."""
    params, batch_stats = {}, {}
    for name, tensor in state_dict.items():
        *path, leaf = name.split(".")
        if leaf == "num_batches_tracked":
            continue
        value = tensor.detach().numpy().copy()
        if path[0].startswith("layer"):
            block = f"stage{path[0][5:]}_block{int(path[1]) + 1}"
            layer = path[2].replace("bn", "norm")
            if layer == "downsample":
                layer = ("shortcut_conv", "shortcut_norm")[int(path[3])]
            path = (block, layer)
        else:
            path = ({"conv1": "stem_conv", "bn1": "stem_norm", "fc": "head"}[path[0]],)
        kinds = {"running_mean": "mean", "running_var": "var", "bias": "bias", "weight": "scale"}
        ours = kinds[leaf]
        if value.ndim > 1:
            value, ours = np.moveaxis(value, (0, 1), (-1, -2)), "kernel"
        target = batch_stats if leaf.startswith("running") else params
        for step in path:
            target = target.setdefault(step, {})
        target[ours] = value
    return {"params": params, "batch_stats": batch_stats}


@pytest.mark.parametrize(
    ("stage_sizes", "bottleneck", "imagenet", "size"),
    [
        ((2, 1, 1), False, False, (32, 32)),
        ((1, 1, 1), False, False, (33, 27)),
        ((1, 2), True, False, (32, 18)),
        ((1, 1, 1, 1), False, True, (64, 64)),
        ((1, 1), False, True, (65, 51)),
        ((1, 1), True, True, (62, 37)),
        ((1, 1), True, True, (224, 224)),
    ],
)
def test_a_network_of_pytorch(stage_sizes, bottleneck, imagenet, size):
    """Evaluation, and a step of gradient descent: logits, gradients and running statistics.

    In float64, and evaluation in float32 too. "SAME" is the control: it differs where a height or
    width is even where it is halved, and gives the same shapes.
    """
    torch = pytest.importorskip("torch")
    theirs = torch_resnet(torch, stage_sizes, 4, bottleneck=bottleneck, imagenet=imagenet)
    variables = from_torchvision(theirs.state_dict())
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, *size, 3)) - 1  # zeros would be the largest in a max-pooling
    labels = np.array([0, 4, 2])
    images = torch.tensor(x.transpose(0, 3, 1, 2))
    with torch.no_grad():
        expected = theirs.eval()(images).numpy()
    loss = torch.nn.functional.cross_entropy(theirs.train()(images), torch.tensor(labels))
    loss.backward()
    gradient = from_torchvision({name: p.grad for name, p in theirs.named_parameters()})["params"]
    stats = from_torchvision(theirs.state_dict())["batch_stats"]

    norm = functools.partial(BatchNorm, momentum=0.9)
    model = ResNet(
        stage_sizes,
        5,
        4,
        norm,
        bottleneck,
        stem="imagenet" if imagenet else "cifar",
        padding="torch",
    )
    evaluate = jax.jit(functools.partial(model.apply, train=False))
    largest = np.abs(expected).max()
    np.testing.assert_allclose(evaluate(variables, np.float32(x)), expected, atol=1e-5 * largest)
    same = jax.jit(functools.partial(model.clone(padding="SAME").apply, train=False))
    error = np.abs(same(variables, np.float32(x)) - expected).max() / largest
    assert error > 1e-2 or size in {(33, 27), (65, 51)}, error

    def loss_fn(params):
        logits, new = model.apply(
            variables | {"params": params}, x, train=True, mutable=["batch_stats"]
        )
        losses = -jax.nn.log_softmax(logits)[jnp.arange(3), labels]
        return jnp.mean(losses), new["batch_stats"]

    with jax.enable_x64(True):
        np.testing.assert_allclose(evaluate(variables, x), expected, atol=1e-11 * largest)
        (value, new), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
            variables["params"]
        )
        np.testing.assert_allclose(value, loss.item(), rtol=1e-10)
        assert jax.tree.structure(grads) == jax.tree.structure(gradient)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9 * max(1, np.abs(b).max())),
            grads,
            gradient,
        )
        for path, mean in flatten_dict(new).items():
            # Of the unbiased variance there, which is n/(n − 1) of ours; the means are equal.
            if path[-1] == "mean":
                np.testing.assert_allclose(mean, flatten_dict(stats)[path], rtol=1e-9, atol=1e-10)
