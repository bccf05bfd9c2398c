"""What the functions refuse, and the words in which they do."""

import functools

import jax
import numpy as np
import pytest

from bn_research.normalization import (
    BatchStats,
    Moments,
    batch_moments,
    batch_norm,
    normalize,
    sync_moments,
)
from bn_research.normalization.folding import fold_after, fold_before
from bn_research.normalization.renorm import batch_renorm
from bn_research.normalization.whitening import apply_whitening, inverse_sqrt, whiten

pytestmark = pytest.mark.usefixtures("strict_arrays")

X = np.ones((6, 3), np.float32)
ZERO, ONE, EYE = np.zeros(3, np.float32), np.ones(3, np.float32), np.eye(3, dtype=np.float32)
COMPLEX, KEYS = np.ones((6, 3), np.complex64), jax.random.key(0)
NAN = float("nan")


def norm_on_devices(**kwargs):
    layer = functools.partial(batch_norm, axis_name="batch", **kwargs)
    jax.vmap(layer, axis_name="batch")(np.stack([X] * 4))


def sync_by(groups):
    synced = functools.partial(sync_moments, axis_name="batch", axis_index_groups=groups)
    jax.vmap(synced, axis_name="batch")(Moments(*[np.zeros((4, 2), np.float32)] * 3))


# What several of them refuse in the same words.
AXES = [
    (dict(feature_axes=2), "feature_axes=2 is out of range.*-2 to 1"),
    (dict(feature_axes=(1, -1)), r"feature_axes=\(1, -1\) names an axis twice"),
]
IS_COMPLEX = (dict(x=COMPLEX), "x has dtype complex64: allowed are real")
IS_KEYS = (dict(x=KEYS), "x has dtype key<fry>: allowed are numbers")
LONG_SCALE = (dict(scale=np.ones(4, np.float32)), r"scale has shape \(4,\).*\(3,\)")
BIAS_OF_RANK_2 = (dict(bias=ONE[None]), r"bias has shape \(1, 3\).*\(3,\)")
TURNED_MASK = (dict(where=np.ones((3, 6), bool)), r"where has shape \(3, 6\).*\(6, 3\)")
SMALL_EPSILON = (dict(epsilon=-1e-9), "epsilon=-1e-09 is not allowed: it must be ≥ 0")
EPSILON = (dict(epsilon=-1.0), "epsilon=-1.0 is not allowed: it must be ≥ 0")
NO_AXIS_NAME = (dict(axis_index_groups=[[0]]), r"axis_index_groups=\[\[0\]\] needs axis_name")
SHORT_MEAN = (dict(mean=ZERO[:2]), r"mean has shape \(2,\).*\(3,\)")
FOLDED_BIAS = (dict(bias=np.ones(4)), r"bias has shape \(4,\): it must be \(6,\), the outputs")

