"""Data sets through tfds builders, with random access and no TensorFlow to read them."""

from bn_research.data.datasets import DATASETS, FULL_SCALE, data_source, prepare
from bn_research.data.errors import DataError
from bn_research.data.in_memory import Examples, load_examples, scale_images

__all__ = [
    "DATASETS",
    "FULL_SCALE",
    "DataError",
    "Examples",
    "data_source",
    "load_examples",
    "prepare",
    "scale_images",
]
