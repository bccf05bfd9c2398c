r"""Images centred, scaled or whitened by their training set.

With μ and Σ = V·diag(λ)·Vᵀ the mean and the biased covariance of the pixels over the training set,
d of them, and with ε̄ = ε·tr(Σ)/d,

    raw       x
    centred   x − μ
    scaled    (x_i − μ_i)/√(Σ_ii + ε̄)
    pca       diag(λ + ε̄)^(−1/2)·Vᵀ(x − μ)
    zca       V·diag(λ + ε̄)^(−1/2)·Vᵀ(x − μ)

so "scaled" is "zca" with the covariances between pixels left out. Whitening leaves the training set
eigenvalues λ/(λ + ε̄): 1 for ε = 0. Directions in which the training set does not vary, such as
pixels that are the same in all its images, come out as 0, in test images too: nothing was learnt
about them, and their scale would be arbitrary. ε bounds what the nearly constant ones are
multiplied by; with ε = 0 a pixel that one of n images lights comes out as √n there.

Sources: Y. LeCun, L. Bottou, G. Orr & K.-R. Müller, "Efficient BackProp", 1998, section 4.3;
A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009, appendix A (ZCA).
"""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bn_research.normalization.whitening import batch_covariance, covariance, merge_covariance

TRANSFORMS = ("raw", "centred", "scaled", "zca", "pca")
_CHUNK = 8192  # images turned into float64 at once: bounds the memory beside the result


def check_transform(name: str) -> None:
    """ValueError unless a transform has this name."""
    if name not in TRANSFORMS:
        raise ValueError(f"name={name!r} is unknown: allowed are {', '.join(TRANSFORMS)}")


class InputTransform(NamedTuple):
    """An affine map of flattened images, y = matrix·(x − mean)."""

    mean: np.ndarray  # shape=(d,), dtype=float64
    matrix: np.ndarray  # shape=(d, d), or (d,) for the diagonal of one; dtype=float64


def transform_inputs(
    train_images: Float[np.ndarray, "n *image"],
    test_images: Float[np.ndarray, "m *image"],
    name: str,
    *,
    epsilon: float,
) -> tuple[Float[np.ndarray, "n *image"], Float[np.ndarray, "m *image"]]:
    """Both sets as the named transform has them, fitted to the training set alone.

    Images are float32 in the shapes given. "pca" has its components in place of pixels, by falling
    variance, so that the same network takes them. ε is relative to the mean eigenvalue; "raw" and
    "centred" do without.

    Raises:
      ValueError: an unknown name, ε < 0, integer pixels, no images, or images of different shapes.
    """
    if train_images.shape[1:] != test_images.shape[1:]:
        raise ValueError(
            f"test_images has shape {test_images.shape}: its images must be like those of "
            f"train_images, {train_images.shape[1:]}"
        )
    fitted = fit_transform(train_images, name, epsilon=epsilon)
    return apply_transform(train_images, fitted), apply_transform(test_images, fitted)


def fit_transform(
    images: Float[np.ndarray, "n *image"], name: str, *, epsilon: float
) -> InputTransform:
    """The named transform for these images, of floating-point pixels from 0 to 1; in float64."""
    check_transform(name)
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon={epsilon} is not allowed: it must be ≥ 0")
    if not len(images):
        raise ValueError("images is empty: give one at least")
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"images have dtype {images.dtype}: they must be floating point")
    mean, sigma = _moments(images)
    if name in ("raw", "centred"):
        return InputTransform(mean if name == "centred" else 0 * mean, np.ones_like(mean))
    added = epsilon * np.trace(sigma) / len(sigma)
    if name == "scaled":
        variances = np.diag(sigma)  # exactly 0 for constants: their moments are about themselves
        return InputTransform(mean, _inverse_roots(variances, variances > 0, added))
    values, vectors = np.linalg.eigh(sigma)
    values, vectors = values[::-1], vectors[:, ::-1]
    # An eigenvector's sign is free: its largest entry is made positive, on every machine.
    largest = np.argmax(np.abs(vectors), axis=0)
    vectors = vectors * np.sign(vectors[largest, np.arange(len(values))])
    cutoff = len(values) * np.finfo(values.dtype).eps * values[0]
    matrix = _inverse_roots(values, values > cutoff, added)[:, None] * vectors.T
    return InputTransform(mean, matrix if name == "pca" else vectors @ matrix)


def apply_transform(
    images: Float[np.ndarray, "n *image"], fitted: InputTransform
) -> Float[np.ndarray, "n *image"]:
    """The images transformed: computed in float64, float32 in the shape given."""
    result = np.empty(images.shape, np.float32)
    flat = result.reshape(len(images), -1)  # a view
    start = 0
    for chunk in _chunks(images):
        chunk = chunk - fitted.mean
        chunk = chunk * fitted.matrix if fitted.matrix.ndim == 1 else chunk @ fitted.matrix.T
        flat[start : start + len(chunk)] = chunk
        start += len(chunk)
    return result


def second_moment(images: Float[np.ndarray, "n *image"]) -> dict[str, float]:
    """Eigenvalues of E[x̃·x̃ᵀ], x̃ = (x, 1): the Hessian of a linear unit with a bias.

    "condition_number" is "largest" over "smallest", the smallest above zero to the rounding of
    float32 inputs; "rank" counts those. Gradient descent never moves along the others.
    """
    mean, sigma = _moments(images)
    values = np.linalg.eigvalsh(hessian(sigma, mean))
    # Rounding to float32 is noise of relative size 2^-24, and its square adds to the eigenvalues.
    values = values[values > np.finfo(np.float32).eps ** 2 * len(values) * values[-1]]
    largest, smallest = float(values[-1]), float(values[0])
    return {
        "condition_number": largest / smallest,
        "largest": largest,
        "smallest": smallest,
        "rank": len(values),
    }


def hessian(
    covariance: Float[np.ndarray, "d d"], mean: Float[np.ndarray, "d"]
) -> Float[np.ndarray, "d+1 d+1"]:
    """H = E[x̃·x̃ᵀ] of inputs with this covariance and mean; the bias comes last."""
    extended = np.append(mean, 1.0)
    return np.pad(covariance, (0, 1)) + np.outer(extended, extended)


def _moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d] and biased covariance [d, d] of flattened images, in float64."""
    with jax.enable_x64(True):
        parts = (batch_covariance(jnp.asarray(chunk)) for chunk in _chunks(images))
        moments = functools.reduce(merge_covariance, parts)
        return np.asarray(moments.mean), np.asarray(covariance(moments))


def _chunks(images: np.ndarray) -> Iterator[np.ndarray]:
    flat = images.reshape(len(images), -1)
    for start in range(0, len(flat), _CHUNK):
        yield flat[start : start + _CHUNK].astype(np.float64)


def _inverse_roots(values: np.ndarray, varies: np.ndarray, added: float) -> np.ndarray:
    """1/√(values + added), and 0 where nothing varies."""
    return np.where(varies, 1 / np.sqrt(np.where(varies, values + added, 1)), 0)