FOLDED = dict(kernel=np.ones((4, 6)), bias=None)
BAD = {
    functools.partial(batch_moments, x=X): [
        *AXES,
        IS_KEYS,
        (dict(feature_axes=-3), "feature_axes=-3 is out of range.*-2 to 1"),
        (dict(feature_axes=(0, 5)), r"feature_axes=\(0, 5\) is out of range.*-2 to 1"),
        (dict(feature_axes=()), r"feature_axes=\(\) is empty"),
        (dict(where=np.ones(2, bool)), r"where has shape \(2,\).*\(6, 3\)"),
        (dict(where=np.ones((4, 6, 3), bool)), r"where has shape \(4, 6, 3\).*\(6, 3\)"),
    ],
    sync_by: [
        (dict(groups=groups), "axis_index_groups=.*0 to 3 once")
        for groups in ([[0, 1]], [[0, 1], [1, 2, 3]], [[0, 1], [2, 4]], [])
    ],
    functools.partial(batch_norm, x=X): [
        *AXES,
        IS_KEYS,
        LONG_SCALE,
        BIAS_OF_RANK_2,
        TURNED_MASK,
        SMALL_EPSILON,
        NO_AXIS_NAME,
        (dict(feature_axes=-5), "feature_axes=-5 is out of range.*-2 to 1"),
        (dict(epsilon=NAN), "epsilon=nan is not allowed"),
        (dict(scale=np.float32(1)), r"scale has shape \(\).*\(3,\)"),
        (dict(group_size=4), "group_size=4 does not divide the batch of 6"),
        (dict(group_size=0), "group_size=0 must be a positive number"),
        (dict(group_size=-2), "group_size=-2 must be a positive number"),
        (dict(group_size=2.0), "group_size=2.0 must be a positive number"),
        (dict(group_size=True), "group_size=True must be a positive number"),
        (dict(group_size=12), "group_size=12 is larger than the batch of 6.*divisors.*axis_name"),
        (dict(group_size=2, feature_axes=0), "group_size=2 groups.*feature_axes names too"),
    ],
    norm_on_devices: [
        (dict(group_size=9), "group_size=9 does not divide the batch"),
        (dict(group_size=18), "group_size=18 does not divide the batch.*4 devices with 6"),
        (dict(group_size=48), "group_size=48 does not divide the batch.*4 devices with 6"),
        (dict(group_size=2, axis_index_groups=[[0, 1], [2, 3]]), "group_size=2 and axis_index"),
        (dict(axis_index_groups=[[0, 1]]), "axis_index_groups=.* not a partition.*0 to 3 once"),
    ],
    functools.partial(normalize, x=X, mean=ZERO, var=ONE): [
        EPSILON,
        SHORT_MEAN,
        (dict(var=ONE[:, None]), r"var has shape \(3, 1\).*\(3,\)"),
        (dict(scale=np.ones(6, np.float32)), r"scale has shape \(6,\).*\(3,\)"),
        (dict(where=np.ones((5, 1), bool)), r"where has shape \(5, 1\).*\(6, 3\)"),
        (dict(feature_axes=7), "feature_axes=7 is out of range"),
    ],
    functools.partial(batch_renorm, x=X, stats=BatchStats(ZERO, ONE), r_max=3.0, d_max=5.0): [
        AXES[0],
        IS_COMPLEX,
        LONG_SCALE,
        TURNED_MASK,
        EPSILON,
        NO_AXIS_NAME,
        (dict(r_max=0.99), "r_max=0.99 is not allowed: it must be ≥ 1"),
        (dict(r_max=NAN), "r_max=nan is not allowed"),
        (dict(d_max=-1e-9), "d_max=-1e-09 is not allowed: it must be ≥ 0"),
        (dict(stats=BatchStats(np.zeros(2), np.ones(3))), r"stats.mean has shape \(2,\).*\(3,\)"),
        (dict(stats=BatchStats(np.zeros(3), np.ones((3, 1)))), r"stats.var has shape \(3, 1\)"),
    ],
    functools.partial(whiten, x=X): [
        IS_COMPLEX,
        LONG_SCALE,
        BIAS_OF_RANK_2,
        TURNED_MASK,
        SMALL_EPSILON,
        (dict(feature_axis=2), "feature_axis=2 is out of range.*-2 to 1"),
        (dict(feature_axis=-3), "feature_axis=-3 is out of range.*-2 to 1"),
        (dict(feature_axis=(0,)), r"feature_axis=\(0,\) is not allowed: it must be one integer"),
        (dict(x=np.float32(1)), "feature_axis=-1 is out of range for an array of rank 0"),
        (dict(method="pca"), "method='pca' is unknown: allowed are 'zca' and 'newton_schulz'"),
        (dict(iterations=0), "iterations=0 must be a positive number"),
        (dict(iterations=2.0), "iterations=2.0 must be a positive number"),
        (dict(where=np.ones((6, 3), bool)), r"where has shape \(6, 3\): it must be 1 along"),
        (dict(where=np.ones(3, bool)), r"where has shape \(3,\): it must be 1 along"),
    ],
    functools.partial(inverse_sqrt, matrix=EYE): [
        EPSILON,
        (dict(matrix=EYE[:2]), r"matrix has shape \(2, 3\).*square"),
        (dict(matrix=np.stack([EYE] * 2)), r"matrix has shape \(2, 3, 3\).*square"),
        (dict(matrix=np.eye(3, dtype=int)), "matrix has dtype int.*floating"),
        (dict(method=None), "method=None is unknown"),
        (dict(iterations=-1), "iterations=-1 must be a positive number"),
    ],
    functools.partial(apply_whitening, x=X, mean=ZERO, matrix=EYE): [
        IS_COMPLEX,
        SHORT_MEAN,
        (dict(matrix=EYE[:, :2]), r"matrix has shape \(3, 2\).*\(3, 3\)"),
        (dict(feature_axis=0), r"mean has shape \(3,\).*\(6,\)"),
    ],
    functools.partial(fold_after, **FOLDED, stats=BatchStats(np.zeros(6), np.ones(6))): [
        EPSILON,
        FOLDED_BIAS,
        (dict(kernel=np.ones(4)), r"kernel has shape \(4,\): it must be \(..., inp"),
        (dict(kernel=np.ones((4, 6), int)), "kernel has dtype int32: allowed are fl"),
        (dict(bias=np.ones(6, int)), "bias has dtype int32"),
        (dict(stats=(np.ones(4), np.ones(6))), r"stats.mean has shape \(4,\).*\(6,\)"),
        (dict(stats=(np.ones(6), np.ones(()))), r"stats.var has shape \(\).*\(6,\)"),
        (dict(scale=np.ones((1, 6))), r"scale has shape \(1, 6\).*\(6,\)"),
        (dict(offset=np.ones(5)), r"offset has shape \(5,\).*\(6,\)"),
        (
            dict(transpose_kernel=True),
            r"stats.mean has shape \(6,\): it must be \(4,\), the outputs of the kernel.*\(4, 6\)",
        ),
    ],
    functools.partial(fold_before, **FOLDED, stats=BatchStats(np.zeros(4), np.ones(4))): [
        EPSILON,
        FOLDED_BIAS,
        (dict(scale=np.ones(6)), r"scale has shape \(6,\).*\(4,\), the inputs"),
        (
            dict(feature_group_count=2),
            r"mean has shape \(4,\): it must be \(8,\), the inputs·groups",
        ),
        (dict(feature_group_count=4), "feature_group_count=4 must be a divisor.*6 "),
        (dict(feature_group_count=0), "feature_group_count=0 must be a divisor"),
        (dict(feature_group_count=2.0), "feature_group_count=2.0 must be a divisor"),
    ],
}


@pytest.mark.parametrize(
    ("call", "kwargs", "message"),
    [(call, *case) for call, cases in BAD.items() for case in cases],
)
def test_bad_arguments(call, kwargs, message):
    with pytest.raises(ValueError, match=message):
        call(**kwargs)
