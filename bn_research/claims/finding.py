"""What a run found out about a claim, and the verdict of an interval.

A verdict never rests on a mean alone: an interval that spans the criterion is inconclusive, and
one seed gives no interval at all.
"""

import dataclasses
import math
from collections.abc import Mapping

from bn_research.claims.claim import Claim
from bn_research.claims.estimate import Estimate

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
INCONCLUSIVE = "inconclusive"
VERDICTS = (REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE)


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a run found out about one claim.

    Attributes:
      claim: the claim that was tested.
      measured: named numbers; one that is not finite is allowed, since it is a finding too.
      interval: `(low, high)` of the quantity that the criterion is about, or None.
      verdict: one of `VERDICTS`.
      note: anything a reader must know: seeds that failed, controls that surprise.

    Raises:
      ValueError: the verdict is unknown, or the interval is not an ordered pair.
    """

    claim: Claim
    measured: Mapping[str, float]
    interval: tuple[float, float] | None
    verdict: str
    note: str = ""

    def __post_init__(self) -> None:
        _check_verdict(self.verdict)
        if self.interval is not None:
            _check_interval(self.interval)


def decide(
    interval: Estimate | tuple[float, float],
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
) -> str:
    """Verdict of an interval against the closed range `[at_least, at_most]`.

    Args:
      interval: an estimate, or a pair `(low, high)`; `(x, x)` for an exact number.
      at_least: lower end of the range that the criterion allows.
      at_most: upper end of it.

    Returns:
      `REPRODUCED` if the interval lies inside the range, `NOT_REPRODUCED` if the two are
      disjoint, `INCONCLUSIVE` otherwise.

    Raises:
      ValueError: the interval is not an ordered pair, or the range is empty or without bounds.
    """
    low, high = _check_interval(
        interval.interval
        if isinstance(interval, Estimate)
        else interval  # an Estimate has 4 fields
    )
    if not at_least <= at_most:
        raise ValueError(f"at_least must not exceed at_most, got {at_least} and {at_most}")
    if at_least == -math.inf and at_most == math.inf:
        raise ValueError(
            "at_least or at_most must be given: nothing can fail a range without bounds"
        )
    if at_least <= low and high <= at_most:
        return REPRODUCED
    if high < at_least or low > at_most:
        return NOT_REPRODUCED
    return INCONCLUSIVE


def verdict_of(*, reproduced: bool, refuted: bool) -> str:
    """Verdict of the two conditions of a criterion on intervals; a refutation comes first.

    `verdict_of(reproduced=found.low > 0, refuted=found.high <= 0)`: a criterion may leave room
    between the two, where nothing is decided.
    """
    if refuted:
        return NOT_REPRODUCED
    return REPRODUCED if reproduced else INCONCLUSIVE


def conjunction(*verdicts: str) -> str:
    """Verdict of a claim of several parts, which is as strong as its weakest part."""
    if not verdicts:
        raise ValueError("verdicts must not be empty")
    for verdict in verdicts:
        _check_verdict(verdict)
    for verdict in (NOT_REPRODUCED, INCONCLUSIVE):
        if verdict in verdicts:
            return verdict
    return REPRODUCED


def _check_interval(interval: tuple[float, float]) -> tuple[float, float]:
    # `not low <= high` also catches NaN, of which every comparison is false.
    if len(interval) != 2 or not interval[0] <= interval[1]:
        raise ValueError(f"interval must be a pair low <= high, got {interval!r}")
    return interval


def _check_verdict(verdict: str) -> None:
    if verdict not in VERDICTS:
        raise ValueError(f"verdict must be one of {VERDICTS}, got {verdict!r}")
