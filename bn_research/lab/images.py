"""The images of an experiment: scaled, resized and in memory."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bn_research import data
from bn_research.models.cnn import CNN
from bn_research.models.spec import num_logits
from bn_research.training.step import Batch


class Images(NamedTuple):
    """A data set, scaled and in memory."""

    train: Batch
    test: Batch
    pixels: np.ndarray  # uint8: the training images as they came
    num_classes: int


def load_images(
    name: str,
    *,
    data_dir: str = "",
    manual_dir: str = "",
    scale: str,
    size: int = 0,
    limit: int | None = None,
) -> Images:
    """A data set with float32 images; resized to size × size unless that is 0.

    Args:
      name: of `bn_research.data.DATASETS`.
      data_dir: where tfds keeps prepared sets; "" is its default.
      manual_dir: where source files lie; "" is the set's default.
      scale: see `bn_research.data.scale_images`; "standardized" by the training set.
      size: height and width of the images; 0 keeps theirs.
      limit: use this many examples of each split only.
    """
    builder = data.prepare(name, data_dir=data_dir or None, manual_dir=manual_dir or None)
    splits = [data.load_examples(builder, split, limit=limit) for split in ("train", "test")]
    batches = []
    for split in splits:
        images = data.scale_images(
            split.image, scale, reference=splits[0].image, full_scale=data.FULL_SCALE[name]
        )
        batches.append(Batch(resize(images, size), jnp.asarray(split.label)))
    num_classes = builder.info.features["label"].num_classes
    return Images(batches[0], batches[1], splits[0].image, num_classes)


def images_of(config: Any, *, scale: str, size: int | None = None, limit: int = 0) -> Images:
    """The images that a config names, by `dataset`, `data_dir`, `manual_dir` and `image_size`.

    Args:
      config: of an experiment.
      scale: see `load_images`.
      size: instead of the config's `image_size`; 0, or no such field, keeps theirs.
      limit: use this many examples of each split only; 0 is all.
    """
    return load_images(
        config.dataset,
        data_dir=config.data_dir,
        manual_dir=config.manual_dir,
        scale=scale,
        size=getattr(config, "image_size", 0) if size is None else size,
        limit=limit or None,
    )


def check_network(network: str, images: Images, dataset: str) -> None:
    """ValueError unless a CNN of this spec has a logit for each class and can take the images."""
    units, classes = num_logits(network), images.num_classes
    if units != classes:
        raise ValueError(
            f"network {network!r} ends in {units} units but {dataset} has {classes} classes: end "
            f"it in f{classes}"
        )
    sample = jax.ShapeDtypeStruct((1, *images.train.image.shape[1:]), jnp.float32)
    jax.eval_shape(functools.partial(CNN(network).init, train=False), jax.random.key(0), sample)


def resize(images: np.ndarray | Array, size: int) -> Array:
    """Images resized to size × size, bilinear with antialiasing; size 0 keeps them."""
    images = jnp.asarray(images)
    if size in (0, images.shape[1]):
        return images
    shape = (images.shape[0], size, size, images.shape[3])
    return jax.image.resize(images, shape, "linear", antialias=True)
