"""A probe of the signal as a table for a terminal."""

from bn_research.claims.formatting import aligned
from bn_research.probes.signal.layers import Layers, LayerSignal
from bn_research.probes.signal.verdict import growths, in_words

_NONE = "–"


def as_table(signal: Layers) -> str:
    """See `Signal.table`."""
    head = ("layer", "shape", "mean", "std", "dead", "mean²/var", "soft rank", "‖∂L/∂h‖", "σ(J)")
    cells = [_cells(layer) for layer in signal.values()]
    lines = aligned([head, *cells], left=2)
    lines.append("σ(J): smallest, rms and largest singular value from the layer before; – unknown")
    lines.append(f"growth: {growths(signal)}")
    return "\n".join([*lines, in_words(signal)])


def _cells(layer: LayerSignal) -> tuple[str, ...]:
    jacobian = _NONE
    if layer.jacobian is not None:
        jacobian = " ".join(f"{value:.2g}" for value in layer.jacobian)
    gradient = layer.log10_gradient_norm
    return (
        layer.name,
        "×".join(map(str, layer.shape)),
        f"{layer.mean:+.1e}",
        f"{layer.std:.2e}",
        f"{layer.dead_fraction:.0%}",
        f"{layer.conditioning:.2g}",
        f"{layer.soft_rank:.1f}/{layer.max_rank}",
        _NONE if gradient is None else f"{10**gradient:.2e}",
        jacobian,
    )
