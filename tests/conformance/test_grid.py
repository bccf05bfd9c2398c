"""The grid of large means, dtypes and ways to share statistics, against float64; and the peers'.

The errors are those of `benchmarks.accuracy`, whose table in the README says who is right where.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.accuracy import (
    Answer,
    answer,
    case,
    gradient_error,
    masked_replica,
    nan_under_mask,
    reference,
    value_error,
    variance_error,
)
from benchmarks.peers import OTHERS, OURS, available, torch_batch_norm

PEERS = {peer.name: peer for peer in available(OTHERS)}
SHARING = {
    "plain": dict(),
    "mask": dict(masked=True),
    "sync": dict(devices=4),
    "mask and sync": dict(masked=True, devices=4),
    "group": dict(),
    "masked group": dict(masked=True),
}


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("ratio", [0, 1e2, 1e3, 1e4])
def test_the_grid(ratio, dtype, sharing):
    """Variance within 1e-5, gradient within 1e-4 and the last bit of the input's dtype."""
    asked = case(ratio, dtype, examples=2048, features=8, **SHARING[sharing])
    group_size = 256 if "group" in sharing else None
    got, expected = answer(OURS, asked, group_size=group_size), reference(asked, group_size)
    rounding = 0 if dtype == "float32" else float(jnp.finfo(dtype).eps)
    assert variance_error(got, expected) <= 1e-5
    assert gradient_error(got, expected) <= 1e-4 + rounding
    assert value_error(got, expected, asked) <= 1e-5
    np.testing.assert_allclose(got.mean, expected.mean, rtol=2e-7, atol=1e-7)


def test_the_reference_is_a_gradient():
    """The closed form of the benchmark itself, against differences of its values."""
    asked = case(3.0, masked=True, examples=24, features=3)
    asked = asked._replace(x=asked.x.astype(np.float64))
    step = 1e-6 * np.random.default_rng(1).standard_normal(asked.x.shape)
    values = [
        np.sum(np.where(asked.where, asked.g, 0) * reference(asked._replace(x=asked.x + d), 8).y)
        for d in (step, -step)
    ]
    np.testing.assert_allclose(
        (values[0] - values[1]) / 2, np.sum(reference(asked, 8).dx * step), rtol=1e-6
    )


# Largest error over the features of one case of 8,192 examples, as the peers' authors left them:
# (peer, what, mean/std, dtype, options) -> least, most. A peer that mends its numbers fails here.
DEVIATIONS = [
    ("flax.linen (default)", variance_error, 1e2, "float32", {}, 3e-4, 1e-2),
    ("flax.linen (default)", variance_error, 1e3, "float32", {}, 2e-2, 1.0),
    ("flax.linen (default)", variance_error, 1e4, "float32", {}, 1.0, 100.0),
    ("flax.linen (default)", gradient_error, 1e3, "float32", {}, 2e-2, 1.0),
    ("flax.linen (default)", variance_error, 1e3, "float32", dict(devices=4), 2e-2, 1.0),
    ("flax.linen (default)", variance_error, 0, "float32", dict(masked=True, devices=4), 1e-2, 0.5),
    ("flax.linen (two-pass)", variance_error, 1e4, "float32", {}, 0, 1e-5),
    ("flax.linen (two-pass)", gradient_error, 1e4, "float32", {}, 3e-6, 1e-3),
    (
        "flax.linen (two-pass)",
        variance_error,
        0,
        "float32",
        dict(masked=True, devices=4),
        1e-2,
        0.5,
    ),
    ("flax.nnx", variance_error, 1e3, "float32", {}, 2e-2, 1.0),
    ("dm-haiku", variance_error, 1e3, "float32", {}, 2e-2, 1.0),
    ("dm-haiku", variance_error, 1e2, "bfloat16", {}, 0.5, 10.0),
    ("equinox (batch)", variance_error, 1e4, "float32", {}, 0, 1e-5),
    ("equinox (batch)", variance_error, 1e2, "bfloat16", {}, 1.0, 100.0),
    ("keras 3 (JAX)", variance_error, 1e4, "float32", {}, 0, 1e-5),
    ("keras 3 (JAX)", gradient_error, 1e4, "float32", {}, 5e-6, 1e-3),
]


@pytest.mark.parametrize(
    ("name", "error", "ratio", "dtype", "options", "least", "most"),
    DEVIATIONS,
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_deviations_of_peers(name, error, ratio, dtype, options, least, most):
    if name not in PEERS:
        pytest.skip(f"{name} is not installed")
    asked = case(ratio, dtype, **options)
    assert least <= error(answer(PEERS[name], asked), reference(asked)) <= most


@pytest.mark.parametrize("name", ["flax.linen (default)", "flax.linen (two-pass)", "flax.nnx"])
def test_nan_in_peers_where_ours_is_right(name):
    """A NaN under the mask, and a synced replica without a valid element."""
    for question in (nan_under_mask, masked_replica):
        assert np.isnan(question(PEERS[name]))
        assert question(OURS) < 1e-5


def test_flax_clips_the_variance_of_many_features_to_zero():
    """The default of flax.linen at mean/std = 1e4: those come out 1/√ε ≈ 316 times too large."""
    asked = case(1e4)
    clipped = answer(PEERS["flax.linen (default)"], asked).var == 0
    assert 20 <= clipped.sum() <= 60
    assert not np.any(answer(OURS, asked).var == 0)


def test_haiku_is_nan_where_its_variance_is_negative():
    if "dm-haiku" not in PEERS:
        pytest.skip("dm-haiku is not installed")
    assert np.any(np.isnan(answer(PEERS["dm-haiku"], case(1e4)).y))
    assert np.any(np.isnan(answer(PEERS["dm-haiku"], case(1e3, "float16")).y))


def test_pytorch():
    """Right to 1e-5 up to mean/std = 1e3; at 1e4 it has lost more digits than ours."""
    pytest.importorskip("torch")
    for ratio, least, most in ((0, 0, 1e-5), (1e3, 0, 1e-4), (1e4, 1e-5, 1e-2)):
        asked = case(ratio)
        got = Answer(*torch_batch_norm(asked.x, asked.scale, asked.bias, asked.g))
        expected = reference(asked)
        assert least <= variance_error(got, expected) <= most
        assert gradient_error(got, expected) <= most
