"""The claim of `experiments.audit`, why a parameter is invariant or not, and the verdict."""

import math
from collections.abc import Mapping, Sequence

from bn_research.claims.claim import Claim
from bn_research.claims.finding import Finding, verdict_of
from bn_research.claims.judging import Record
from bn_research.probes.scale_invariance import Audit, Row
from experiments.audit import Config

ARMS = ("BN", "no BN")
Records = Mapping[str, Sequence[Record]]  # audits of each arm, by seed
_LISTED = 6  # paths of one reason that are printed

CLAIMS = (
    Claim(
        id="bn-makes-kernels-invariant",
        statement="In a whole network BN makes the weights in front of it scale-invariant, and "
        "nothing else does",
        source="Ioffe & Szegedy (2015), section 3.3; van Laarhoven (2017), arXiv 1706.05350",
        criterion="Reproduced if for every seed, with BN, each kernel with BN after it is "
        "invariant, alone or in a group, and no parameter without BN after it is, and if without "
        "BN none is; not reproduced if of any of the three it is more than half the other way",
        expected="all; none; none",
    ),
)

WHY = {
    "invariant": "invariant: BN after it divides its scale out, and weight decay only sets its "
    "learning rate",
    "no effect": "without effect: BN after it subtracts all that it adds",
    "unused": "without effect on this loss",
    "group": "invariant only together: BN after it sees it added to others, and scaling one alone "
    "changes their proportion",
    "around": "not invariant, though BN comes after it: part of what it does goes around BN, or "
    "the variance there is not large beside ε",
    "kernel": "not invariant: no BN comes after it, and it scales the logits",
    "bias": "not invariant: no BN comes after it, and the shift that it adds to the logits grows "
    "with it",
    "last": "not invariant: no BN comes after it, and the head passes its scale on to the logits",
    "nothing": "not invariant: there is no BN",
}


def judge(config: Config, records: Records) -> list[Finding]:
    """bn-makes-kernels-invariant."""
    before = alone = together = after = wrong = 0
    for record in records["BN"]:
        found = restored(config, record)
        grouped = {path for group in found.groups for path in group}
        for path, row in found.items():
            invariant = row.kind == "invariant"
            if path not in record["normalized"]:
                after += 1
                wrong += invariant or path in grouped
            elif path.endswith("['kernel']"):
                before += 1
                alone += invariant
                together += not invariant and path in grouped
    plain = [restored(config, record) for record in records["no BN"]]
    total = sum(map(len, plain))
    control = sum(row.kind == "invariant" for found in plain for row in found.values())
    control += sum(len(found.groups) for found in plain)
    verdict = verdict_of(
        reproduced=alone + together == before > 0 and wrong == control == 0,
        refuted=2 * (alone + together) < before or 2 * wrong > after or 2 * control > total,
    )
    measured = {
        "kernels with BN after them": before,
        "of them, invariant alone": alone,
        "of them, only in a group": together,
        "parameters without BN after them": after,
        "of them, invariant": wrong,
        "parameters without any BN": total,
        "of them, invariant, no BN": control,
    }
    note = f"numbers of parameters of {config.model}, over all {config.seeds} seeds"
    return [Finding(CLAIMS[0], measured, None, verdict, note)]


def restored(config: Config, record: Record) -> Audit:
    """The audit of a record."""
    unknown = {"degree": math.nan}  # the ledger has None
    rows = [Row(**row | (unknown if row["degree"] is None else {})) for row in record["rows"]]
    groups = [tuple(group) for group in record["groups"]]
    given = {"loss": record["loss"], "scales": record["scales"], "tolerance": config.tolerance}
    return Audit(rows, groups, **given)


def why(found: Audit, normalized: Sequence[str], path: str) -> str:
    """A key of WHY for the leaf at a path; BN comes after those of the paths `normalized`."""
    row = found[path]
    if row.kind == "invariant":
        return row.kind
    if row.kind == "no effect":
        return "no effect" if path in normalized else "unused"
    if any(path in group for group in found.groups):
        return "group"
    if path in normalized:
        return "around"
    if not normalized:
        return "nothing"
    # What no BN comes after is the head's, or the last BN's own.
    if path.endswith("['kernel']"):
        return "kernel"
    norm = path.rpartition("[")[0] + "['scale']" in found
    return "last" if norm else "bias"


def explained(found: Audit, normalized: Sequence[str]) -> str:
    """Every reason with the parameters it holds for, as text for a terminal."""
    chosen: dict[str, list[str]] = {key: [] for key in WHY}
    for path in found:
        chosen[why(found, normalized, path)].append(path)
    lines = []
    for key, paths in chosen.items():
        more = f", and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
        if paths:
            lines += [f"{len(paths)} {WHY[key]}:", f"    {', '.join(paths[:_LISTED])}{more}"]
    return "\n".join(lines)
