"""Multilayer perceptrons: dense layers only, on flattened inputs."""

from jaxtyping import Array, Bool, Float, Key

from bn_research.models.cnn import CNN
from bn_research.models.spec import Dense, parse_spec


class MLP(CNN):
    """A `CNN` whose spec has dense layers only; inputs of any rank are flattened.

    The network of Ioffe & Szegedy's section 4.1 is
    `MLP(spec="f100 f100 f100 f10", activation=jax.nn.sigmoid)`.
    """

    spec: str = "f100 f100 f100 f10"

    def __call__(
        self,
        x: Float[Array, "batch ..."],
        *,
        train: bool,
        keys: Key[Array, "batch"] | None = None,
        where: Bool[Array, "batch"] | None = None,
    ) -> Float[Array, "batch classes"]:
        """Logits of x.

        Args:
          x: inputs.
          train: normalize by the batch and drop out.
          keys: a PRNG key for each example, for dropout in training.
          where: False marks examples that are padding, which norm layers are given as `mask`.

        Raises:
          ValueError: a spec with convolutions or pooling, or as `CNN`.
        """
        if not all(isinstance(layer, Dense) for layer in parse_spec(self.spec)):
            raise ValueError(f"network {self.spec!r} has more than dense layers: use CNN for it")
        return super().__call__(x, train=train, keys=keys, where=where)
