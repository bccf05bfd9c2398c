"""What a setting of `experiments.imagenet` means in programs: network, optimizer, steps, input."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from bn_research import data
from bn_research.data import augment
from bn_research.layers.linen import BatchNorm
from bn_research.models.cnn import CNN
from bn_research.models.inception import Inception
from bn_research.training.loop import evaluate
from bn_research.training.optimizers import create_optimizer
from bn_research.training.parallel import Parallel
from bn_research.training.state import TrainState, create_train_state
from bn_research.training.step import Batch, apply_fn_of, make_eval_step, make_train_step
from experiments.imagenet import Config

INCEPTION = "inception"

_MOMENTUM = 0.9
_RATE_FACTOR = 0.96  # at each decay of the rate


class Setting(NamedTuple):
    """One of the paper's five; what it does not state is ours, see `experiments.imagenet`."""

    learning_rate: float
    batch_norm: bool
    dropout: float
    local_response_norm: bool
    weight_decay: float  # L2
    epochs_per_decay: float  # of the rate
    distortion: float  # strength of the photometric distortions
    activation: Callable[[Array], Array] = jax.nn.relu


_BASELINE = Setting(0.0015, True, 0.4, True, 4e-5, 8.0, 0.5)
_ACCELERATED = Setting(0.0075, True, 0.0, False, 4e-5 / 5, 8.0 / 6, 0.25)
SETTINGS = {
    "inception": _BASELINE._replace(batch_norm=False),
    "bn_baseline": _BASELINE,
    "bn_x5": _ACCELERATED,
    "bn_x30": _ACCELERATED._replace(learning_rate=0.045),
    "bn_x5_sigmoid": _ACCELERATED._replace(activation=jax.nn.sigmoid),
}


class Programs:
    """The programs of a config, over the devices of a mapping; none is compiled yet."""

    def __init__(self, config: Config, builder: Any, parallel: Parallel):
        self._config, self._builder, self._parallel = config, builder, parallel
        setting = SETTINGS[config.setting]
        self._image_shape = builder.info.features["image"].shape
        self._augmentation = (
            augment.cifar_augmentation() if config.augmentation == "cifar" else None
        )
        self._cropping = None
        if config.augmentation == "imagenet":
            size = config.image_size
            self._image_shape = (size, size, 3)
            self._augmentation = augment.imagenet_augmentation(size, strength=setting.distortion)
            self._cropping = augment.imagenet_evaluation(size)
        self._input = dict(
            batch_size=config.batch_size // config.microbatches,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_workers=config.num_workers,
        )
        num_classes = builder.info.features["label"].num_classes
        self._model = create_model(config, num_classes, axis_name=parallel.axis_name)
        examples = builder.info.splits["train"].num_examples
        steps = round(setting.epochs_per_decay * examples / config.batch_size) or 1
        rate = optax.exponential_decay(setting.learning_rate, steps, _RATE_FACTOR, staircase=True)
        self.optimizer = create_optimizer(
            "momentum", rate, momentum=_MOMENTUM, weight_decay=setting.weight_decay
        )
        apply_fn = make_apply_fn(self._model, data.FULL_SCALE[config.dataset])
        self._batch_axis = 0 if config.microbatches == 1 else 1
        self.train_step = parallel.map(
            make_train_step(
                apply_fn,
                self.optimizer,
                axis_name=parallel.axis_name,
                accumulated_statistics=config.microbatch_statistics or None,
                stochastic=config.network == INCEPTION and setting.dropout > 0,
            ),
            batch_axis=self._batch_axis,
        )
        self._eval_step = parallel.map(
            make_eval_step(apply_fn, axis_name=parallel.axis_name), donate_state=False
        )

    def create_state(self, seed: int) -> TrainState:
        """The state before the first step, one copy over the devices."""
        sample = jnp.zeros((1, *self._image_shape))
        init = functools.partial(self._model.init, train=False)
        return self._parallel.create(
            lambda: create_train_state(
                lambda key: init(key, sample), self.optimizer, jax.random.key(seed)
            )
        )

    @contextlib.contextmanager
    def stream(self, seed: int) -> Iterator[Callable[[int], Iterator[Batch]]]:
        """Inside it: step -> the batches from that step on, over the devices."""
        with contextlib.ExitStack() as stack:

            def open_stream(step: int) -> Iterator[Batch]:
                batches = data.training_batches(
                    self._builder,
                    "train",
                    seed=seed,
                    transform=self._augmentation,
                    start_step=step * self._config.microbatches,
                    **self._input,
                )
                return self._placed(stack.enter_context(batches))

            yield open_stream

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Loss and accuracy on the whole evaluation split, by running statistics."""
        split = data.EVALUATION_SPLIT[self._config.dataset]
        with data.evaluation_batches(
            self._builder, split, transform=self._cropping, **self._input
        ) as batches:
            rows = (Batch(*examples) for examples in batches)  # type: ignore[arg-type]
            return evaluate(self._eval_step, state, map(self._parallel.shard, rows))

    def _placed(self, batches: Iterator[data.Examples]) -> Iterator[Batch]:
        count = self._config.microbatches
        while True:
            pieces = [Batch(*next(batches)) for _ in range(count)]  # type: ignore[arg-type]
            rows = pieces[0] if count == 1 else jax.tree.map(lambda *leaf: np.stack(leaf), *pieces)
            yield self._parallel.shard(rows, batch_axis=self._batch_axis)


def create_model(config: Config, num_classes: int, *, axis_name: str | None) -> Inception | CNN:
    """The network of a config; its norm layers share statistics over axis_name."""
    setting = SETTINGS[config.setting]
    norm = functools.partial(BatchNorm, axis_name=axis_name, group_size=config.group_size or None)
    if config.network != INCEPTION:
        return CNN(
            config.network,
            norm,
            "all" if setting.batch_norm else "none",
            use_bias=not setting.batch_norm,
            activation=setting.activation,
        )
    return Inception(
        num_classes=num_classes,
        norm=norm if setting.batch_norm else None,
        width=config.width,
        dropout=setting.dropout,
        local_response_norm=setting.local_response_norm,
        activation=setting.activation,
        dtype=jnp.dtype(config.dtype),
    )


def make_apply_fn(model: Inception | CNN, full_scale: int) -> Callable[..., tuple[Array, Any]]:
    """(variables, images, train, keys) -> (logits, batch_stats), of images 0 ... full_scale."""
    apply_fn = apply_fn_of(model)

    def scaled(variables: Any, images: Array, **options: Any) -> tuple[Array, Any]:
        return apply_fn(variables, images.astype(jnp.float32) * (2 / full_scale) - 1, **options)

    return scaled
