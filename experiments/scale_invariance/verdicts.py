"""The claims of `experiments.scale_invariance`, and how its records decide them."""

from collections.abc import Mapping, Sequence

import numpy as np

from bn_research.claims.claim import Claim
from bn_research.claims.estimate import estimate
from bn_research.claims.finding import INCONCLUSIVE, REPRODUCED, Finding, conjunction, verdict_of
from bn_research.claims.judging import Record, by_seed, numbers
from bn_research.training.exponential_rates import largest_product
from experiments.scale_invariance import Config, identities

# Limits of the largest deviation: reproduced up to the first, not reproduced above the second.
IDENTITIES = (1e-12, 1e-9)  # in float64, in units of what they compare
TRAJECTORIES = (1e-10, 1e-6)  # of losses, in nats
_SEEN = 1e-4  # a control must deviate by more than this
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


def judge(config: Config, records: Mapping[str, Sequence[Record]]) -> list[Finding]:
    """A finding for each claim, in their order."""
    return [
        _judge_backprop(config, records["backprop"]),
        judge_tangent(records["tangent"]),
        judge_effective_rate(records["effective"]),
        judge_exponential(records["exponential"]),
        judge_equilibrium(config, records["equilibrium"]),
    ]


def exactly(worst: float, limits: tuple[float, float]) -> str:
    """Verdict of a largest deviation; NaN refutes."""
    return verdict_of(reproduced=worst <= limits[0], refuted=not worst <= limits[1])


def _finding(
    claim: Claim,
    measured: Mapping[str, float],
    worst: float,
    limits: tuple[float, float],
    controls: Mapping[str, float],
    note: str,
    *others: str,
) -> Finding:
    """Finding of a largest deviation, of controls that must all fail, and of other verdicts."""
    seen = REPRODUCED if min(controls.values()) > _SEEN else INCONCLUSIVE
    verdict = conjunction(exactly(worst, limits), seen, *others)
    return Finding(claim, measured, (worst, worst), verdict, note)


def _judge_backprop(config: Config, records: Sequence[Record]) -> Finding:
    by_interface = [record[interface] for record in records for interface in identities.INTERFACES]
    worst = {kind: numbers(by_interface, kind).max() for kind in identities.KINDS}
    farthest = int(np.argmax(np.abs(np.log(config.scales))))  # from 1
    controls = {n: numbers(records, n)[:, farthest].min() for n in ("no BN", "bias inside")}
    return _finding(
        CLAIMS[0],
        {
            **{f"largest deviation, {kind}": value for kind, value in worst.items()},
            **{f"smallest deviation, {name}": value for name, value in controls.items()},
            "bias right before BN": numbers(records, "bias before BN").max(),
        },
        max(worst.values()),
        IDENTITIES,
        controls,
        "interval: the largest deviation of all. Deviations are relative to the largest value. Of "
        "the controls the smallest over seeds and layers, at the scale farthest from 1. A bias "
        "right before BN does no harm: BN subtracts it",
    )


def judge_tangent(records: Sequence[Record]) -> Finding:
    """gradient-is-tangent."""
    measured, controls = {}, {}
    for key in ("share", "pythagoras"):
        for name in dict.fromkeys(record["network"] for record in records):
            of_network = [record[key] for record in records if record["network"] == name]
            measured[f"largest {key}, {name}"] = max(of_network)
            if name != "BN":
                controls[f"{key}, {name}"] = min(of_network)
    return _finding(
        CLAIMS[1],
        measured,
        max(measured["largest share, BN"], measured["largest pythagoras, BN"]),
        IDENTITIES,
        controls,
        "share: |⟨w, ∇L⟩|/(‖w‖‖∇L‖); pythagoras: |‖w⁺‖² − ‖w‖² − η²‖∇L‖²|/‖w‖². Largest of "
        "all seeds, steps and hidden layers",
    )


def judge_effective_rate(records: Sequence[Record]) -> Finding:
    """effective-learning-rate."""
    worst: dict[str, float] = {}
    for record in records:
        for c, value in record["difference"].items():
            key = f"largest difference, c = {c}, momentum {record['momentum']:g}"
            worst[key] = max(worst.get(key, 0.0), value)
    controls = _smallest(records)
    return _finding(
        CLAIMS[2],
        {**worst, **controls},
        max(worst.values()),
        TRAJECTORIES,
        controls,
        "of the losses of all steps and seeds, in nats; controls are those of the c nearest 1",
    )


