"""What a field's type allows, and the one line for what it does not."""

import math
from typing import Annotated, Literal

import pydantic
import pytest
from pydantic.dataclasses import dataclass

from bn_research.lab.fields import (
    Ascending,
    CompilerLevel,
    Count,
    Distinct,
    Inside,
    Network,
    NonNegative,
    OrNone,
    Positive,
    Several,
    Share,
    Some,
    Strategy,
    at_most,
    holding,
    in_words,
    whole_dispatches,
)


@dataclass(frozen=True)
class Config:
    count: Count = 1
    or_none: OrNone = 0
    several: Several = 2
    positive: Positive = 1.0
    not_negative: NonNegative = 0.0
    share: Share = 0.0
    inside: Inside = 0.5
    rates: Some[Positive] = (0.3, 0.1)
    sizes: Ascending[Count] = (1, 2)
    names: Some[Literal["relu", "tanh"]] = ("tanh",)
    network: Network = "c4 P f10"
    level: CompilerLevel = 0
    layers: Distinct[Count] = ()
    epsilons: Annotated[Some[NonNegative], holding(0.0, 1.0)] = (1.0, 0.0)
    strategy: Strategy = "auto"
    num_steps: int = 20
    steps_per_dispatch: int = 10
    law_steps: int = 6
    law_steps_per_dispatch: int = 3

    def __post_init__(self):
        whole_dispatches(self, "num_steps", least=2)
        whole_dispatches(self, "law_steps")


ALLOWED = {
    "count": (1, 10**9),
    "or_none": (0, 3),
    "several": (2,),
    "positive": (1e-300, 7, 1e300),
    "not_negative": (0.0, 1e300),
    "share": (0.0, 0.999),
    "inside": (1e-9, 0.999),
    "rates": ((1.0,), (3, 2.5)),
    "sizes": ((1,), (1, 2, 9)),
    "names": (("relu", "tanh"),),
    "network": ("f3",),
    "level": (0, 3),
    "layers": ((), (2, 1)),
    "epsilons": ((0.0, 0.5, 1.0),),
    "strategy": ("in_turn", "devices", "vmap"),
    "num_steps": (20, 50),
    "law_steps": (3, 9),
}
REFUSED = {
    "count": (0, -1, True, 1.5, "3", None),
    "or_none": (-1, True, 0.5),
    "several": (1, 2.5),
    "positive": (0.0, -1.0, math.inf, math.nan, "0.1", True),
    "not_negative": (-1e-300, math.inf, math.nan),
    "share": (1.0, -0.1, math.nan, math.inf),
    "inside": (0.0, 1.0, math.nan),
    "rates": ((), (0.1, 0.1), (0.1, 0.0), (math.nan,), 0.1, ("a",)),
    "sizes": ((), (2, 1), (1, 1), (0, 1)),
    "names": ((), ("gelu",), ("relu", "relu"), "relu"),
    "network": ("", "c4 P", "f3 c4 f10", "x9"),
    "level": (-1, 4),
    "layers": ((1, 1), (0,)),
    "epsilons": ((), (0.0,), (0.5, 1.0), (0.0, 1.0, 0.0)),
    "strategy": ("fast",),
    "num_steps": (10, 25, 0, -20),
    "law_steps": (4, 0),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in ALLOWED.items() for value in values]
)
def test_what_is_allowed_is_kept(name, value):
    assert getattr(Config(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values]
)
def test_what_is_not_is_one_line_that_names_the_field(name, value):
    with pytest.raises(pydantic.ValidationError) as error:
        Config(**{name: value})
    said = in_words(error.value)
    assert said.startswith(name) and "is not allowed: " in said
    assert "\n" not in said and "pydantic" not in said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"count": 0}, "count=0 is not allowed: must be greater than or equal to 1"),
        ({"rates": (1.0, -2.0)}, "rates[1]=-2.0 is not allowed: must be greater than 0"),
        ({"rates": ()}, "rates=() is not allowed: must have 1 or more entries"),
        ({"rates": (0.1, 0.1)}, "rates=(0.1, 0.1) is not allowed: must hold each entry once"),
        ({"names": ("gelu",)}, "names[0]='gelu' is not allowed: must be 'relu' or 'tanh'"),
        (
            {"epsilons": (1.0, 2.0)},
            "epsilons=(1.0, 2.0) is not allowed: must hold 0.0: a claim is about it",
        ),
        (
            {"num_steps": 15},
            "num_steps=15 is not allowed: it must be a multiple of steps_per_dispatch=10, 2 of "
            "them or more",
        ),
        (
            {"law_steps": 4},
            "law_steps=4 is not allowed: it must be a multiple of law_steps_per_dispatch=3",
        ),
        (
            {"count": 0, "level": 9},
            "count=0 is not allowed: must be greater than or equal to 1; level=9 is not allowed: "
            "must be less than or equal to 3",
        ),
    ],
)
def test_the_words(given, said):
    with pytest.raises(pydantic.ValidationError) as error:
        Config(**given)
    assert in_words(error.value) == said


def test_more_than_there_is_names_the_field_and_what_there_is():
    config = Config(count=5, sizes=(1, 7))
    at_most(config, 7, "the training set", "count", "sizes", "layers")
    with pytest.raises(ValueError, match=r"sizes=\(1, 7\) is not allowed: at most 6, the images"):
        at_most(config, 6, "the images", "count", "sizes")
