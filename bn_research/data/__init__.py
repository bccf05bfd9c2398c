"""Data sets through tfds builders, with random access and no TensorFlow to read them."""

from bn_research.data.datasets import DATASETS, EVALUATION_SPLIT, FULL_SCALE, data_source, prepare
from bn_research.data.errors import DataError
from bn_research.data.in_memory import Examples, load_examples, scale_images
from bn_research.data.streaming import (
    Batches,
    MaskedExamples,
    evaluation_batches,
    training_batches,
)

__all__ = [
    "DATASETS",
    "EVALUATION_SPLIT",
    "FULL_SCALE",
    "Batches",
    "DataError",
    "Examples",
    "MaskedExamples",
    "data_source",
    "evaluation_batches",
    "load_examples",
    "prepare",
    "scale_images",
    "training_batches",
]
