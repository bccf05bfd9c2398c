"""The claims of `experiments.ensemble`, and how records of ensembles decide them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bn_research.claims.claim import Claim
from bn_research.claims.estimate import Estimate, estimate, paired_difference
from bn_research.claims.finding import INCONCLUSIVE, Finding, verdict_of
from bn_research.claims.judging import lost, with_intervals
from experiments.ensemble import Config
from experiments.ensemble.training import SEEDS, VARIED, Records

_AT_LEAST, _EXPECTED = 0.05, 0.20  # relative error reduction
_LEARNED = 3  # times the accuracy of chance

_GUARD = (
    "Inconclusive if the networks have not learned: their mean accuracy is below "
    f"{_LEARNED} times chance"
)
_ABOVE_0 = f"Reproduced if it lies above 0; not reproduced if it lies at 0 or below. {_GUARD}"


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
        f"with the same seeds, by the 95 % paired interval over ensembles. {_ABOVE_0}",
        expected="unknown",
    ),
    Claim(
        id="ensemble-calibrates",
        statement="The ensemble's probabilities are better calibrated than one network's",
        source="Own; Lakshminarayanan et al. (2017) find it for deep ensembles",
        criterion="mean expected calibration error (15 bins) of the six networks − that of their "
        f"ensemble, by the 95 % paired interval over ensembles. {_ABOVE_0}",
        expected="above 0 if single networks are too confident; below if they are not confident "
        "enough, for averaging makes confidence smaller",
    ),
    Claim(
        id="mc-bn-calibrates",
        statement="Averaging one network's predictions over the statistics of random training "
        "batches (MC-BN) predicts better probabilities than population statistics",
        source="Teye, Azizpour & Smith (2018), whose measure is the predictive log likelihood",
        criterion="negative log likelihood of a network by population statistics − that by MC-BN "
        f"with the most draws, by the 95 % paired interval over networks. {_ABOVE_0}",
        expected="above 0",
    ),
)

Ensemble = Mapping[str, Any]  # `members`, records of networks; `scores`, `sizes`, `disagreement`
# Estimates, or means alone; a claim's first is what its criterion is about.
Numbers = dict[str, Any]

_WORDS = {"error": "error", "error 2": "top-2 error", "error 5": "top-5 error"}
_WORDS |= {"nll": "NLL", "brier": "Brier score", "ece": "ECE"}


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


def judge(config: Config, records: Records) -> list[Finding]:
    """The findings of all claims, in their order."""
    varied, seeds = records.ensembles[VARIED], records.ensembles[SEEDS]
    accuracy = 1 - np.mean([single(e, "error") for e in (*varied, *seeds)])
    learned = accuracy >= _LEARNED / records.num_classes
    found = _of_six(varied), _of_settings(varied, seeds), _of_calibration(varied), _of_mc_bn(seeds)
    findings = []
    for claim, measured in zip(CLAIMS, found, strict=True):
        tested: Estimate = next(iter(measured.values()))
        enough, note = tested.low > 0, _note(varied, seeds)
        if claim is CLAIMS[0]:
            enough = tested.low >= _AT_LEAST
            if tested.mean > _EXPECTED:
                note = f"The reduction is above the {_EXPECTED:.0%} expected. {note}"
        verdict = verdict_of(reproduced=enough, refuted=tested.high <= 0)
        verdict, numbers = verdict if learned else INCONCLUSIVE, with_intervals(measured)
        findings.append(Finding(claim, numbers, tested.interval, verdict, note))
    return findings


def _over(ensembles: Sequence[Ensemble], pick: Callable[[Ensemble], float]) -> Estimate:
    return estimate([pick(ensemble) for ensemble in ensembles])


def _of_six(varied: Sequence[Ensemble]) -> Numbers:
    found = {"relative error reduction": _over(varied, lambda e: 1 - left(e)), **_scores(varied)}
    for score in ("error 5", "nll", "brier"):
        reduction = estimate([1 - left(e, score) for e in varied])
        found[f"relative reduction of {_WORDS[score]}"] = reduction
    for size, errors in enumerate(zip(*(e["sizes"]["error"] for e in varied), strict=True), 1):
        found[f"error, ensemble of {size}"] = estimate(errors)
    best = [min(member["scores"]["error"] for member in e["members"]) for e in varied]
    found["error, best single"] = estimate(best)
    return found | {"disagreement": _over(varied, lambda e: e["disagreement"])}


def _of_settings(varied: Sequence[Ensemble], seeds: Sequence[Ensemble]) -> Numbers:
    def gain(pick: Callable[[Ensemble], float]) -> Estimate:
        return paired_difference([pick(e) for e in seeds], [pick(e) for e in varied])

    found = {
        "error, one setting − six settings": gain(lambda e: e["scores"]["error"]),
        "single, one setting − six settings": gain(lambda e: single(e, "error")),
        "single NLL, one setting − six settings": gain(lambda e: single(e, "nll")),
    }
    for kind, these in ((SEEDS, seeds), (VARIED, varied)):
        found[f"relative error reduction, {kind}"] = _over(these, lambda e: 1 - left(e))
        found[f"disagreement, {kind}"] = _over(these, lambda e: e["disagreement"])
    return found | _scores(seeds)


def _of_calibration(varied: Sequence[Ensemble]) -> Numbers:
    singles = _over(varied, lambda e: single(e, "confidence") - 1 + single(e, "error"))
    six = _over(varied, lambda e: e["scores"]["confidence"] - 1 + e["scores"]["error"])
    return {
        "ECE, single − ensemble": _over(varied, lambda e: single(e, "ece") - e["scores"]["ece"]),
        "confidence − accuracy, single": singles,
        "confidence − accuracy, ensemble": six,
        **_scores(varied, ("ece", "nll", "brier")),
    }


def _of_mc_bn(seeds: Sequence[Ensemble]) -> Numbers:
    networks = [first(e) for e in seeds]

    def values(score: str, draws: str) -> list[float]:
        return [(n["mc_bn"][draws] if draws else n["scores"])[score] for n in networks]

    def gain(score: str, draws: str) -> Estimate:
        return paired_difference(values(score, ""), values(score, draws))

    found: Numbers = {}
    scores = ("nll", "error", "ece", "brier")
    for number in sorted(networks[0]["mc_bn"], key=int, reverse=True):
        for score in scores:
            found[f"{_WORDS[score]}, population − {number} draws"] = gain(score, number)
            found[f"{_WORDS[score]}, {number} draws"] = np.mean(values(score, number))
    most = most_draws(seeds)
    for score in scores:
        found[f"{_WORDS[score]}, population"] = np.mean(values(score, ""))
        saved = np.mean([single(e, score) - e["scores"][score] for e in seeds])
        if saved:
            share = gain(score, most).mean / saved
            found[f"{_WORDS[score]}, saved by {most} draws over saved by six"] = share
    return found


def _scores(ensembles: Sequence[Ensemble], scores: Sequence[str] = tuple(_WORDS)) -> Numbers:
    found: Numbers = {}
    for score in scores:
        found[f"{_WORDS[score]}, single"] = estimate([single(e, score) for e in ensembles])
        found[f"{_WORDS[score]}, ensemble"] = estimate([e["scores"][score] for e in ensembles])
    return found


def _note(varied: Sequence[Ensemble], seeds: Sequence[Ensemble]) -> str:
    members = [member for e in (*varied, *seeds) for member in e["members"]]
    strategies = ", ".join(sorted({member["strategy"] for member in members}))
    return (
        f"{len(varied)} ensembles of each kind; all see one training set and one test "
        "set, so an interval tells of initial weights and of the order of examples, not of other "
        f"images. Population statistics (algorithm 2). Networks trained in a sweep: {strategies}"
        f"{lost(members, runs='networks')}"
    )
