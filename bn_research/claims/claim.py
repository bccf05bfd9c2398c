"""What is claimed, by whom, and what would count as evidence for or against it."""

import dataclasses
import re
from collections.abc import Iterable

SLUG = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")  # of a claim's id


@dataclasses.dataclass(frozen=True)
class Claim:
    """One testable sentence, with the criterion that was fixed before the run.

    Attributes:
      id: slug in lower case, words joined by single hyphens: `"no-training-without-bn"`.
      statement: the claim, as one sentence.
      source: who claims it.
      criterion: what counts as reproduced and what as not reproduced, in words.
      expected: what the source or the theory leads one to expect.

    Raises:
      ValueError: a field is empty or not text, or `id` is not a slug.
    """

    id: str
    statement: str
    source: str
    criterion: str
    expected: str

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(
                    f"Claim.{field.name} must be text that is not empty, got {value!r}"
                )
        if not SLUG.fullmatch(self.id):
            raise ValueError(
                "Claim.id must be lower-case words joined by single hyphens, starting with a "
                f"letter, got {self.id!r}"
            )


def check_unique(claims: Iterable[Claim]) -> None:
    """ValueError if two claims share an id: one would hide the other in the results."""
    seen: set[str] = set()
    for claim in claims:
        if claim.id in seen:
            raise ValueError(f"Claim.id must be unique, got {claim.id!r} more than once")
        seen.add(claim.id)
