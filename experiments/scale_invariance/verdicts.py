"""The claims of `experiments.scale_invariance`, and how records of measurements decide them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bn_research.claims.claim import Claim
from bn_research.claims.estimate import estimate
from bn_research.claims.finding import (
    INCONCLUSIVE,
    NOT_REPRODUCED,
    REPRODUCED,
    Finding,
    conjunction,
)
from experiments.scale_invariance import identities
from experiments.scale_invariance.dynamics import largest_product

EXACT = 1e-12  # identities hold to this in float64, in units of what they compare
VIOLATED = 1e-9
SAME = 1e-10  # trajectories agree to this, in nats
DIFFERENT = 1e-6
SEEN = 1e-4  # a control must deviate by more than this
_NARROW, _WIDE = 0.05, 0.15  # of the angle
_STILL = 0.1  # drift of a norm in equilibrium
_GROWTH = 10.0  # of the rate that stands for decay

CLAIMS = (
    Claim(
        id="scale-invariant-backprop",
        statement="Backprop through BN is not affected by the scale of the weights",
        source="Notes on Ioffe & Szegedy (2015); Paper section 3.3",
        criterion="Reproduced if for every a, every seed, dense and conv layers, the functions and "
        "linen, with ε = 0, BN(aWu) = BN(Wu), ∂/∂u is the same and ∂/∂(aW) is 1/a of ∂/∂W, and "
        "BN_ε(aWu) = BN_{ε/a²}(Wu) with both gradients, all to 1e-12 in float64, while the "
        "controls (no BN, a bias inside) deviate by more than 1e-4; not reproduced above 1e-9",
        expected="each to 1e-12; controls of order 1",
    ),
    Claim(
        id="gradient-is-tangent",
        statement="The gradient is orthogonal to weights under BN, so that plain SGD makes them "
        "grow as by Pythagoras",
        source="Arora, Li & Lyu (2018), arXiv 1812.03981",
        criterion="Reproduced if for each hidden layer and step of training by plain SGD in "
        "float64 |⟨w, ∇L⟩|/(‖w‖‖∇L‖) and |‖w⁺‖² − ‖w‖² − η²‖∇L‖²|/‖w‖² are below 1e-12, while in "
        "the controls the largest exceed 1e-4; not reproduced above 1e-9",
        expected="each to 1e-12",
    ),
    Claim(
        id="effective-learning-rate",
        statement="(η, λ, w₀) and (c²η, λ/c², c·w₀) train the same function",
        source="van Laarhoven (2017), arXiv 1706.05350",
        criterion="Reproduced if the losses of every step agree to 1e-10 for every c, without and "
        "with momentum, while they differ by more than 1e-4 without BN and with w₀ in place of "
        "c·w₀; not reproduced above 1e-6",
        expected="to 1e-10",
    ),
    Claim(
        id="exponential-rate-equals-weight-decay",
        statement="SGD with momentum and weight decay equals SGD without decay at an exponentially "
        "growing rate",
        source="Li & Arora (2019), arXiv 1910.07454",
        criterion="Reproduced if the losses of every step agree to 1e-10 while the rate grows at "
        f"least {_GROWTH:g} times, and differ by more than 1e-4 without BN and with a constant "
        "rate without decay; not reproduced above 1e-6",
        expected="to 1e-10 over 300 steps and more",
    ),
    Claim(
        id="equilibrium-angle",
        statement="In equilibrium the angle per step is √(2ηλ/(1 + α)) with momentum α",
        source="Wan et al. (2020), arXiv 2006.08419; derived above",
        criterion="Reproduced if the root mean square angle per step over the second half of the "
        "run is within 5 % of √(2ηλ/(1 + α)) in the worst hidden layer and setting (interval over "
        "seeds); not reproduced if surely off by more than 15 %. A run whose ‖w‖ still drifts by "
        "more than 10 % of what decay alone would do to it, which moves the angle by 5 %, is not "
        "in equilibrium and makes the verdict inconclusive",
        expected="ratio 1",
    ),
)


def exactly(worst: float, *, reproduced: float, refuted: float) -> str:
    """Verdict of a largest deviation that two limits bound."""
    if worst <= reproduced:
        return REPRODUCED
    return NOT_REPRODUCED if not worst <= refuted else INCONCLUSIVE


def _seen(controls: Mapping[str, float]) -> str:
    """Whether every control fails as it must."""
    return REPRODUCED if min(controls.values()) > SEEN else INCONCLUSIVE


def judge_backprop(config: Any, records: list[dict]) -> Finding:
    """scale-invariant-backprop."""
    kinds = ("value", "input gradient", "weight gradient", "exact form")
    worst = {
        kind: max(
            max(record[interface][kind])
            for record in records
            for interface in identities.INTERFACES
        )
        for kind in kinds
    }
    controls = {
        name: min(_off_one(config.scales, record[name]) for record in records)
        for name in ("no BN", "bias inside")
    }
    absorbed = max(max(record["bias before BN"]) for record in records)
    largest = max(worst.values())
    return Finding(
        CLAIMS[0],
        {
            **{f"largest deviation, {kind}": value for kind, value in worst.items()},
            **{f"smallest deviation, {name}": value for name, value in controls.items()},
            "bias right before BN": absorbed,
        },
        (largest, largest),
        conjunction(exactly(largest, reproduced=EXACT, refuted=VIOLATED), _seen(controls)),
        note="interval: the largest deviation of all. Deviations are relative to the largest "
        "value. Of the controls the smallest over seeds and layers, at the scale farthest from 1. "
        "A bias right before BN does no harm: BN subtracts it",
    )


def _off_one(scales: Sequence[float], deviations: Sequence[float]) -> float:
    """Deviation at the scale farthest from 1."""
    return deviations[int(np.argmax(np.abs(np.log(scales))))]


def judge_tangent(records: list[dict]) -> Finding:
    """gradient-is-tangent."""
    measured, controls = {}, {}
    for key in ("share", "pythagoras"):
        for name in dict.fromkeys(record["network"] for record in records):
            of_network = [record[key] for record in records if record["network"] == name]
            measured[f"largest {key}, {name}"] = max(of_network)
            if name != "BN":
                controls[f"{key}, {name}"] = min(of_network)
    largest = max(measured["largest share, BN"], measured["largest pythagoras, BN"])
    return Finding(
        CLAIMS[1],
        measured,
        (largest, largest),
        conjunction(exactly(largest, reproduced=EXACT, refuted=VIOLATED), _seen(controls)),
        note="share: |⟨w, ∇L⟩|/(‖w‖‖∇L‖); pythagoras: |‖w⁺‖² − ‖w‖² − η²‖∇L‖²|/‖w‖². Largest of "
        "all seeds, steps and hidden layers",
    )


def judge_effective_rate(records: list[dict]) -> Finding:
    """effective-learning-rate."""
    worst = {
        f"largest difference, c = {c}, momentum {record['momentum']:g}": 0.0
        for record in records
        for c in record["difference"]
    }
    controls: dict[str, float] = {}
    for record in records:
        for c, value in record["difference"].items():
            key = f"largest difference, c = {c}, momentum {record['momentum']:g}"
            worst[key] = max(worst[key], value)
        for name, value in record["control"].items():
            controls[name] = min(controls.get(name, math.inf), value)
    largest = max(worst.values())
    return Finding(
        CLAIMS[2],
        {**worst, **{f"smallest difference, {name}": value for name, value in controls.items()}},
        (largest, largest),
        conjunction(exactly(largest, reproduced=SAME, refuted=DIFFERENT), _seen(controls)),
        note="of the losses of all steps and seeds, in nats; controls are those of the c nearest 1",
    )


def judge_exponential(records: list[dict]) -> Finding:
    """exponential-rate-equals-weight-decay."""
    largest = max(record["difference"] for record in records)
    growth = min(record["growth"] for record in records)
    controls = {
        name: min(record["control"][name] for record in records) for name in records[0]["control"]
    }
    return Finding(
        CLAIMS[3],
        {
            "largest difference of losses": largest,
            "growth of the rate": growth,
            **{f"smallest difference, {name}": value for name, value in controls.items()},
        },
        (largest, largest),
        conjunction(
            exactly(largest, reproduced=SAME, refuted=DIFFERENT),
            REPRODUCED if growth >= _GROWTH else INCONCLUSIVE,
            _seen(controls),
        ),
        note="of the losses of all steps and seeds, in nats; the control without BN is over its "
        "first 50 steps",
    )


def judge_equilibrium(config: Any, records: list[dict]) -> Finding:
    """equilibrium-angle."""
    judged = [record for record in records if record["network"] == config.network]
    wide = [record for record in records if record["network"] != config.network]
    diverged = sum(record["diverged"] for record in judged)

    def ratios(chosen: list[dict], key: str) -> np.ndarray:
        return np.array([np.array(record[key]) / record["predicted"] for record in chosen])

    worst = [
        float(np.max(np.abs(ratios([r for r in judged if r["seed"] == seed], "rms") - 1)))
        for seed in range(config.seeds)
    ]
    off = estimate(worst)
    drift = max(_drift(config, record) for record in judged)
    verdict = INCONCLUSIVE
    if drift <= _STILL and off.high <= _NARROW:
        verdict = REPRODUCED
    elif drift <= _STILL and off.low > _WIDE:
        verdict = NOT_REPRODUCED
    measured = {
        "largest |rms angle/theory − 1|": off.mean,
        "largest, over seeds": max(worst),
        "lowest ratio": float(ratios(judged, "rms").min()),
        "highest ratio": float(ratios(judged, "rms").max()),
        "largest drift of a norm, over that by decay alone": drift,
    }
    overdamped = [r for r in judged if r["rate"] * r["decay"] <= largest_product(r["momentum"])]
    measured["largest, where ηλ ≤ (1 − √α)²"] = float(np.max(np.abs(ratios(overdamped, "rms") - 1)))
    for momentum in dict.fromkeys(record["momentum"] for record in judged):
        chosen = [record for record in judged if record["momentum"] == momentum]
        measured[f"ratio, momentum {momentum:g}"] = float(ratios(chosen, "rms").mean())
        measured[f"ratio of the mean angle, momentum {momentum:g}"] = float(
            ratios(chosen, "mean").mean()
        )
    measured["loss, largest"] = max(record["loss"] for record in judged)
    measured["loss, wide network"] = float(np.mean([record["loss"] for record in wide]))
    measured["ratio, wide network"] = float(ratios(wide, "rms").mean())
    measured["ratio of the mean angle, wide network"] = float(ratios(wide, "mean").mean())
    index, layer = _worst(judged)
    off_layer = judged[index]["layers"][layer]
    note = (
        "interval: over seeds, of the largest deviation in a hidden layer and setting. The largest "
        f"of all is that of {off_layer} at η = {judged[index]['rate']:g}, "
        f"λ = {judged[index]['decay']:g}, momentum {judged[index]['momentum']:g}, where ‖w‖ has a "
        f"standard deviation of {_variation(judged[index])[layer]:.0%} of its mean. Wide network: "
        f"{config.wide_network}, without momentum. Where gradients come in bursts, the mean of the "
        "angle falls below its root mean square, which the law is about"
    )
    if diverged:
        note += f"; {diverged} steps were not finite and not taken"
    return Finding(CLAIMS[4], measured, off.interval, verdict, note)


def _worst(records: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Numbers of the record and of the layer whose angle is farthest from theory."""
    off = [np.abs(np.array(record["rms"]) / record["predicted"] - 1) for record in records]
    index, layer = np.unravel_index(np.argmax(off), np.shape(off))
    return int(index), int(layer)


def _variation(record: Mapping[str, Any]) -> np.ndarray:
    """Standard deviation of ‖w‖ over its mean, second half, by layer; of the steps kept."""
    norms = np.array(record["norms"], float)
    norms = norms[len(norms) // 2 :]
    return norms.std(axis=0) / norms.mean(axis=0)


def _drift(config: Any, record: Mapping[str, Any]) -> float:
    """Drift of log ‖w‖ over the second half, over what decay alone would do; largest layer."""
    steps = config.equilibrium_steps - config.equilibrium_steps // 2
    decayed = steps * record["rate"] * record["decay"] / (1 - record["momentum"])
    return float(np.max(np.abs(np.log(record["norm_drift"]))) / decayed)
