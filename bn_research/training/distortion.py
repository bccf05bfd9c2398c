"""Photometric distortion on the device, whose factors of an image do not depend on its batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in PIL


class Factors(NamedTuple):
    """Of a batch's distortions; factor 1 changes nothing."""

    contrast: Float[Array, "batch"]  # 0 makes an image its mean gray
    brightness: Float[Array, "batch"]  # 0 makes it black
    saturation: Float[Array, "batch"]  # 0 leaves it without color
    order: Int[Array, "batch 3"]  # 0 contrast, 1 brightness, 2 saturation: first to last


def photometric_distortion(
    image: Float[Array, "batch height width channels"],
    keys: Key[Array, "batch"],
    *,
    strength: float,
    low: float = 0.0,
    high: float = 1.0,
) -> Float[Array, "batch height width channels"]:
    """Contrast, brightness and, of 3 channels, saturation, in random order, each by a factor.

    Each image has an order and three factors of its own, uniform over 1 − strength ... 1 + strength
    and a function of its key alone, so a batch is distorted alike on one device and in parts on
    many. It is what `bn_research.data.augment.photometric_distortion` does to a uint8 image on the
    host; here there is no rounding to integers, and the random numbers are others.

    Args:
      image: floating point, black at low and white at high; 1 channel, gray, or 3, RGB.
      keys: typed PRNG keys, one for each image.
      strength: in [0, 1); 0.5 is the reference's, less is weaker, and 0 gives image as it is.
      low: black, and the least value of the result.
      high: white, and its greatest.

    Raises:
      ValueError: images of a bad shape or dtype, a strength outside [0, 1), low ≥ high, keys that
        are not typed or not one for each image, or keys of a generator that under `vmap` draws by
        the first key alone (rbg).

    Reference: Howard, "Some Improvements on Deep Convolutional Neural Network Based Image
    Classification", arXiv:1312.5402, section 2.2; without its lighting noise.
    """
    _check_images(image, low, high)
    if not 0 <= strength < 1:
        raise ValueError(f"strength={strength!r} is not allowed: it must be in [0, 1)")
    if not jax.dtypes.issubdtype(keys.dtype, jax.dtypes.prng_key):
        raise ValueError(f"keys has dtype {keys.dtype}: allowed are typed keys, of jax.random.key")
    if keys.shape != image.shape[:1]:
        raise ValueError(f"keys has shape {keys.shape}: one for each image is {image.shape[:1]}")
    if "rbg" in str(jax.random.key_impl(keys)):
        raise ValueError(
            f"keys are of the generator {jax.random.key_impl(keys)}, which draws a batch by its "
            'first key: use keys of jax.random.key(seed, impl="threefry2x32")'
        )
    if strength == 0:
        return image
    return distort(image, draw_factors(keys, strength=strength), low=low, high=high)


def draw_factors(keys: Key[Array, "batch"], *, strength: float) -> Factors:
    """Random factors and order for each key, in float32 and int32; see `photometric_distortion`."""

    def draw(key: Array) -> Factors:
        key, order_key = jax.random.split(key)
        # float32 and int32 with 64-bit types enabled too: the same draws.
        factors = jax.random.uniform(key, (3,), jnp.float32, 1 - strength, 1 + strength)
        order = jax.random.permutation(order_key, jnp.arange(3, dtype=jnp.int32))
        return Factors(factors[0], factors[1], factors[2], order)

    return jax.vmap(draw)(keys)


def distort(
    image: Float[Array, "batch height width channels"],
    factors: Factors,
    *,
    low: float = 0.0,
    high: float = 1.0,
) -> Float[Array, "batch height width channels"]:
    """Distorts images by given factors, one after the other.

    Each step is v ← clip(d + factor·(v − d), low, high), where d is the image's mean luma for
    contrast, low for brightness and each pixel's luma for saturation. Luma is 0.299·R + 0.587·G +
    0.114·B, and of 1 channel the channel itself, which has no saturation to change.

    Args:
      image: as in `photometric_distortion`; computed in float32 or wider.
      factors: one of each kind, and an order, for each image.
      low: black, and the least value of the result.
      high: white, and its greatest.

    Raises:
      ValueError: images of a bad shape or dtype, or low ≥ high.
    """
    _check_images(image, low, high)
    wide = image.astype(jnp.promote_types(image.dtype, jnp.float32))
    luma = jnp.asarray(_LUMA, wide.dtype)
    amounts = jnp.stack(factors[:3], axis=-1).astype(wide.dtype)

    def one(v: Array, amounts: Array, order: Array) -> Array:
        for kind in order:
            gray = jnp.sum(v * luma, -1, keepdims=True) if v.shape[-1] == 3 else v
            end = jnp.select(
                [kind == 0, kind == 1], [jnp.mean(gray), jnp.asarray(low, v.dtype)], gray
            )
            v = jnp.clip(end + amounts[kind] * (v - end), low, high)
        return v

    return jax.vmap(one)(wide, amounts, factors.order).astype(image.dtype)


def _check_images(image: Array, low: float, high: float) -> None:
    if image.ndim != 4 or image.shape[-1] not in (1, 3):
        raise ValueError(
            f"image has shape {image.shape}: allowed is (batch, height, width, 1 or 3 channels)"
        )
    if not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(f"image has dtype {image.dtype}: scale images to floating point")
    if not low < high:
        raise ValueError(f"low={low!r} and high={high!r} are not allowed: low must be less")
