"""Singular values of the Jacobian from each layer to the next, of all layers at once.

Small Jacobians are computed whole and decomposed. Of large ones only products are computed: two
compiled programs give J_l·v_l and J_lᵀ·u_l for every layer l, each in about the time of a training
step, and the Golub-Kahan bidiagonalizations of all layers advance together. Vectors are kept
orthogonal on the smaller side of J, which is enough for both sides (H. D. Simon, H. Zha, "Low-rank
matrix approximation using the Lanczos bidiagonalization process with applications", SIAM J. Sci.
Comput. 21 (2000) 2257-2274).
"""

from collections.abc import Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bn_research.probes.perturbation import Program
from bn_research.probes.signal.layers import SingularValues

_WHOLE = 256  # rows or columns up to which J is decomposed whole,
_WHOLE_ELEMENTS = 2**20  # and elements
_PROBES = 2  # random vectors on either side of J for its Frobenius norm
_ROUNDING = 1e-6  # of products, relative: what is smaller has no direction

_Values = Generator[np.ndarray, np.ndarray, SingularValues]


def layer_jacobians(
    program: Program, *, iterations: int, seed: int = 0
) -> list[SingularValues | None]:
    """Singular values of ∂h_l/∂h_{l−1} over the whole batch, None where there is no path.

    iterations are those of the bidiagonalization; seed is that of its random vectors.
    """
    found: list[SingularValues | None] = [None] * len(program.layers)
    numbers = [i for i, path in enumerate(program.paths) if path is not None]
    whole = [i for i in numbers if _is_small(_sizes(program, i))]
    for number, matrix in zip(whole, _matrices(program, whole), strict=True):
        found[number] = decomposed(np.asarray(matrix, np.float64))
    large = [i for i in numbers if i not in whole]
    for number, values in zip(large, _in_turns(program, large, iterations, seed), strict=True):
        found[number] = values
    return found


def decomposed(matrix: np.ndarray) -> SingularValues:
    """Singular values of a matrix [m, n]; NaN where it is not finite."""
    if not np.all(np.isfinite(matrix)):
        return SingularValues(np.nan, np.nan, np.nan)
    values = np.linalg.svd(matrix, compute_uv=False)
    return SingularValues(
        float(values[-1]), float(np.sqrt(np.mean(np.square(values)))), float(values[0])
    )


def _sizes(program: Program, number: int) -> tuple[int, int]:
    """Rows and columns of a layer's Jacobian."""
    return program.layers[number].size, program.layers[number - 1].size


def _is_small(sizes: tuple[int, int]) -> bool:
    return min(sizes) <= _WHOLE and sizes[0] * sizes[1] <= _WHOLE_ELEMENTS


def _matrices(program: Program, numbers: Sequence[int]) -> list[Array]:
    """Whole Jacobians, [rows, columns] each."""
    if not numbers:
        return []

    @program.compiled
    def matrices(args: Sequence[Any]) -> list[Array]:
        _, layers, env = program.run(args, {})
        found = []
        for number in numbers:
            rows, columns = _sizes(program, number)
            derivative = jax.jacfwd if columns <= rows else jax.jacrev
            step = derivative(lambda h, number=number: program.step(number, env, h))
            found.append(step(layers[number - 1]).reshape(rows, columns))
        return found

    return jax.device_get(matrices(program.args))


