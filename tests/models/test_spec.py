"""Network specs."""

import pytest

from bn_research.models.cnn import DEFAULT_SPEC
from bn_research.models.spec import Conv, Dense, Pool, num_logits, parse_spec


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        ("f10", (Dense(10),)),
        ("f100 f10", (Dense(100), Dense(10))),
        ("c64 f2", (Conv(64, 3), Dense(2))),
        ("c8k5 P c16k1 P f10", (Conv(8, 5), Pool(), Conv(16, 1), Pool(), Dense(10))),
        ("  P   P\tf3 ", (Pool(), Pool(), Dense(3))),
        (
            DEFAULT_SPEC,
            (Conv(64, 3), Pool(), Conv(128, 3), Pool(), Conv(256, 3), Conv(256, 3), Pool())
            + (Dense(512), Dense(512), Dense(10)),
        ),
    ],
)
def test_parse(spec, layers):
    assert parse_spec(spec) == layers


@pytest.mark.parametrize(
    "token",
    ["x64", "c", "f", "c0", "f0", "c-3", "c64k0", "c64k", "f10k3", "p", "P2", "C64", "c6.4"]
    + ["c64,", "c064", "64", "cc64", "c1\u0663"],
)
def test_a_token_that_is_no_layer(token):
    """The message names spec and token and shows what is allowed."""
    with pytest.raises(ValueError) as caught:
        parse_spec(f"c8 {token} f10")
    message = str(caught.value)
    assert f"'c8 {token} f10'" in message and f"{token!r} is not a layer" in message
    assert "cN" in message and "fN" in message and "\n" not in message


@pytest.mark.parametrize("token", ["c8", "P"])
def test_nothing_but_dense_layers_after_a_dense_layer(token):
    with pytest.raises(ValueError, match=f"'{token}' follows a dense layer"):
        parse_spec(f"f4 {token} f10")


@pytest.mark.parametrize("spec", ["", "  ", "c8", "c8 P"])
def test_the_head_is_dense(spec):
    with pytest.raises(ValueError, match="does not end in a dense layer"):
        parse_spec(spec)


def test_num_logits():
    assert num_logits("c8 f12 f10") == 10
    with pytest.raises(ValueError, match="does not end in a dense layer"):
        num_logits("c8")
