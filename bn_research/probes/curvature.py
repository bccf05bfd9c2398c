r"""Curvature of any loss: Hessian-vector products, and the ends of the Hessian's spectrum.

    top = hessian_top_eigenvalues(loss_fn, params, key=key).largest[0]

The Hessian is that of what loss_fn computes. With batch normalization there are two, and they are
different matrices even where the two losses are equal:

  - a loss_fn that normalizes by the batch's own statistics gives the Hessian of training: the
    statistics move with the parameters and are differentiated through;
  - a loss_fn that is given frozen statistics gives the Hessian of a network in which BN is a fixed
    affine map, that of inference.

Say which one a number is of. Of a loss that does not depend on the scale of weights w,
L(a·w) = L(w), the Hessian at a·w is that at w over a²: eigenvalues of two networks, or of one at
two times, compare by λ·‖w‖², or by λ times the learning rate, whose limit is 2 for gradient descent
on a quadratic.

Sources: B. Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6, 1994;
C. Lanczos, 1950; B. Parlett, "The symmetric eigenvalue problem", 1980, for the bound; B. Ghorbani,
S. Krishnan, Y. Xiao, "An investigation into neural net optimization via Hessian eigenvalue
density", ICML 2019, arXiv 1901.10159, for networks with BN.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key

from bn_research.probes.one_device import with_axis_told

LossFn = Callable[[Any], Float[Array, ""]]

_BREAKDOWN = 8  # times the machine epsilon and the matrix's norm: what is rounding alone


class Tridiagonal(NamedTuple):
    """T of A ≈ Vᵀ·T·V on the space that the rows of V span: A·Vᵀ = Vᵀ·T + β_m·v_{m+1}·e_mᵀ."""

    diagonal: Array  # shape=(m,) α
    off_diagonal: Array  # shape=(m - 1,) β_1 … β_{m−1}, ≥ 0; 0 where an invariant space ended
    remainder: Array  # shape=() β_m, what A takes out of the space; 0 when that is rounding
    basis: Array  # shape=(m, n) V, orthonormal rows


class HessianEigenvalues(NamedTuple):
    """Ritz values at both ends of the spectrum; an eigenvalue lies within its residual of each.

    They lie inside the spectrum: `largest[0]` is never above the largest eigenvalue, and
    `smallest[0]` never below the smallest, but for rounding.
    """

    largest: Array  # shape=(num_eigenvalues,) descending
    largest_residual: Array  # shape=(num_eigenvalues,) |β_m·s_m|, s the eigenvector of T
    smallest: Array  # shape=(num_eigenvalues,) ascending, the most negative first
    smallest_residual: Array  # shape=(num_eigenvalues,)


def hvp(loss_fn: LossFn, params: Any, vector: Any) -> Any:
    """∇²L(params)·vector, forward over reverse, at the cost of a few gradients.

    What is differentiated through is what loss_fn does. If it normalizes by the batch's own
    statistics, this is the Hessian of training; if it is given frozen statistics, that of a fixed
    affine map. The two are different matrices.

    Args:
      loss_fn: params → scalar; holds the batch, and statistics if they are frozen.
      params: pytree of floating-point arrays.
      vector: like params, in structure, shapes and dtypes.

    Returns:
      A pytree like params.

    Raises:
      ValueError: as `check_loss`, or a vector that is not like params.
    """
    params = check_loss(loss_fn, params)
    vector = check_like(params, vector, "vector")
    return jax.jvp(jax.grad(loss_fn), (params,), (vector,))[1]


def lanczos(
    matvec: Callable[[Float[Array, "n"]], Float[Array, "n"]],
    example: Float[Array, "n"] | jax.ShapeDtypeStruct,
    *,
    num_iterations: int,
    key: Key[Array, ""],
) -> Tridiagonal:
    """Tridiagonalizes a symmetric matrix A on the Krylov space of a random vector.

    Each new vector is made orthogonal to all before it, twice, so that no eigenvalue is found
    again by rounding. It takes memory for num_iterations vectors and one product an iteration.
    Where the space is invariant under A (β = 0 but for rounding) a random vector orthogonal to it
    goes on, so that T stays whole: of the identity it is the identity.

    Args:
      matvec: v → A·v, linear and symmetric; traced once.
      example: a vector with the shape and dtype of v, float32 or float64; its values are not used.
      num_iterations: m, the size of T; at most n.
      key: of the random vectors.

    Raises:
      ValueError: an example that is not a floating-point vector, or num_iterations not in 1 … n.
    """
    shape, dtype = jnp.shape(example), jnp.dtype(example.dtype)
    if len(shape) != 1 or not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 4:
        raise ValueError(f"example is {dtype}{shape}: allowed is a vector of float32 or float64")
    _check_count("num_iterations", num_iterations, shape[0], "the length of the vector")

    def orthogonal(vector: Array, basis: Array) -> Array:
        for _ in range(2):  # the second takes away what rounding left of the first
            vector = vector - _matmul(_matmul(basis, vector), basis)
        return vector

    def drawn(number: Array | int, basis: Array) -> Array:
        vector = orthogonal(jax.random.normal(jax.random.fold_in(key, number), shape, dtype), basis)
        return _unit(vector, euclidean_norm(vector))

    def step(carry: tuple[Array, Array, Array], number: Array):
        basis, vector, largest = carry
        basis = basis.at[number].set(vector)
        product = matvec(vector)
        alpha = _matmul(vector, product)
        rest = orthogonal(product, basis)
        beta = euclidean_norm(rest)
        largest = jnp.maximum(largest, euclidean_norm(product))
        ended = beta <= _BREAKDOWN * jnp.finfo(dtype).eps * largest
        following = jax.lax.cond(ended, lambda: drawn(number + 1, basis), lambda: _unit(rest, beta))
        return (basis, following, largest), (alpha, jnp.where(ended, 0, beta))

    basis = jnp.zeros((num_iterations, *shape), dtype)
    start = (basis, drawn(0, basis), jnp.zeros((), dtype))
    (basis, _, _), (alpha, beta) = jax.lax.scan(step, start, jnp.arange(num_iterations))
    return Tridiagonal(alpha, beta[:-1], beta[-1], basis)


def hessian_top_eigenvalues(
    loss_fn: LossFn,
    params: Any,
    *,
    num_eigenvalues: int = 1,
    num_iterations: int = 30,
    key: Key[Array, ""],
) -> HessianEigenvalues:
    """Largest and smallest eigenvalues of ∇²L(params), by Lanczos on Hessian-vector products.

    The Hessian is that of what loss_fn does: see `hvp` on statistics of the batch. A residual that
    is not small against its value asks for more iterations; one of the size of rounding, 1e-7
    relative to the largest eigenvalue in float32, is as good as it gets. Copies of a repeated
    eigenvalue count once, until the space is exhausted. A loss that is not finite gives NaN.

    Inside a jitted program it is part of it; outside, wrap the caller in `jax.jit` to compile once
    for many calls.

    Args:
      loss_fn: params → scalar; holds the batch, and statistics if they are frozen.
      params: pytree of floating-point arrays.
      num_eigenvalues: at each end; at most num_iterations and the number of parameters.
      num_iterations: products with the Hessian, each of the cost of a few gradients, and vectors
        of the size of params in memory; no more than there are parameters are taken, and so many
        give the whole spectrum.
      key: of the random start.

    Raises:
      ValueError: as `check_loss`, or num_eigenvalues or num_iterations out of range.
    """
    params = check_loss(loss_fn, params)
    flat, unravel = ravel_pytree(params)
    if not flat.size:
        raise ValueError("params holds 0 parameters: give arrays that are not empty")
    _check_count("num_iterations", num_iterations)
    size = min(num_iterations, flat.size)
    allowed = "num_iterations" if num_iterations <= flat.size else "the number of parameters"
    _check_count("num_eigenvalues", num_eigenvalues, size, allowed)
    wide = jnp.promote_types(flat.dtype, jnp.float32)
    gradient = jax.grad(loss_fn)

    def matvec(vector: Array) -> Array:
        tangent = unravel(vector.astype(flat.dtype))
        return ravel_pytree(jax.jvp(gradient, (params,), (tangent,))[1])[0].astype(wide)

    example = jax.ShapeDtypeStruct(flat.shape, wide)
    t = lanczos(matvec, example, num_iterations=size, key=key)
    off = jnp.diag(t.off_diagonal, 1)
    values, vectors = jnp.linalg.eigh(jnp.diag(t.diagonal) + off + off.T)
    residual = jnp.abs(t.remainder * vectors[-1])
    top, bottom = slice(None, -num_eigenvalues - 1, -1), slice(num_eigenvalues)
    return HessianEigenvalues(values[top], residual[top], values[bottom], residual[bottom])


def check_loss(loss_fn: LossFn, params: Any) -> Any:
    """Params with arrays as leaves; looks at shapes and dtypes alone, so that tracers pass.

    Raises:
      ValueError: params without leaves, or with one that is not a floating-point array; loss_fn
        does not return one floating-point scalar.
    """
    named, tree = jax.tree_util.tree_flatten_with_path(params)
    if not named:
        raise ValueError("params has no leaves: give the parameters that loss_fn takes")
    leaves = []
    for path, leaf in named:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} has dtype {dtype}: allowed are floating-point "
                "arrays; let loss_fn hold what is not trained"
            )
        leaves.append(jnp.asarray(leaf))
    params = jax.tree.unflatten(tree, leaves)
    found = jax.tree.leaves(jax.eval_shape(with_axis_told(loss_fn), params))
    if [leaf.shape for leaf in found] != [()]:
        what = f"an array of shape {found[0].shape}" if len(found) == 1 else f"{len(found)} arrays"
        raise ValueError(f"loss_fn returns {what}: it must return one scalar, the loss")
    if not jnp.issubdtype(found[0].dtype, jnp.floating):
        raise ValueError(f"loss_fn returns dtype {found[0].dtype}: the loss must be floating-point")
    return params


def check_like(params: Any, tree: Any, name: str) -> Any:
    """The tree with arrays as leaves; ValueError when it is not like params."""
    structures: list[Any] = [jax.tree.structure(each) for each in (params, tree)]
    if structures[0] != structures[1]:
        raise ValueError(
            f"{name} has structure {structures[1]}: allowed is that of params, {structures[0]}"
        )
    tree = jax.tree.map(jnp.asarray, tree)
    pairs = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(tree), strict=True)
    for (path, leaf), other in pairs:
        if (leaf.shape, leaf.dtype) != (other.shape, other.dtype):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} is {other.dtype}{other.shape}: allowed is "
                f"{leaf.dtype}{leaf.shape}, as in params"
            )
    return tree


def euclidean_norm(vector: Float[Array, "n"]) -> Float[Array, ""]:
    """Elements are divided by the largest first: squares of 1e-20 would underflow in float32."""
    largest = jnp.max(jnp.abs(vector), initial=0)
    return largest * jnp.linalg.norm(vector / jnp.where(largest == 0, 1, largest))


def _check_count(name: str, value: int, most: int | None = None, what: str = "") -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < 1 or (most is not None and value > most):
        limit = "" if most is None else f" of at most {most}, {what}"
        raise ValueError(f"{name}={value!r} is not allowed: it must be a positive number{limit}")


def _matmul(a: Array, b: Array) -> Array:
    """In full float32 on accelerators too, whose default would cost the orthogonality."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _unit(vector: Array, norm: Array) -> Array:
    return vector / jnp.where(norm == 0, 1, norm)
