"""Both kinds of shift, as `experiments.covariate_shift` observes them while a network trains.

They are observed before each dispatch, so at step 0 first, inside the compiled program of the
training, which goes on as if nobody had looked.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bn_research.models.mlp import MLP
from bn_research.models.spec import num_weight_layers
from bn_research.probes.covariate_shift import (
    distribution_drift,
    gradient_noise,
    gradient_shift,
    percentile_distance,
    percentiles,
)
from bn_research.training.loop import History, batch_at
from bn_research.training.metrics import cross_entropy_metrics
from bn_research.training.state import TrainState
from bn_research.training.step import Batch, apply_fn_of

LEVELS = (15.0, 50.0, 85.0)  # percentiles, those of the paper's figure 1
FAN = (10.0, 50.0, 90.0)  # percentiles over units, of their medians


class Data(NamedTuple):
    """What a program is given."""

    train: Batch
    measuring: Array  # shape=(images, height, width, channels): percentiles are of these
    evaluation: Batch  # accuracy during training is of these


class Observed(NamedTuple):
    """What is measured before a dispatch; layers are weight layers, the head is the last."""

    percentiles: Array  # shape=(3, levels, units): of the measuring set and its two halves
    accuracy: Array  # shape=(): on the evaluation images, by the running statistics
    relative: Array  # shape=(layers,): gradient shift ‖G − G′‖/‖G‖ of the next step
    cosine: Array  # shape=(layers,): of G and G′
    noise: Array  # shape=(layers,): ‖G_a − G_b‖/‖G_a‖ of that step's batch and one disjoint from it


def inputs_of_last_activation(
    model: MLP, variables: Any, image: Float[Array, "batch ..."]
) -> Float[Array, "batch units"]:
    """What the last hidden activation receives, in training mode: after BN, where there is."""
    kind = "dense" if model.placement == "none" else "batch_norm"
    name = f"{kind}{num_weight_layers(model.spec) - 1}"
    _, found = model.apply(
        variables,
        image,
        train=True,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=lambda module, method: module.name == name,
    )
    return found["intermediates"][name]["__call__"][0]


def observe(model: MLP, step_fn: Any, state: TrainState, data: Data, batch_size: int) -> Observed:
    """Both kinds of shift at a state, and the accuracy.

    Percentiles are of what the last hidden activation receives, with BN by the statistics of the
    measuring set itself. The gradient shift is that of the step that training takes next: its
    batch, its update.
    """
    apply_fn = apply_fn_of(model)
    inputs = inputs_of_last_activation(model, _variables(state), data.measuring)
    half = len(data.measuring) // 2
    parts = (inputs, inputs[:half], inputs[half : 2 * half])
    logits, _ = apply_fn(_variables(state), data.evaluation.image, train=False)
    correct = jnp.argmax(logits, axis=-1) == data.evaluation.label
    batch, other = (batch_at(state, data.train, batch_size, ahead=n) for n in (0, 1))

    def loss_of(batch):
        def loss_fn(params):
            logits, _ = apply_fn(_variables(state, params), batch.image, train=True)
            return cross_entropy_metrics(logits, batch.label).loss / batch_size

        return loss_fn

    paths = [
        tuple(f"['{name}{i}']" for name in ("dense", "batch_norm") if f"{name}{i}" in state.params)
        for i in range(1, num_weight_layers(model.spec) + 1)
    ]
    new_params = step_fn(state, batch)[0].params
    shift = gradient_shift(loss_of(batch), state.params, new_params, paths)
    noise = gradient_noise(loss_of(batch), loss_of(other), state.params, paths)
    return Observed(
        jnp.stack([percentiles(part, levels=LEVELS) for part in parts]),
        jnp.mean(correct, dtype=jnp.float32),
        shift.relative,
        shift.cosine,
        noise.relative,
    )


def summary(history: History, steps_per_dispatch: int) -> dict[str, Any]:
    """What a run's record keeps of its history: means over units, and one unit whole.

    Units whose distribution has no width at some time are counted and left out of the means.
    """
    seen: Observed = history.observed
    found = np.asarray(seen.percentiles, np.float64)
    whole, halves = found[:, 0], found[:, 1:]
    times = len(whole)
    record: dict[str, Any] = {
        "step": steps_per_dispatch * np.arange(times),
        "loss": history.loss.reshape(times, -1).mean(axis=1),  # of each dispatch
        "diverged": history.diverged,
        "evaluated": seen.accuracy,
        "relative": seen.relative,
        "cosine": seen.cosine,
        "noise": seen.noise,
        "fan": np.percentile(whole[:, 1], FAN, axis=-1).T,  # [times, 3]
    }
    if times < 2 or not np.isfinite(whole).all():
        return record | {"path": None}
    drift = distribution_drift(whole)
    kept, constant = ~drift.constant, int(drift.constant.sum())
    if not kept.any():
        return record | {"path": None, "constant": constant}
    typical = np.argsort(drift.path)[len(drift.path) // 2]
    raw = np.abs(np.diff(whole, axis=0)).mean(axis=1)
    return record | {
        "path": drift.path[kept],  # of each unit
        "net": float(drift.net[kept].mean()),
        "constant": constant,
        "movement": drift.movement[:, kept].mean(axis=1),  # of each interval
        "raw_movement": raw[:, kept].mean(axis=1),  # in units of the activation's input
        "floor": percentile_distance(halves[:, 0], halves[:, 1])[:, kept].mean(axis=1),
        "typical": whole[:, :, typical],  # [times, levels]: of the unit with the median path
    }


def _variables(state: TrainState, params: Any = None) -> dict[str, Any]:
    params = state.params if params is None else params
    return {"params": params, "batch_stats": state.batch_stats}
