"""The three sets of `experiments.regularization`."""

from typing import NamedTuple

import jax

from bn_research.lab.images import Images
from bn_research.training.step import Batch


class Data(NamedTuple):
    """Three sets that share no example."""

    train: Batch
    validation: Batch  # the training split's next examples: settings are chosen by it
    test: Batch


def split(images: Images, *, train: int, validation: int, test: int) -> Data:
    """The first examples of the training split, those after them, and the first of the test set."""

    def cut(examples: Batch, start: int, stop: int) -> Batch:
        return jax.tree.map(lambda leaf: leaf[start:stop], examples)

    return Data(
        cut(images.train, 0, train),
        cut(images.train, train, train + validation),
        cut(images.test, 0, test),
    )
