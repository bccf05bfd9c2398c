"""The identities of `experiments.scale_invariance`: one layer under scaled weights, float64."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bn_research.layers.conv import Conv, conv2d
from bn_research.layers.linen import BatchNorm
from bn_research.normalization import batch_norm
from bn_research.training.step import Batch
from experiments.scale_invariance import Config

LAYERS = ("dense", "conv")
INTERFACES = ("functions", "linen")
KINDS = ("value", "input gradient", "weight gradient", "exact form")  # to hold
CONTROLS = ("no BN", "bias inside", "bias before BN")
_BATCH = 64
_KERNELS = {"dense": ((), 32), "conv": ((3, 3), 8)}  # size, and features


def measure(config: Config, examples: Batch, layer: str, seed: int) -> dict[str, Any]:
    """Record of one layer and one seed: deviations at each scale a, relative to the largest value.

    "value", "input gradient" and "weight gradient" compare BN(aWu), ∂/∂u and a·∂/∂(aW) with those
    at a = 1, all for ε = 0; "exact form" compares all three of BN_ε(aWu) with BN_{ε/a²}(Wu), and
    "ε ignored" the value with BN_ε(Wu). Gradients are those of ⟨C, y⟩ with a random C. The seed
    draws the examples, W, γ, β, b and C.
    """
    rng = np.random.default_rng([seed, LAYERS.index(layer)])
    images, epsilon = np.asarray(examples.image), config.epsilon
    u = images[rng.choice(len(images), _BATCH, replace=False)].astype(np.float64)
    u = u.reshape(_BATCH, -1) if layer == "dense" else u
    size, features = _KERNELS[layer]
    shape = (*size, u.shape[-1], features)
    w = rng.standard_normal(shape) / np.sqrt(np.prod(shape[:-1]))
    scale, bias, b = 1 + 0.5 * rng.random(features), *rng.standard_normal((2, features))
    c = rng.standard_normal((*u.shape[:-1], features))

    def at(kind: str, a: float = 1.0, epsilon: float = 0.0) -> tuple[np.ndarray, ...]:
        """Value, input gradient, and weight gradient times a."""
        y, by_input, by_weight = jax.device_get(
            _value_and_gradients(layer, kind, u, a * w, b, scale, bias, c, np.float64(epsilon))
        )
        return y, by_input, a * by_weight

    record: dict[str, Any] = {"layer": layer, "seed": seed}
    with jax.enable_x64(True):
        for interface in INTERFACES:
            plain, with_epsilon, rows = at(interface), at(interface, epsilon=epsilon), []
            for a in config.scales:
                scaled, exact = at(interface, a, epsilon), at(interface, epsilon=epsilon / a**2)
                exact_form = max(_deviations(scaled, exact))
                ignored = _deviations(scaled, with_epsilon)[0]
                rows.append([*_deviations(at(interface, a), plain), exact_form, ignored])
            columns = np.transpose(rows).tolist()
            record[interface] = dict(zip((*KINDS, "ε ignored"), columns, strict=True))
        for control in CONTROLS:
            plain = at(control)
            record[control] = [max(_deviations(at(control, a), plain)) for a in config.scales]
    return record


def _deviations(found: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...]) -> list[float]:
    return [
        float(np.max(np.abs(x - y)) / np.max(np.abs(y)))
        for x, y in zip(found, expected, strict=True)
    ]


@functools.partial(jax.jit, static_argnames=("layer", "kind"))
def _value_and_gradients(layer, kind, u, w, b, scale, bias, c, epsilon):
    """y, ∂⟨C, y⟩/∂u and ∂⟨C, y⟩/∂w; the kind is an interface of BN, or a control."""

    def functions(u, w):
        x = u @ w if layer == "dense" else conv2d(u, w)
        x = x + b if "bias" in kind else x
        x = jax.nn.relu(x) if kind == "bias inside" else x
        return x if kind == "no BN" else batch_norm(x, scale, bias, epsilon=epsilon)[0]

    def linen(u, w):
        module = nn.Dense if layer == "dense" else Conv
        x = module(w.shape[-1], use_bias=False).apply({"params": {"kernel": w}}, u)
        zeros = jnp.zeros_like(scale)
        variables = {
            "params": {"scale": scale, "bias": bias},
            "batch_stats": {"mean": zeros, "var": zeros + 1},
        }
        norm = BatchNorm(use_running_average=False, epsilon=epsilon)
        return norm.apply(variables, x, mutable=["batch_stats"])[0]

    y, pull = jax.vjp(linen if kind == "linen" else functions, u, w)
    return y, *pull(c)
