r"""Batch whitening: decorrelated batch normalization, with a finite gradient everywhere.

    y = γ·W(x − μ) + β,    W = (Σ + εI)^(−1/2)

with μ and Σ the mean and the biased covariance of the batch's feature vectors. W is symmetric:
ZCA, the whitening that moves x least. It is found by eigendecomposition ("zca") or, up to
convergence, by Newton's iteration ("newton_schulz"),

    P₀ = I,    P_{k+1} = (3·P_k − P_k³·N)/2,    N = A/tr A,    W ≈ P_T/√tr A,    A = Σ + εI

A change of A moves W in the eigenbasis of A, with a and b eigenvalues, by the divided differences
(Daleckii & Krein)

    f[a, b] = −1/(√a·√b·(√a + √b))        f[a, 0] = a^(−3/2)        f[0, 0] = 0

which are finite for equal eigenvalues, where the derivatives of the eigenvectors are not. With
ε = 0 fewer examples than features, or features that depend on each other, give eigenvalues of
zero; W is then the root of the pseudo-inverse.

Sources: L. Huang et al., "Decorrelated batch normalization", CVPR 2018, arXiv 1804.08450;
L. Huang et al., "Iterative normalization: beyond standardization towards efficient whitening",
CVPR 2019, arXiv 1904.03441; N. J. Higham, "Functions of matrices", SIAM 2008, chapters 3 and 6.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float
from numpy.typing import DTypeLike

from bn_research.normalization.moments import (
    accumulator_dtype,
    check_input,
    promoted,
    shifted_moments,
    sync_shifted_moments,
)
from bn_research.normalization.normalize import (
    check_epsilon,
    per_feature,
    result_dtype,
    rsqrt_or_zero,
    scale_and_bias,
    scale_and_shift,
)

# Rounding leaves an eigenvalue of zero within about 5 machine epsilons of the largest one, for any
# number of features; those up to this many hold no digit.
_ROUNDING = 16


class CovarianceMoments(NamedTuple):
    """Moments of the feature vectors reduced; merge with `merge_covariance`."""

    count: Array  # type: ignore[assignment]  # shape=(), dtype=float32: number of unmasked vectors
    mean: Array  # shape=(d,), dtype=float32 (float64 for float64 input)
    m2: Array  # shape=(d, d), dtype as mean: sum of outer products of deviations from the mean


def batch_covariance(
    x: Float[Array, "..."],
    *,
    feature_axis: int = -1,
    where: Bool[Array, "..."] | None = None,
) -> CovarianceMoments:
    """Moments of the feature vectors of x, over every axis but the feature axis.

    Args:
      x: real array; reduced in float32, or in float64 when x is float64. Integers and bool are
        taken as float32.
      feature_axis: axis along which a feature vector lies.
      where: mask of whole vectors, broadcastable to the shape of x with 1 at the feature axis.
        Vectors where it is False are left out before any arithmetic: a NaN there reaches neither
        values nor gradients.

    Returns:
      CovarianceMoments, differentiable in x; zeros without any vector.

    Raises:
      ValueError: x is not real, the axis is out of range, or where does not fit.
    """
    x, where, axis = _check_vectors(x, feature_axis, where)

    def moments_of(x, where):
        _, moments, unit = _centred(x, where, axis, None)
        return moments._replace(m2=moments.m2 * unit**2)

    return _laid_out(moments_of, x, PartitionSpec())(x, where)


def merge_covariance(a: CovarianceMoments, b: CovarianceMoments) -> CovarianceMoments:
    """Moments of the union of two disjoint sets of vectors (Chan, Golub & LeVeque 1983).

    n = n_a + n_b,  mean = mean_a + δ·n_b/n,  m2 = m2_a + m2_b + δδᵀ·n_a·n_b/n,
    δ = mean_b − mean_a.
    """
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1)
    # A side without vectors has no mean to be far from.
    delta = jnp.where((a.count > 0) & (b.count > 0), b.mean - a.mean, 0)
    between = jnp.sqrt(a.count * share) * delta
    mean = jnp.where(a.count > 0, a.mean + delta * share, b.mean)
    return CovarianceMoments(count, mean, a.m2 + b.m2 + jnp.outer(between, between))


def covariance(moments: CovarianceMoments, *, unbiased: bool = False) -> Float[Array, "d d"]:
    """Covariance, m2/n, or m2/(n − 1) when unbiased; 0 where there are too few vectors."""
    return moments.m2 / jnp.maximum(moments.count - int(unbiased), 1)


def inverse_sqrt(
    matrix: Float[Array, "d d"],
    *,
    epsilon: float | Float[Array, ""] = 0.0,
    method: Literal["zca", "newton_schulz"] = "zca",
    iterations: int = 5,
) -> Float[Array, "d d"]:
    """The symmetric inverse square root of a covariance, (matrix + epsilon·I)^(−1/2).

    Differentiable in matrix to any order, forwards and backwards, also where eigenvalues are
    equal.

    Eigenvalues of matrix up to 16 machine epsilons of the largest are rounding errors, and "zca"
    takes them for zero: with an epsilon of 0 their directions come out 0, and the derivative is
    that along changes which keep the rank, as those of fewer vectors than features do.
    "newton_schulz" gives such directions 1.5^iterations/√trace, or 0 where the whole matrix is.

    Args:
      matrix: positive semi-definite; its symmetric part is taken, in float32 or wider.
      epsilon: added to every eigenvalue; ≥ 0.
      method: "zca", by eigendecomposition, or "newton_schulz", by matrix products alone.
      iterations: T of "newton_schulz"; the paper's is 5. It converges for eigenvalues λ with
        1.5^T·√(λ/trace) well above 1, and leaves smaller ones short of 1/√λ.

    Raises:
      ValueError: matrix is not square or not floating point, epsilon < 0, the method is unknown,
        or iterations < 1.
    """
    matrix = jnp.asarray(matrix)
    if not jnp.issubdtype(matrix.dtype, jnp.floating):
        raise ValueError(
            f"matrix has dtype {matrix.dtype}: allowed are floating-point types; cast it first"
        )
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix has shape {matrix.shape}: it must be square, (d, d)")
    check_epsilon(epsilon)
    _check_method(method, iterations)
    matrix = matrix.astype(accumulator_dtype(matrix.dtype))
    matrix = (matrix + matrix.T) / 2
    epsilon = jax.lax.stop_gradient(jnp.asarray(epsilon, matrix.dtype))
    if method == "zca":
        return _decompose(matrix, epsilon).inverse_root
    return _newton_schulz(matrix + epsilon * jnp.eye(len(matrix), dtype=matrix.dtype), iterations)


def whiten(
    x: Float[Array, "..."],
    scale: Float[Array, "d"] | None = None,
    bias: Float[Array, "d"] | None = None,
    *,
    feature_axis: int = -1,
    epsilon: float | Float[Array, ""] = 1e-5,
    method: Literal["zca", "newton_schulz"] = "zca",
    iterations: int = 5,
    where: Bool[Array, "..."] | None = None,
    axis_name: str | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Float[Array, "..."], CovarianceMoments]:
    """Whitens x by its own mean and covariance Σ: y = scale·(Σ + epsilon·I)^(−1/2)(x − μ) + bias.

    The covariance of y is Σ(Σ + epsilon·I)⁻¹ before scale; with one feature this is batch
    normalization. Differentiable in x, scale and bias to any order; the gradient flows through μ
    and Σ, while the returned moments carry none.

    Args:
      x: real array; statistics are computed in float32, or float64 when x is float64. Integers and
        bool are taken as float32.
      scale: γ, shape=(d,); None is 1.
      bias: β, shape=(d,); None is 0.
      feature_axis: axis along which a feature vector lies.
      epsilon: added to every eigenvalue of the covariance; ≥ 0. With 0, directions in which x
        does not vary come out as 0, before scale and bias; see `inverse_sqrt`.
      method: of `inverse_sqrt`.
      iterations: of `inverse_sqrt`.
      where: mask of whole vectors, broadcastable to the shape of x with 1 at the feature axis.
        Masked vectors take no part in the statistics, come out as `bias` and receive no gradient,
        even when they hold NaN.
      axis_name: axis of `pmap`, `shard_map` or `vmap` over whose devices statistics are shared.
      dtype: dtype of y; None promotes the dtypes of x, scale and bias.

    Returns:
      y, of the shape of x, and the moments of the batch.

    Raises:
      ValueError: a bad axis, shape, dtype, epsilon, mask, method or number of iterations.
    """
    x, where, axis = _check_vectors(x, feature_axis, where)
    check_epsilon(epsilon)
    _check_method(method, iterations)
    result = result_dtype(x, scale, bias, dtype)
    scale, bias = scale_and_bias(scale, bias, x, (axis,))

    def run(x, where, scale, bias):
        vectors, moments, unit = _centred(x, where, axis, axis_name)
        matrix = inverse_sqrt(
            covariance(moments), epsilon=epsilon / unit**2, method=method, iterations=iterations
        )
        kept = (1,) * (x.ndim - 1) + (-1,)
        y = scale_and_shift(_product(vectors, matrix), scale, bias, kept, result)
        y = jnp.moveaxis(y, -1, axis)
        return y, jax.lax.stop_gradient(moments._replace(m2=moments.m2 * unit**2))

    specs = jax.typeof(x).sharding.spec, PartitionSpec()
    return _laid_out(run, x, specs)(x, where, scale, bias)


def apply_whitening(
    x: Float[Array, "..."],
    mean: Float[Array, "d"],
    matrix: Float[Array, "d d"],
    scale: Float[Array, "d"] | None = None,
    bias: Float[Array, "d"] | None = None,
    *,
    feature_axis: int = -1,
    dtype: DTypeLike | None = None,
) -> Float[Array, "..."]:
    """Whitens x by a given mean and whitening matrix: y = scale·matrix(x − mean) + bias.

    This is inference: matrix is then `inverse_sqrt` of the population's covariance, with the
    epsilon of training.

    Args:
      x: real array; integers and bool are taken as float32.
      mean: shape=(d,).
      matrix: whitening matrix, shape=(d, d); need not be symmetric.
      scale: γ, shape=(d,); None is 1.
      bias: β, shape=(d,); None is 0.
      feature_axis: axis along which a feature vector lies.
      dtype: dtype of the result; None promotes the dtypes of x, scale and bias.

    Raises:
      ValueError: a bad axis, shape or dtype.
    """
    x, _, axis = _check_vectors(x, feature_axis, None)
    mean, matrix = per_feature("mean", mean, x, (axis,)), jnp.asarray(matrix)
    if matrix.shape != mean.shape * 2:
        raise ValueError(
            f"matrix has shape {matrix.shape}: it must be {mean.shape * 2}, for the "
            f"{x.shape[axis]} features of x"
        )
    result = result_dtype(x, scale, bias, dtype)
    scale, bias = scale_and_bias(scale, bias, x, (axis,))
    wide = promoted(accumulator_dtype(x.dtype), matrix.dtype)
    mean = jnp.expand_dims(mean.astype(wide), range(x.ndim - 1))
    vectors = jnp.moveaxis(x, axis, -1).astype(wide) - mean
    kept = (1,) * (x.ndim - 1) + (-1,)
    y = scale_and_shift(_product(vectors, matrix.astype(wide).T), scale, bias, kept, result)
    return jnp.moveaxis(y, -1, axis)


def _laid_out(fn, x, specs):
    """Fn, with results of these specs where x lies over explicit axes of a mesh.

    Whitening mixes features and vectors: how its products are spread is left to the compiler.
    """
    mesh = jax.typeof(x).sharding.mesh
    if not mesh.explicit_axes:
        return fn
    return jax.sharding.auto_axes(fn, axes=mesh.explicit_axes, out_sharding=specs)


def _centred(x, where, axis, axis_name):
    """Deviations in `unit`, features last and 0 where masked; moments, m2 in unit²; the unit.

    The unit is a power of two near the largest standard deviation: dividing by it is exact, and
    products of deviations stay inside the range of float32.
    """
    x = x.astype(accumulator_dtype(x.dtype))
    if where is not None:
        x = jnp.where(where, x, 0)
    reduced = tuple(i for i in range(x.ndim) if i != axis)
    shared = shifted_moments(x, reduced, where)
    if axis_name is not None:
        shared = sync_shifted_moments(shared, axis_name, None)
    count = jnp.max(shared.count)

    largest = jnp.max(jax.lax.stop_gradient(shared.m2)) / jnp.maximum(count, 1).astype(x.dtype)
    unit = jnp.ldexp(jnp.ones_like(largest), jnp.frexp(jnp.sqrt(largest))[1])
    vectors = ((x - shared.shift) - shared.mean) / unit
    if where is not None:
        vectors = jnp.where(where, vectors, 0)
    vectors = jnp.moveaxis(vectors, axis, -1)
    flat = vectors.reshape(-1, vectors.shape[-1])
    m2 = _product(flat.T, flat)
    if axis_name is not None:
        m2 = jax.lax.psum(m2, axis_name)
    mean = jnp.squeeze(shared.shift + shared.mean, reduced)
    return vectors, CovarianceMoments(count, mean, m2), unit


class _Decomposition(NamedTuple):
    """Of A = matrix + epsilon·I; the last two serve to solve with and carry no gradient."""

    inverse_root: Array  # W, shape=(d, d)
    root: Array  # S = √A, shape=(d, d)
    null: Array  # Q, shape=(d, d): projector on the eigenvectors of eigenvalue zero
    vectors: Array  # shape=(d, d): eigenvectors, in columns
    values: Array  # shape=(d,): eigenvalues of S


@jax.custom_jvp
def _decompose(matrix: Array, epsilon: Array) -> _Decomposition:
    values, vectors = jnp.linalg.eigh(matrix, symmetrize_input=False)
    cutoff = _ROUNDING * jnp.finfo(values.dtype).eps * jnp.max(values)
    values = jnp.where(values > cutoff, values, 0) + epsilon
    return _Decomposition(
        inverse_root=_product(vectors * rsqrt_or_zero(values)[None], vectors.T),
        root=_product(vectors * jnp.sqrt(values)[None], vectors.T),
        null=_product(vectors * (values == 0)[None].astype(vectors.dtype), vectors.T),
        vectors=vectors,
        values=jnp.sqrt(values),
    )


@_decompose.defjvp
def _decompose_jvp(primals, tangents):
    # Written in W, S and Q, which have this rule themselves, so that it can be differentiated again
    # where the derivatives of eigenvectors do not exist. S·S = A gives S·Ṡ + Ṡ·S = Ȧ, and W·S = I
    # gives S·Ẇ + Ẇ·S = −W·Ȧ·W, which f[a, b] solves; f[a, 0] are the entries of W³·Ȧ·Q.
    decomposition = _decompose(*primals)
    w, s, q, vectors, values = decomposition
    t = tangents[0]
    sums = values[:, None] + values[None, :]
    inverse = jnp.where(sums > 0, 1 / jnp.where(sums > 0, sums, 1), 0)

    def solve(c):
        return jax.lax.custom_linear_solve(
            lambda x: _product(s, x) + _product(x, s),
            c,
            lambda _, b: _product(vectors, inverse * _product(vectors.T, b, vectors), vectors.T),
            symmetric=True,
        )

    turn = _product(w, w, t, q)
    across = _product(w, turn)
    return decomposition, _Decomposition(
        inverse_root=across + across.T - solve(_product(w, t, w)),
        root=solve(t),
        null=-(turn + turn.T),
        vectors=jnp.zeros_like(vectors),
        values=jnp.zeros_like(values),
    )


def _newton_schulz(matrix: Array, iterations: int) -> Array:
    """P_T/√trace, by the coupled form of the iteration: Z_k = P_k and Y_k = N·P_k.

    In exact arithmetic that is the same. As P alone, the iteration multiplies a rounding error that
    joins eigenvalues of ratio κ by (κ + √κ − 2)/2 in every step near its end: beyond a condition
    number of 2.4 it overflows in time. The coupled form is stable (Higham 2008, chapter 6).
    """
    trace = jnp.trace(matrix)
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)

    def step(_, pair):
        y, z = pair
        half = (3 * identity - _product(z, y)) / 2
        return _product(y, half), _product(half, z)

    start = matrix / jnp.where(trace > 0, trace, 1), identity
    return jax.lax.fori_loop(0, iterations, step, start)[1] * rsqrt_or_zero(trace)


def _product(*factors: Array) -> Array:
    """Product of matrices; accelerators round float32 to fewer digits unless asked not to."""
    matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return functools.reduce(matmul, factors)


def _check_vectors(x, feature_axis, where):
    """X and where as arrays, and the axis as a non-negative integer; ValueError when one is bad."""
    ndim = jnp.ndim(x)
    if isinstance(feature_axis, bool) or not isinstance(feature_axis, int):
        raise ValueError(f"feature_axis={feature_axis!r} is not allowed: it must be one integer")
    if not -ndim <= feature_axis < ndim:
        raise ValueError(
            f"feature_axis={feature_axis} is out of range for an array of rank {ndim}: "
            f"allowed are {-ndim} to {ndim - 1}"
        )
    axis = feature_axis % ndim
    given = where
    x, where, _ = check_input(x, axis, where, real=True)
    if where is not None and where.shape[axis] != 1:
        raise ValueError(
            f"where has shape {jnp.shape(given)}: it must be 1 along the feature axis of x, whose "
            f"shape is {x.shape}, as it masks whole vectors"
        )
    return x, where, axis


def _check_method(method, iterations) -> None:
    if method not in ("zca", "newton_schulz"):
        raise ValueError(f"method={method!r} is unknown: allowed are 'zca' and 'newton_schulz'")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations={iterations!r} must be a positive number")
