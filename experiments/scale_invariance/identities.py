"""The identities of `experiments.scale_invariance`: one layer under scaled weights, float64."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bn_research.layers.conv import Conv, conv2d
from bn_research.layers.linen import BatchNorm
from bn_research.normalization import batch_norm

LAYERS = ("dense", "conv")
INTERFACES = ("functions", "linen")
CONTROLS = ("no BN", "bias inside", "bias before BN")
_UNITS = 32
_CHANNELS = 8
_BATCH = 64


def measure(images: np.ndarray, layer: str, scales: tuple[float, ...], epsilon: float, seed: int):
    """Record of one layer and one seed: deviations at each scale a, relative to the largest value.

    "value", "input gradient" and "weight gradient" compare BN(aWu), ∂/∂u and a·∂/∂(aW) with those
    at a = 1, all for ε = 0; "exact form" compares all three of BN_ε(aWu) with BN_{ε/a²}(Wu), and
    "ε ignored" the value with BN_ε(Wu). Gradients are those of ⟨C, y⟩ with a random C.

    Args:
      images: [examples, height, width, channels].
      layer: of LAYERS.
      scales: a.
      epsilon: of the exact form.
      seed: draws the examples, W, γ, β, b and C.
    """
    rng = np.random.default_rng([seed, LAYERS.index(layer)])
    u = images[rng.choice(len(images), _BATCH, replace=False)].astype(np.float64)
    features = _UNITS if layer == "dense" else _CHANNELS
    if layer == "dense":
        u = u.reshape(_BATCH, -1)
        shape: tuple[int, ...] = (u.shape[1], features)
    else:
        shape = (3, 3, u.shape[3], features)
    w = rng.standard_normal(shape) / np.sqrt(np.prod(shape[:-1]))
    scale, bias, b = 1 + 0.5 * rng.random(features), *rng.standard_normal((2, features))
    c = rng.standard_normal((*u.shape[:-1], features))
    record: dict[str, Any] = {"layer": layer, "seed": seed}
    with jax.enable_x64(True):
        for interface in INTERFACES:

            def scaled_by(a, e, interface=interface):
                found = _value_and_gradients(
                    layer, interface, "BN", u, a * w, b, scale, bias, c, np.float64(e)
                )
                return jax.device_get(found)

            plain, with_epsilon = scaled_by(1.0, 0.0), scaled_by(1.0, epsilon)
            rows = []
            for a in scales:
                scaled = scaled_by(a, epsilon)
                exact = _compare(scaled, scaled_by(1.0, epsilon / a**2), a)
                rows.append(
                    _compare(scaled_by(a, 0.0), plain, a)
                    | {
                        "exact form": max(exact.values()),
                        "ε ignored": _relative(scaled[0], with_epsilon[0]),
                    }
                )
            record[interface] = {key: [row[key] for row in rows] for key in rows[0]}
        for control in CONTROLS:
            program = functools.partial(_value_and_gradients, layer, "functions", control)
            at = {
                a: jax.device_get(program(u, a * w, b, scale, bias, c, np.float64(0)))
                for a in (1.0, *scales)
            }
            record[control] = [max(_compare(at[a], at[1.0], a).values()) for a in scales]
    return record


def _compare(found: Any, expected: Any, a: float) -> dict[str, float]:
    y, by_input, by_weight = found
    return {
        "value": _relative(y, expected[0]),
        "input gradient": _relative(by_input, expected[1]),
        "weight gradient": _relative(a * by_weight, expected[2]),
    }


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _value_and_gradients(layer, interface, kind, u, w, b, scale, bias, c, epsilon):
    """y, ∂⟨C, y⟩/∂u and ∂⟨C, y⟩/∂w."""
    apply = _layers(layer, interface, kind)
    y, pull = jax.vjp(lambda u, w: apply(u, w, b, scale, bias, epsilon), u, w)
    return y, *pull(c)


def _layers(layer: str, interface: str, kind: str) -> Callable[..., Array]:
    """(u, w, b, scale, bias, epsilon) -> y."""
    if interface == "linen":
        return functools.partial(_linen, layer)
    product = jnp.matmul if layer == "dense" else conv2d

    def functions(u, w, b, scale, bias, epsilon):
        x = product(u, w)
        if kind != "BN":
            x = x + (b if "bias" in kind else 0)
        if kind == "bias inside":
            x = jax.nn.relu(x)
        return x if kind == "no BN" else batch_norm(x, scale, bias, epsilon=epsilon)[0]

    return functions


def _linen(layer, u, w, b, scale, bias, epsilon):
    module = (
        nn.Dense(w.shape[-1], use_bias=False)
        if layer == "dense"
        else Conv(w.shape[-1], use_bias=False)
    )
    x = module.apply({"params": {"kernel": w}}, u)
    norm = BatchNorm(use_running_average=False, epsilon=epsilon)
    zeros = jnp.zeros_like(scale)
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": zeros, "var": zeros + 1},
    }
    return norm.apply(variables, x, mutable=["batch_stats"])[0]
