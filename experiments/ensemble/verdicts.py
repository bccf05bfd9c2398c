"""The claims of `experiments.ensemble`, and how records of ensembles decide them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bn_research.claims.claim import Claim
from bn_research.claims.estimate import Estimate, estimate, paired_difference
from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED, Finding, decide

VARIED, SEEDS = "six settings", "one setting"  # the two kinds of ensemble

_AT_LEAST, _EXPECTED = 0.05, 0.20  # relative error reduction
_LEARNED = 3  # times the accuracy of chance

_GUARD = (
    "Inconclusive if the networks have not learned: their mean accuracy is below "
    f"{_LEARNED} times chance"
)


class Published(NamedTuple):
    """Ioffe & Szegedy (2015), figure 4 and section 4.2.3: ImageNet, 144 crops, in per cent."""

    single: float  # error of BN-Inception
    six: float  # of the ensemble, on the validation set
    test: float | None = None  # on the test set

    @property
    def left(self) -> float:
        """Error of the six over that of one."""
        return self.six / self.single


PUBLISHED = {"top-1": Published(21.99, 20.1), "top-5": Published(5.82, 4.9, 4.82)}

CLAIMS = (
    Claim(
        id="ensemble-of-six",
        statement="Six BN networks, whose class probabilities are averaged, err less than one",
        source="Notes; Paper, section 4.2.3 and figure 4: top-1 error 20.1 % against 21.99 % of "
        "one network with 144 crops, top-5 4.9 % (test set 4.82 %) against 5.82 %",
        criterion="1 − error of the ensemble / mean error of its six networks, by the 95 % "
        "interval over independent ensembles of networks that differ as the paper's do (initial "
        "weights, dropout of 5 or 10 %, per-activation BN in the last hidden layers). Reproduced "
        f"if the interval lies at {_AT_LEAST} or above; not reproduced if it lies at 0 or below. "
        + _GUARD,
        expected="0.05 to 0.20; 0.086 for the paper's top-1 error",
    ),
    Claim(
        id="varied-settings-help",
        statement="Networks of different settings make a better ensemble than networks that differ "
        "in the seed alone",
        source="Own, after the paper, whose six networks differ in their settings",
        criterion="error of six networks of one setting − error of six networks of six settings "
        "with the same seeds, by the 95 % paired interval over ensembles. Reproduced if it lies "
        f"above 0; not reproduced if it lies at 0 or below. {_GUARD}",
        expected="unknown",
    ),
    Claim(
        id="ensemble-calibrates",
        statement="The ensemble's probabilities are better calibrated than one network's",
        source="Own; Lakshminarayanan et al. (2017) find it for deep ensembles",
        criterion="mean expected calibration error (15 bins) of the six networks − that of their "
        "ensemble, by the 95 % paired interval over ensembles. Reproduced if it lies above 0; not "
        f"reproduced if it lies at 0 or below. {_GUARD}",
        expected="above 0 if single networks are too confident; below if they are not confident "
        "enough, for averaging makes confidence smaller",
    ),
    Claim(
        id="mc-bn-calibrates",
        statement="Averaging one network's predictions over the statistics of random training "
        "batches (MC-BN) predicts better probabilities than population statistics",
        source="Teye, Azizpour & Smith (2018), whose measure is the predictive log likelihood",
        criterion="negative log likelihood of a network by population statistics − that by MC-BN "
        "with the most draws, by the 95 % paired interval over networks. Reproduced if it lies "
        f"above 0; not reproduced if it lies at 0 or below. {_GUARD}",
        expected="above 0",
    ),
)

Ensemble = Mapping[str, Any]  # `members`, records of networks; `scores`, `sizes`, `disagreement`
Ensembles = Mapping[str, Sequence[Ensemble]]  # by kind, one for each seed


def single(ensemble: Ensemble, score: str) -> float:
    """Mean of a score over the networks of an ensemble."""
    return float(np.mean([member["scores"][score] for member in ensemble["members"]]))


def left(ensemble: Ensemble, score: str = "error") -> float:
    """A score of an ensemble over the mean of its networks; 1 where there is nothing to reduce."""
    of_one = single(ensemble, score)
    return ensemble["scores"][score] / of_one if of_one else 1.0


def first(ensemble: Ensemble) -> Mapping[str, Any]:
    """The network of an ensemble that predicts by MC-BN, too."""
    return ensemble["members"][0]


def most_draws(ensembles: Sequence[Ensemble]) -> str:
    """The largest number of draws of MC-BN, as the records name it."""
    return max(first(ensembles[0])["mc_bn"], key=int)


def judge(config: Any, ensembles: Ensembles, num_classes: int) -> list[Finding]:
    """The findings of all claims, in their order.

    Args:
      config: of the run.
      ensembles: of both kinds.
      num_classes: of the data set.
    """
    accuracy = 1 - np.mean([single(e, "error") for kind in ensembles.values() for e in kind])
    learned = accuracy >= _LEARNED / num_classes
    found = (
        _judge_six(ensembles[VARIED]),
        _judge_settings(ensembles),
        _judge_calibration(ensembles[VARIED]),
        _judge_mc_bn(ensembles),
    )
    note = _note(config, ensembles)
    findings = []
    for claim, (tested, verdict, measured, told) in zip(CLAIMS, found, strict=True):
        verdict = verdict if learned else INCONCLUSIVE
        findings.append(Finding(claim, measured, tested.interval, verdict, told + note))
    return findings


_Judged = tuple[Estimate, str, dict[str, float], str]


def _judge_six(varied: Sequence[Ensemble]) -> _Judged:
    reduction = estimate([1 - left(e) for e in varied])
    verdict = decide(reduction, at_least=_AT_LEAST)
    if verdict == NOT_REPRODUCED and reduction.high > 0:
        verdict = INCONCLUSIVE  # smaller than expected, but a reduction
    measured = _numbers("relative error reduction", reduction)
    measured |= _of_kind(varied)
    for score in ("error 5", "nll", "brier"):
        measured |= _numbers(
            f"relative reduction of {_WORDS[score]}", estimate([1 - left(e, score) for e in varied])
        )
    for size, errors in enumerate(zip(*(e["sizes"]["error"] for e in varied), strict=True), 1):
        measured |= _numbers(f"error, ensemble of {size}", estimate(errors))
    best = [min(m["scores"]["error"] for m in e["members"]) for e in varied]
    measured |= _numbers("error, best single", estimate(best))
    measured |= _numbers("disagreement", estimate([e["disagreement"] for e in varied]))
    told = ""
    if reduction.mean > _EXPECTED:
        told = f"The reduction is above the {_EXPECTED:.0%} expected. "
    return reduction, verdict, measured, told


def _judge_settings(ensembles: Ensembles) -> _Judged:
    varied, seeds = ensembles[VARIED], ensembles[SEEDS]
    gain = paired_difference(*([e["scores"]["error"] for e in these] for these in (seeds, varied)))
    measured = _numbers("error, one setting − six settings", gain)
    for name, score in (("single", "error"), ("single NLL", "nll")):
        found = paired_difference(*([single(e, score) for e in these] for these in (seeds, varied)))
        measured |= _numbers(f"{name}, one setting − six settings", found)
    for kind, these in ((SEEDS, seeds), (VARIED, varied)):
        found = estimate([1 - left(e) for e in these])
        measured |= _numbers(f"relative error reduction, {kind}", found)
        found = estimate([e["disagreement"] for e in these])
        measured |= _numbers(f"disagreement, {kind}", found)
    measured |= _of_kind(seeds)
    return gain, _above_zero(gain), measured, ""


def _judge_calibration(varied: Sequence[Ensemble]) -> _Judged:
    gain = estimate([single(e, "ece") - e["scores"]["ece"] for e in varied])
    measured = _numbers("ECE, single − ensemble", gain)
    singles = [single(e, "confidence") - 1 + single(e, "error") for e in varied]
    six = [e["scores"]["confidence"] - 1 + e["scores"]["error"] for e in varied]
    for name, values in (("single", singles), ("ensemble", six)):
        measured |= _numbers(f"confidence − accuracy, {name}", estimate(values))
    measured |= _of_kind(varied, ("ece", "nll", "brier"))
    return gain, _above_zero(gain), measured, ""


def _judge_mc_bn(ensembles: Ensembles) -> _Judged:
    networks = [first(e) for e in ensembles[SEEDS]]
    draws = most_draws(ensembles[SEEDS])

    def gain(score: str, number: str) -> Estimate:
        return paired_difference(
            [n["scores"][score] for n in networks], [n["mc_bn"][number][score] for n in networks]
        )

    tested = gain("nll", draws)
    measured: dict[str, float] = {}
    for number in sorted(networks[0]["mc_bn"], key=int, reverse=True):
        for score in ("nll", "error", "ece", "brier"):
            word = _WORDS[score]
            measured |= _numbers(f"{word}, population − {number} draws", gain(score, number))
            mean = np.mean([n["mc_bn"][number][score] for n in networks])
            measured[f"{word}, {number} draws"] = float(mean)
    for score in ("nll", "error", "ece", "brier"):
        mean = np.mean([n["scores"][score] for n in networks])
        measured[f"{_WORDS[score]}, population"] = float(mean)
        saved = np.mean([single(e, score) - e["scores"][score] for e in ensembles[SEEDS]])
        if saved:
            share = gain(score, draws).mean / saved
            measured[f"{_WORDS[score]}, saved by {draws} draws over saved by six"] = float(share)
    return tested, _above_zero(tested), measured, ""


_WORDS = {
    "error": "error",
    "error 2": "top-2 error",
    "error 5": "top-5 error",
    "nll": "NLL",
    "brier": "Brier score",
    "ece": "ECE",
}


def _of_kind(ensembles: Sequence[Ensemble], scores: Sequence[str] = tuple(_WORDS)):
    measured: dict[str, float] = {}
    for score in scores:
        of_one = estimate([single(e, score) for e in ensembles])
        measured |= _numbers(f"{_WORDS[score]}, single", of_one)
        measured |= _numbers(
            f"{_WORDS[score]}, ensemble", estimate([e["scores"][score] for e in ensembles])
        )
    return measured


def _above_zero(found: Estimate) -> str:
    if found.high <= 0:
        return NOT_REPRODUCED
    return REPRODUCED if found.low > 0 else INCONCLUSIVE


def _numbers(name: str, found: Estimate) -> dict[str, float]:
    return {name: found.mean, f"{name}, low": found.low, f"{name}, high": found.high}


def _note(config: Any, ensembles: Ensembles) -> str:
    members = [m for kind in ensembles.values() for e in kind for m in e["members"]]
    strategies = ", ".join(sorted({m["strategy"] for m in members}))
    note = (
        f"{len(ensembles[VARIED])} ensembles of each kind; all see one training set and one test "
        "set, so an interval tells of initial weights and of the order of examples, not of other "
        f"images. Population statistics (algorithm 2). Networks trained in a sweep: {strategies}"
    )
    lost = sum(m["diverged"] > 0 for m in members)
    if lost:
        note += f". Of {len(members)} networks {lost} had steps that were not finite and not taken"
    return note