def _in_turns(
    program: Program, numbers: Sequence[int], iterations: int, seed: int
) -> list[SingularValues]:
    """Bidiagonalizations of several layers, by programs that multiply for all of them."""
    if not numbers:
        return []

    @program.compiled
    def forward(args: Sequence[Any], tangents: Sequence[Array]) -> list[Array]:
        _, layers, env = program.run(args, {})
        return [
            jax.jvp(lambda h, i=i: program.step(i, env, h), (layers[i - 1],), (tangent,))[1]
            for i, tangent in zip(numbers, tangents, strict=True)
        ]

    @program.compiled
    def backward(args: Sequence[Any], cotangents: Sequence[Array]) -> list[Array]:
        _, layers, env = program.run(args, {})
        return [
            jax.vjp(lambda h, i=i: program.step(i, env, h), layers[i - 1])[1](cotangent)[0]
            for i, cotangent in zip(numbers, cotangents, strict=True)
        ]

    # The vectors that are kept lie on J's smaller side, so a layer with fewer outputs than inputs
    # is decomposed as Jᵀ, and joins when the first backward product is due.
    sides = [_sizes(program, i) for i in numbers]
    turned = [rows < columns for rows, columns in sides]
    random = np.random.default_rng(seed)
    at_work = [singular_values(min(side), max(side), iterations, random) for side in sides]
    wanted: list[np.ndarray | None] = [next(work) for work in at_work]
    found: list[SingularValues | None] = [None] * len(numbers)
    started = [False] * len(numbers)
    goes_back = False
    while any(values is None for values in found):
        taking = [
            found[k] is None and (started[k] or turned[k] == goes_back) for k in range(len(numbers))
        ]
        shapes = [program.layers[i if goes_back else i - 1] for i in numbers]
        units, scales = [], []
        for shape, vector, takes in zip(shapes, wanted, taking, strict=True):
            unit, scale = _packed(vector if takes else None, shape)
            units.append(unit)
            scales.append(scale)
        products = jax.device_get((backward if goes_back else forward)(program.args, units))
        for k in range(len(numbers)):
            if taking[k]:
                started[k] = True
                try:
                    wanted[k] = at_work[k].send(
                        scales[k] * np.asarray(products[k], np.float64).ravel()
                    )
                except StopIteration as done:
                    found[k] = done.value
        goes_back = not goes_back
    return [values for values in found if values is not None]


def _packed(vector: np.ndarray | None, shape: Any) -> tuple[np.ndarray, float]:
    """A vector in the layer's shape and dtype, of largest magnitude 1, and its scale."""
    if vector is None:
        return np.zeros(shape.shape, shape.dtype), 0.0
    scale = float(np.max(np.abs(vector))) or 1.0
    return (vector / scale).reshape(shape.shape).astype(jnp.dtype(shape.dtype)), scale


def singular_values(
    columns: int, rows: int, iterations: int, random: np.random.Generator
) -> _Values:
    """Singular values of a matrix A [rows, columns] from products with it, columns ≤ rows.

    A generator: it yields a vector to multiply by A, is sent the product, yields one for Aᵀ, is
    sent that product, and so on in turns; it returns `SingularValues`. The largest is a lower
    bound of A's, the smallest an upper bound, and both are exact after as many iterations as A has
    distinct singular values. The rms is the mean over a few random vectors of ‖Az‖² and ‖Aᵀz‖²,
    whose expectation is ‖A‖_F².
    """
    squares = []
    for _ in range(_PROBES):
        for size in (columns, rows):
            product = yield random.choice((-1.0, 1.0), size)
            squares.append(float(np.sum(np.square(product))))
    rms = float(np.sqrt(np.mean(squares) / columns))
    if not np.isfinite(rms):
        return SingularValues(np.nan, np.nan, np.nan)

    v = random.standard_normal(columns)
    v /= np.linalg.norm(v)
    kept = np.zeros((min(iterations, columns), columns), np.float32)
    diagonal: list[float] = []
    above: list[float] = []
    u = np.zeros(rows)
    for step in range(len(kept)):
        kept[step] = v
        product = yield v
        p = product - above[-1] * u if above else product
        diagonal.append(float(np.linalg.norm(p)))
        largest = max([*diagonal, *above])
        if diagonal[-1] <= _ROUNDING * largest or step == len(kept) - 1:
            break
        u = p / diagonal[-1]
        product = yield u
        q = product - diagonal[-1] * v
        for _ in range(2):
            q -= (kept[: step + 1] @ q.astype(np.float32)) @ kept[: step + 1]
        above.append(float(np.linalg.norm(q)))
        if above[-1] <= _ROUNDING * largest:
            break
        v = q / above[-1]
    bidiagonal = np.diag(diagonal) + np.diag(above[: len(diagonal) - 1], 1)
    values = np.linalg.svd(bidiagonal, compute_uv=False)
    return SingularValues(float(values[-1]), rms, float(values[0]))
