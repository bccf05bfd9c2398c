"""The signal of a badly initialized CNN: theory, and what is measured before any training."""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from bn_research.claims.judging import Record
from bn_research.data import FULL_SCALE, scale_images
from bn_research.lab.compiler import compiler_options
from bn_research.lab.images import Images, resize
from bn_research.lab.workdir import Ledger
from bn_research.models.cnn import CNN
from bn_research.models.initializers import kernel_initializer
from bn_research.models.spec import Conv, Pool, parse_spec
from bn_research.probes.signal import log10_rms
from experiments.init_sensitivity import Config

INPUT_SCALES = ("standardized", "unit", "bytes")
_POOL_GAIN = 2.5  # E[max-pooled relu²] over E[relu²], for neighbours as correlated as in images


def predicted_log10_std(
    network: str, a: float, second_moment: float, shape: Sequence[int]
) -> list[float]:
    """log10 of each weight layer's pre-activation scale by theory, with weights from U(−a, a).

    s_1 = a·√(n_1·E[x²]/3) and s_l = s_{l−1}·a·√(k·n_l/6): n the fan-in, k = 1 after a ReLU and 2.5
    where a 2×2 max-pooling lies between. Images have the shape (height, width, channels) and the
    second moment E[x²].
    """
    height, width, channels = shape
    prediction: list[float] = []
    gain = 1.0
    for layer in parse_spec(network):
        if isinstance(layer, Pool):
            height, width, gain = height // 2, width // 2, _POOL_GAIN
            continue
        if isinstance(layer, Conv):
            fan_in = layer.kernel**2 * channels
        else:
            fan_in, height, width = height * width * channels, 1, 1
        power = gain * fan_in / 6 if prediction else fan_in * second_moment / 3
        step = math.log10(a) + 0.5 * math.log10(power)
        prediction.append(prediction[-1] + step if prediction else step)
        channels, gain = layer.features, 1.0
    return prediction


@functools.lru_cache(maxsize=1)  # the widths and input scales share the weights of a seed
def _unit_weights(network: str, shape: tuple[int, ...], seed: int):
    draw_weights, _ = _signal_programs(network)
    return draw_weights(jax.random.key(seed), jnp.zeros(shape))


def measured_log10_std(network: str, a: float, images: jax.Array, seed: int) -> list[float]:
    """log10 of each weight layer's pre-activation scale, of one seed at initialization."""
    weights = _unit_weights(network, (1, *images.shape[1:]), seed)
    found = _signal_programs(network)[1](weights, images, jnp.float32(a))
    return [float(value) for value in found]


@functools.cache
def _signal_programs(network: str):
    model = CNN(network, kernel_init=kernel_initializer("uniform", a=1.0), use_bias=False)

    @functools.partial(jax.jit, compiler_options=compiler_options(0))
    def draw_weights(key, images):
        return model.init(key, images, train=False)["params"]

    @functools.partial(jax.jit, compiler_options=compiler_options(1))
    def forward(weights, images, a):
        params = jax.tree.map(lambda kernel: a * kernel, weights)  # as the initializer does
        _, state = model.apply({"params": params}, images, train=False, mutable=["intermediates"])
        sown = state["intermediates"]
        return [log10_rms(sown[f"pre_activation_{number + 1}"][0]) for number in range(len(sown))]

    return draw_weights, forward


def measure_signals(config: Config, images: Images, ledger: Ledger) -> list[Record]:
    """Records of each network and seed: all input scales at the run's a, one scale at all a."""

    def measure(network: str, scale: str, a: float, seed: int) -> Record:
        inputs = _inputs(config, images, scale)
        second_moment = float(jnp.mean(jnp.square(inputs)))
        return {
            "network": network,
            "input_scale": scale,
            "a": a,
            "seed": seed,
            "measured": measured_log10_std(network, a, inputs, seed),
            "predicted": predicted_log10_std(network, a, second_moment, inputs.shape[1:]),
        }

    settings = [(scale, config.a) for scale in INPUT_SCALES]
    settings += [("standardized", a) for a in config.signal_widths if a != config.a]
    records: list[Record] = []
    for network, seed in itertools.product(config.signal_networks, range(config.seeds)):
        for scale, a in settings:
            name = f"signal/{network} inputs={scale} a={a:g} seed={seed}"
            records.append(ledger.get(name, measure, network, scale, a, seed))
    return records


def _inputs(config: Config, images: Images, scale: str) -> jax.Array:
    """Training images at the geometry of CIFAR-10, [signal_images, size, size, 3]."""
    reference, full_scale = images.pixels, FULL_SCALE[config.dataset]
    pixels = reference[: config.signal_images]
    scaled = scale_images(pixels, scale, reference=reference, full_scale=full_scale)
    inputs = resize(scaled, config.signal_size)
    return inputs if inputs.shape[3] == 3 else jnp.repeat(inputs, 3, axis=3)
