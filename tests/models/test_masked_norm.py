"""Networks that are given a mask: padding moves nothing, whatever stands in it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bn_research.layers.linen import BatchNorm
from bn_research.models.cnn import CNN
from bn_research.models.inception import Inception
from bn_research.models.masked_norm import masked_norm
from bn_research.models.mlp import MLP
from bn_research.models.resnet import ResNet
from bn_research.training.state import create_train_state
from bn_research.training.step import Batch, make_eval_step, make_train_step

OURS = functools.partial(BatchNorm, momentum=0.9, epsilon=1e-3)
PER_ACTIVATION = functools.partial(OURS, axis=(1, 2, 3))
FLAX = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-3)
MODELS = {
    "mlp": MLP("f5 f3", OURS, "all"),
    "cnn": CNN("c3 P c4 f5 f3", OURS, "all"),
    "cnn, groups": CNN("c3 P f3", functools.partial(OURS, group_size=4), "hidden"),
    "cnn, one layer": CNN("c3 f4 f3", OURS, 2),
    "cnn, Flax's layer": CNN("c3 P f5 f3", FLAX, "all"),
    "cnn without norm": CNN("c3 P f3"),
    "inception": Inception(
        3, OURS, 1 / 32, stem="small", modules=("3a", "3c"), last_norm=PER_ACTIVATION
    ),
    "resnet": ResNet((1, 1), 3, 2, OURS),
    "resnet, pre-activation": ResNet((1,), 3, 2, OURS, bottleneck=True, preactivation=True),
    "resnet, torch": ResNet((1,), 3, 2, OURS, stem="imagenet", padding="torch"),
}


def apply_fn(model):
    def apply(variables, images, *, train, where=None):
        logits, new = model.apply(
            variables, images, train=train, where=where, mutable=["batch_stats"]
        )
        return logits, new.get("batch_stats", {})

    return apply


@pytest.mark.parametrize("name", MODELS)
def test_a_step_with_padding_is_that_without(name):
    """Params, running statistics and metrics, and then evaluation, in float64."""
    model = MODELS[name]
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        images, labels = rng.standard_normal((12, 8, 8, 1)), rng.integers(0, 3, 12)
        where = np.arange(12) < 8  # whole groups
        padded = Batch(np.where(where[:, None, None, None], images, np.nan), labels, where)
        optimizer = optax.sgd(0.5)

        def init(key):
            variables = model.init(key, images[:2], train=False)
            return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)

        state = jax.jit(lambda: create_train_state(init, optimizer, jax.random.key(0)))()
        results = []
        for batch in (padded, Batch(images[:8], labels[:8])):
            new, metrics = jax.jit(make_train_step(apply_fn(model), optimizer))(state, batch)
            evaluated = jax.jit(make_eval_step(apply_fn(model)))(new, batch)
            assert not metrics.diverged
            results.append((new.params, new.batch_stats, metrics.loss, evaluated))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), *results
        )
        moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), new.batch_stats, state.batch_stats)
        assert all(jax.tree.leaves(moved))


def test_without_a_mask_a_factory_stays_what_it_is():
    """So layers that take none are welcome."""
    assert masked_norm(OURS, None) is OURS
    assert masked_norm(None, np.ones(3, bool)) is None


@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 5), (3, 2, 2, 5)])
def test_the_mask_has_an_axis_for_each_of_the_input(shape):
    seen = []
    layer = masked_norm(lambda **options: lambda x, mask: seen.append((options, mask)), jnp.ones(3))
    layer(name="norm1")(jnp.zeros(shape))
    ((options, mask),) = seen
    assert options == {"name": "norm1"} and mask.shape == (3, *[1] * (len(shape) - 1))
