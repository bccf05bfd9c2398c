"""What a probe of the signal means, in words, and what to do."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from bn_research.probes.signal.layers import Layers, LayerSignal

LOST = 1e-4  # std of pre-activations, below which a softmax hardly tells classes apart
EXPLODED = 1e4  # std of pre-activations, above which a softmax is one-hot
GRADIENT_RATIO = 1e3  # of the norms of the first and the last layer's, or the other way round
DEAD = 0.5  # share of units
CONDITIONING = 100.0  # mean²/var
COLLAPSED, MIN_RANK = 1.5, 4  # soft rank, and what the batch must allow
_LISTED = 4  # layers of branches that start at zero, and the number of the others
STEADY = 0.1  # growth per layer around 1 that calls for no rescaling


def in_words(signal: Layers) -> str:
    """See `Signal.verdict`."""
    return "\n".join([*findings(signal), *notes(signal)])


def findings(signal: Layers) -> list[str]:
    """What is wrong, a line each, most fundamental first; or one line that starts with "healthy".

    Values that are not finite come first, and alone.

    The signal is lost where the std is below `LOST` in a layer, in all layers after it and in the
    output; the first such layer is named. It explodes likewise above `EXPLODED`. What BN brings
    back is thus not lost. The limits are absolute, not relative to the input, because what a
    softmax makes of numbers depends on their size. Examples look alike where the soft rank is below
    `COLLAPSED`, likewise. The last layer alone does not count: a mean over all examples that a head
    adds to each is no loss.

    The norm of the gradient is compared between the first and the last layer that have one. Units
    are dead whose pre-activation is ≤ 0 and whose gradient is 0 for the whole batch; the last
    layer's are no units.

    A branch that starts at zero is no fault: layers in it are judged neither by values nor by
    gradients that are 0. A gradient is lost where it is 0 on every path; where it stays 0 in a
    branch alone, the finding says so.
    """
    layers = list(signal.values())
    broken = next((layer for layer in layers if not math.isfinite(layer.std)), None)
    if broken is not None:
        return [
            f"not finite from layer {_named(signal, broken)} on: rescale the weights before it, or "
            "look for a division by 0 or a logarithm of 0"
        ]
    filled = [layer for layer in layers if not (layer.starts_at_zero and layer.std == 0)]
    lines = [
        *_scale(signal, filled),
        *_gradient(signal, layers),
        *_units(signal, layers),
        *_examples(signal, filled),
    ]
    return lines or [f"healthy: {growths(signal)}"]


def notes(signal: Layers) -> list[str]:
    """What is no fault: branches that start at zero, and kernels that no layer stands for."""
    layers = list(signal.values())
    branches = [_named(signal, layer) for layer in layers if layer.starts_at_zero]
    lines = []
    if branches:
        more = len(branches) - _LISTED
        listed = ", ".join(branches[:_LISTED]) + (f" and {more} more" if more > 0 else "")
        lines.append(
            f"by design: layers {listed} lie in branches that start at zero, and learn once the "
            "zeros have moved"
        )
    if signal.left_out:
        lines.append(f"not looked at: {', '.join(signal.left_out)}")
    return lines


def growths(signal: Layers) -> str:
    """Both growths, in words."""
    forward, backward = signal.forward_growth, signal.backward_growth
    return f"forward {_factor(forward)}, backward {_factor(backward)} per layer"


def _scale(signal: Layers, layers: Sequence[LayerSignal]) -> list[str]:
    growth, out = signal.forward_growth, signal.output_std
    lost = _trailing(layers, lambda layer: layer.std < LOST)
    if lost is not None and not out >= LOST:
        std = layers[lost].std
        if growth < 1 - STEADY:
            rescale = f"rescale the weights by {_number(1 / growth)}× per layer"
        elif std > 0:
            rescale = f"scale the input or the first weights up by {_number(1 / std)}×"
        else:
            rescale = "look for weights of zeros"
        variance = layers[-1].std ** 2
        fits = f" with epsilon far below {variance:.0e}" if variance > 0 else ""
        return [
            f"signal lost from layer {_named(signal, layers[lost])} on: std {std:.1g}"
            f"{_at_last(layers, lost)}; add BN before the softmax{fits} or {rescale}"
        ]
    exploded = _trailing(layers, lambda layer: layer.std > EXPLODED)
    if exploded is not None and not out <= EXPLODED:
        std = layers[exploded].std
        if growth > 1 + STEADY:
            rescale = f"rescale the weights by {_number(1 / growth)}× per layer"
        else:
            rescale = f"scale the input or the first weights by {_number(1 / std)}×"
        return [
            f"signal explodes from layer {_named(signal, layers[exploded])} on: std {std:.1g}"
            f"{_at_last(layers, exploded)}; add BN or {rescale}"
        ]
    return []


def _gradient(signal: Layers, layers: Sequence[LayerSignal]) -> list[str]:
    known = [
        (number, layer.log10_gradient_norm)
        for number, layer in enumerate(layers)
        if layer.log10_gradient_norm is not None
        and not (layer.bypassed and layer.log10_gradient_norm == -math.inf)
    ]
    if all(layer.log10_gradient_norm is None for layer in layers):
        return [
            "no gradient: the output does not depend on any layer; return the arrays that the "
            "network goes on with, not others of the same values"
        ]
    if not known:  # all lie in branches around which the gradient goes
        return _stuck(signal, layers)
    broken = [number for number, size in known if math.isnan(size) or size == math.inf]
    if broken:
        return [
            f"gradient not finite at layer {_named(signal, layers[broken[-1]])}, and what is "
            "before it"
        ]
    if known[-1][1] == -math.inf:
        return [
            f"gradient 0 from the last layer, {_named(signal, layers[known[-1][0]])}, on: nothing "
            "learns"
        ]
    zero = [number for number, size in known if size == -math.inf]
    if zero:
        return [
            f"gradient lost: 0 at layer {_named(signal, layers[zero[-1]])} and from there to the "
            "input; use residual connections, or rescale the weights"
        ]
    lines = _stuck(signal, layers)
    (first, at_first), (last, at_last) = known[0], known[-1]
    total = at_first - at_last
    if abs(total) < math.log10(GRADIENT_RATIO):
        return lines
    count, growth = last - first, signal.backward_growth
    if total > 0:
        verb, advice = "grows", "use residual connections or shorten the network"
    else:
        verb, advice = "vanishes", "use residual connections, or larger weights"
    return [
        *lines,
        f"gradient {verb} {_factor(growth)} per layer towards the input: {10**total:.0e} over "
        f"{count} layers; {advice}",
    ]


def _stuck(signal: Layers, layers: Sequence[LayerSignal]) -> list[str]:
    stuck = [
        layer
        for layer in layers
        if layer.bypassed and not layer.starts_at_zero and layer.log10_gradient_rms == -math.inf
    ]
    if not stuck:
        return []
    return [
        f"gradient 0 at layer {_named(signal, stuck[-1])}, in a branch, while the rest learns: "
        "look for dead units after it, a stop_gradient or a factor of 0 that is no parameter"
    ]


def _units(signal: Layers, layers: Sequence[LayerSignal]) -> list[str]:
    dead = [
        (min(layer.dead_fraction, layer.silent_fraction), number)
        for number, layer in enumerate(layers[:-1])
        if layer.silent_fraction is not None and not layer.starts_at_zero
    ]
    worst, number = max(dead, default=(0.0, 0))
    if worst <= DEAD:
        return []
    return [
        f"{worst:.0%} of the units of layer {_named(signal, layers[number])} are dead on this "
        "batch: lower the mean of what comes in, raise the biases, or add BN"
    ]


def _examples(signal: Layers, layers: Sequence[LayerSignal]) -> list[str]:
    lines = []
    largest = max(layers, key=lambda layer: layer.conditioning, default=None)
    if largest is not None and largest.conditioning > CONDITIONING:
        lines.append(
            f"the mean dominates at layer {_named(signal, largest)}: mean²/var "
            f"{_number(largest.conditioning)}; centre the input, or add BN"
        )
    collapsed = _trailing(
        layers, lambda layer: layer.soft_rank < COLLAPSED and layer.max_rank >= MIN_RANK
    )
    heads_alone = len(layers) > 1 and collapsed == len(layers) - 1
    if collapsed is not None and not heads_alone and not signal.output_soft_rank >= COLLAPSED:
        layer = layers[collapsed]
        lines.append(
            f"all examples look alike from layer {_named(signal, layer)} on: soft rank "
            f"{layer.soft_rank:.2f} of {layer.max_rank}; add BN, use residual connections or "
            "shorten the network"
        )
    return lines


def _trailing(layers: Sequence[LayerSignal], holds: Callable[[LayerSignal], bool]) -> int | None:
    """The first layer of those up to the last that something holds for, if for the last."""
    count = int(np.cumprod([holds(layer) for layer in layers[::-1]]).sum())
    return len(layers) - count if count else None


def _at_last(layers: Sequence[LayerSignal], number: int) -> str:
    return "" if number == len(layers) - 1 else f", {layers[-1].std:.1g} at the last"


def _named(signal: Layers, layer: LayerSignal) -> str:
    return f"{list(signal).index(layer.name) + 1} ({layer.name})"


def _factor(growth: float) -> str:
    return "×–" if math.isnan(growth) else f"×{growth:.3g}"


def _number(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:.0f}" if value < 1e4 else f"{value:.0e}"
