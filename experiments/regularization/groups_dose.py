"""How much noise reaches the logits of a network of `experiments.regularization`.

The same examples pass the network in training mode several times, in groups of other company or
with other draws. With z the logits of an example, less their mean over the classes, which softmax
does not see,

    dose = E[Var(z | example)] / Var(E[z | example]),

the variances over passes and over examples, summed over classes: the power of the noise in units of
the signal's.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from bn_research.training.compiler import compiler_options
from bn_research.training.state import TrainState
from experiments.regularization.arms import Setting, apply_training, make_model
from experiments.regularization.training import Trainer

_PASSES = 8
_KEY = 40_000  # of their order and draws


def dose(trainer: Trainer, setting: Setting, state: TrainState) -> dict[str, float]:
    """What a record is to hold, under "dose"; over the training set, as far as it fills batches."""
    image = trainer.data.train.image
    batches = len(image) // setting.batch_size
    program = _program(setting.static, batches, trainer.compiler_level)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return {"dose": float(program(variables, image[: batches * setting.batch_size]))}


@functools.cache
def _program(static: tuple[Any, ...], batches: int, compiler_level: int):
    setting = Setting(*static)
    model = make_model(setting)

    @functools.partial(jax.jit, compiler_options=compiler_options(compiler_level))
    def program(variables, image):
        def one_pass(key):
            order_key, noise_key = jax.random.split(key)
            order = jax.random.permutation(order_key, len(image))
            keys = jax.random.split(noise_key, (batches, setting.batch_size))

            def logits(batch):
                return apply_training(model, setting, variables, *batch)[0]

            shuffled = image[order].reshape(batches, setting.batch_size, *image.shape[1:])
            found = jax.lax.map(logits, (shuffled, keys)).reshape(len(image), -1)
            return jnp.zeros_like(found).at[order].set(found)

        z = jax.lax.map(one_pass, jax.random.split(jax.random.key(_KEY), _PASSES))
        z = z - jnp.mean(z, axis=-1, keepdims=True)
        noise = jnp.mean(jnp.var(z, axis=0, ddof=1), axis=0)
        signal = jnp.var(jnp.mean(z, axis=0), axis=0)
        return jnp.sum(noise) / jnp.sum(signal)

    return program
