"""What a field of a config allows, said by its type.

    seeds: Count = 3
    rates: Some[Positive] = (0.1, 0.3)

A config is a `pydantic.dataclasses.dataclass(frozen=True)`, often of `OnDataset` or `OnImages`. Its
field types are checked whenever one is made. Checks between fields stand in its `__post_init__` and
raise ValueError in one line: NAME=VALUE is not allowed, and what is. Other bounds are written where
they are needed, as `Annotated[int, Field(ge=3)]`.
"""

from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from bn_research.models.spec import num_logits

T = TypeVar("T")


def _distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    if len(set(values)) < len(values):
        raise ValueError("must hold each entry once")
    return values


def _ascending(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if list(values) != sorted(set(values)):
        raise ValueError("must ascend")
    return values


def holding(*needed: Any) -> AfterValidator:
    """What a claim needs of a tuple: these entries.

    `epsilons: Annotated[Some[NonNegative], holding(0.0)] = (0.0, 1e-5)`
    """

    def check(values: tuple[Any, ...]) -> tuple[Any, ...]:
        missing = [value for value in needed if value not in values]
        if missing:
            raise ValueError(f"must hold {', '.join(map(repr, missing))}: a claim is about it")
        return values

    return AfterValidator(check)


def _spec(network: str) -> str:
    num_logits(network)
    return network


Count = Annotated[int, Field(ge=1, strict=True)]
OrNone = Annotated[int, Field(ge=0, strict=True)]  # 0 is all, or leaves it out
Several = Annotated[int, Field(ge=2, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Share = Annotated[float, Field(ge=0, lt=1, strict=True)]  # [0, 1)
Inside = Annotated[float, Field(gt=0, lt=1, strict=True)]  # (0, 1)
Distinct = Annotated[tuple[T, ...], AfterValidator(_distinct)]  # none are allowed
Some = Annotated[tuple[T, ...], Field(min_length=1), AfterValidator(_distinct)]
Ascending = Annotated[tuple[T, ...], Field(min_length=1), AfterValidator(_ascending)]
Network = Annotated[str, AfterValidator(_spec)]  # a spec that ends in logits
Strategy = Literal["auto", "in_turn", "devices", "vmap"]  # of sweeps; auto measures
CompilerLevel = Annotated[int, Field(ge=0, le=3, strict=True)]  # see `compiler.compiler_options`


@dataclass(frozen=True)
class OnDataset:
    """What a config says of its data."""

    dataset: str = "digits"
    data_dir: str = ""  # where tfds keeps prepared sets; "" is its default
    manual_dir: str = ""  # where source files lie; "" is the set's default


@dataclass(frozen=True)
class OnImages(OnDataset):
    """Likewise, of images that are resized."""

    image_size: OrNone = 0  # height and width; 0 keeps the set's own


def whole_dispatches(config: Any, *names: str, least: int = 1) -> None:
    """ValueError unless each field is a multiple of `steps_per_dispatch`, `least` times or more.

    A name PREFIX_steps goes with PREFIX_steps_per_dispatch where the config has that.
    """
    for name in names:
        own = f"{name}_per_dispatch"
        each_name = own if hasattr(config, own) else "steps_per_dispatch"
        steps, each = getattr(config, name), getattr(config, each_name)
        if steps % each or steps < least * each:
            more = f", {least} of them or more" if least > 1 else ""
            raise ValueError(
                f"{name}={steps} is not allowed: it must be a multiple of {each_name}={each}{more}"
            )


def at_most(config: Any, most: int, what: str, *names: str) -> None:
    """ValueError unless no field, or entry of one, is above what there is."""
    for name in names:
        value = getattr(config, name)
        if (max(value, default=0) if isinstance(value, tuple) else value) > most:
            raise ValueError(f"{name}={value} is not allowed: at most {most}, {what}")


def in_words(error: pydantic.ValidationError) -> str:
    """What is wrong with a config, in one line: of each field what was found first."""
    told: dict[Any, str] = {}
    for found in error.errors(include_url=False):
        place = found["loc"]
        said = found["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        if found["type"] == "too_short":
            said = f"must have {found['ctx']['min_length']} or more entries"
        if place:
            name = "".join(f"[{p}]" if isinstance(p, int) else str(p) for p in place[:2])
            said = f"{name}={found['input']!r} is not allowed: {said}"
        told.setdefault(place[:1], said)
    return "; ".join(told.values())