def _smallest(records: Sequence[Record]) -> dict[str, float]:
    """Control -> the smallest difference that it makes."""
    names = records[0]["control"]
    return {f"smallest difference, {n}": min(r["control"][n] for r in records) for n in names}


def judge_exponential(records: Sequence[Record]) -> Finding:
    """exponential-rate-equals-weight-decay."""
    largest = max(record["difference"] for record in records)
    growth = min(record["growth"] for record in records)
    controls = _smallest(records)
    return _finding(
        CLAIMS[3],
        {"largest difference of losses": largest, "growth of the rate": growth, **controls},
        largest,
        TRAJECTORIES,
        controls,
        "of the losses of all steps and seeds, in nats; the control without BN is over its "
        "first 50 steps",
        REPRODUCED if growth >= _GROWTH else INCONCLUSIVE,
    )


def judge_equilibrium(config: Config, records: Sequence[Record]) -> Finding:
    """equilibrium-angle."""
    judged = [record for record in records if record["network"] == config.network]
    wide = [record for record in records if record["network"] != config.network]

    def ratios(chosen: Sequence[Record], key: str = "rms") -> np.ndarray:
        return numbers(chosen, key) / numbers(chosen, "predicted")[:, None]

    def off(chosen: Sequence[Record]) -> float:
        return np.abs(ratios(chosen) - 1).max()

    worst = estimate([off(by_seed(judged, seed=seed)) for seed in range(config.seeds)])
    late = config.equilibrium_steps - config.equilibrium_steps // 2
    drifts = np.abs(np.log(numbers(judged, "norm_drift"))).max(axis=1)
    decays = numbers(judged, lambda r: late * r["rate"] * r["decay"] / (1 - r["momentum"]))
    drift = (drifts / decays).max()  # of log ‖w‖, over what decay alone would do
    overdamped = [r for r in judged if r["rate"] * r["decay"] <= largest_product(r["momentum"])]
    measured = {
        "largest |rms angle/theory − 1|": worst.mean,
        "largest, over seeds": off(judged),
        "lowest ratio": ratios(judged).min(),
        "highest ratio": ratios(judged).max(),
        "largest drift of a norm, over that by decay alone": drift,
        "largest, where ηλ ≤ (1 − √α)²": off(overdamped),
    }
    for momentum in dict.fromkeys(record["momentum"] for record in judged):
        chosen = [record for record in judged if record["momentum"] == momentum]
        measured[f"ratio, momentum {momentum:g}"] = ratios(chosen).mean()
        measured[f"ratio of the mean angle, momentum {momentum:g}"] = ratios(chosen, "mean").mean()
    measured |= {
        "loss, largest": max(record["loss"] for record in judged),
        "loss, wide network": numbers(wide, "loss").mean(),
        "ratio, wide network": ratios(wide).mean(),
        "ratio of the mean angle, wide network": ratios(wide, "mean").mean(),
    }
    farthest = np.abs(ratios(judged) - 1)
    index, layer = np.unravel_index(np.argmax(farthest), farthest.shape)
    found = judged[index]
    norms = np.array(found["norms"], float)[len(found["norms"]) // 2 :, layer]
    note = (
        "interval: over seeds, of the largest deviation in a hidden layer and setting. The largest "
        f"of all is that of {found['layers'][layer]} at η = {found['rate']:g}, "
        f"λ = {found['decay']:g}, momentum {found['momentum']:g}, where ‖w‖ has a "
        f"standard deviation of {norms.std() / norms.mean():.0%} of its mean. Wide network: "
        f"{config.wide_network}, without momentum. Where gradients come in bursts, the mean of the "
        "angle falls below its root mean square, which the law is about"
    )
    if diverged := sum(record["diverged"] for record in judged):
        note += f"; {diverged} steps were not finite and not taken"
    decided = verdict_of(reproduced=worst.high <= _NARROW, refuted=worst.low > _WIDE)
    verdict = decided if drift <= _STILL else INCONCLUSIVE
    return Finding(CLAIMS[4], measured, worst.interval, verdict, note)
