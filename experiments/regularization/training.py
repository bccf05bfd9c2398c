"""The networks, with their norm and their dropout, and what trains and evaluates them."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from bn_research.lab import settings
from bn_research.lab.runner import Runner
from bn_research.lab.settings import Programs, Setting, Training, per_structure
from bn_research.layers.linen import MOMENTS, BatchNorm, population_batch_stats
from bn_research.layers.stochastic_norm import StochasticBatchNorm
from bn_research.models.cnn import CNN
from bn_research.models.initializers import kernel_initializer
from bn_research.normalization import Moments
from bn_research.training.compiler import compiler_options
from bn_research.training.evaluation import EvaluationSet, make_evaluation, place_batches
from bn_research.training.loop import History, epoch_order_of_groups, run_steps
from bn_research.training.optimizers import create_optimizer
from bn_research.training.state import TrainState
from bn_research.training.step import Batch, make_eval_step, make_train_step

_EVAL_BATCH = 32
_POPULATION_BATCHES = 32  # at most
_MOMENTS_KEY = 20_000  # of the dropout and noise under which population statistics are taken

# "batch" is BatchNorm; those after it are StochasticBatchNorm, "population" without noise.
NORMS = ("none", "batch", "population", "measured", "borrowed", "additive")


class Data(NamedTuple):
    """Three sets that share no example."""

    train: Batch
    validation: Batch  # the training split's next examples: settings are chosen by it
    test: Batch


class Network(Setting, traced="rate dropout regrouped"):
    """A network and its training."""

    network: str
    norm: str = "batch"  # of the hidden layers: one of NORMS
    population: str = "running"  # of StochasticBatchNorm; the other norms do not look at it
    group_size: int = 0  # examples that share statistics, or one draw of noise; 0: the whole batch
    batch_size: int = 512  # of SGD
    dropout_placement: str = "none"  # or as of CNN
    rate: float = 0.1  # of the first step; a cosine takes it to 0
    dropout: float = 0.0
    regrouped: bool = True  # False: groups of group_size are drawn once, whatever batch they meet

    @property
    def stochastic(self) -> bool:
        """Whether a training pass draws random numbers."""
        return self.norm not in NORMS[:2] or self.dropout_placement != "none"

    @property
    def bare(self) -> "Network":
        """The part that weights at the start and inference depend on; all kinds of BN agree."""
        norm = "none" if self.norm == "none" else "batch"
        return Network(
            self.network, norm, rate=self.rate, dropout=self.dropout, regrouped=self.regrouped
        )


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Trains networks, each once in the life of a workdir, and evaluates them on the three sets."""

    runner: Runner
    data: Data
    num_steps: int  # of each training
    steps_per_dispatch: int  # of one call into the compiled program
    compiler_level: int = 1

    @functools.cached_property
    def _sets(self) -> dict[str, EvaluationSet]:
        sets = self.data._asdict().items()
        return {name: place_batches(examples, batch_size=_EVAL_BATCH) for name, examples in sets}

    def train(
        self,
        arms: Iterable[tuple[str, Network]],
        seeds: Sequence[int],
        *,
        measure: Callable[[Network, TrainState], Mapping[str, Any]] = lambda network, state: {},
    ) -> list[dict[str, Any]]:
        """Records of the named networks, all seeds of one before the next; equal ones train once.

        Each holds its network and seed, the training loss (mean over each dispatch, training mode),
        the number of steps that were not finite and so not taken, mean loss and accuracy on the
        three sets in inference mode, and what is measured of (network, state), both by population
        statistics.
        """

        def record(training: Training, state: TrainState, history: History) -> dict[str, Any]:
            network = training.setting
            state = self.with_population_stats(network, state)
            losses = history.loss.reshape(-1, self.steps_per_dispatch).mean(axis=1)
            return {
                **network.as_record(),
                "seed": training.seed,
                "loss": losses,
                "diverged": history.diverged,
                **self.evaluate(network, state),
                **measure(network, state),
            }

        shape = (1, *self.data.train.image.shape[1:])
        options = self.num_steps, self.steps_per_dispatch, self.compiler_level
        return settings.train(
            self.runner,
            [Training(net, seed, self.num_steps, arm) for arm, net in arms for seed in seeds],
            lambda network: _programs(network, shape, *options),
            self.data.train,
            record=record,
            name=lambda t: f"{t.setting.name} num_steps={t.num_steps} seed={t.seed}",
        )

    def evaluate(self, network: Network, state: TrainState) -> dict[str, float]:
        """Loss and accuracy on the three sets, in inference mode by the state's batch_stats."""
        found: dict[str, float] = {}
        state = state._replace(opt_state=(), key=jax.random.key(0))
        for name, examples in self._sets.items():
            program = _evaluation_program(network.bare, examples.mesh, self.compiler_level)
            scores = program(examples.batches, state)
            found |= {f"{name}_loss": scores["loss"], f"{name}_accuracy": scores["accuracy"]}
        return found

    def with_population_stats(self, network: Network, state: TrainState) -> TrainState:
        """The state with batch_stats by algorithm 2, over training batches in training mode."""
        if network.norm == "none":
            return state
        size, images = network.batch_size, self.data.train.image
        count = min(len(images) // size, _POPULATION_BATCHES)
        moments = _moments_program(self.compiler_level)
        keys = jax.random.split(jax.random.key(_MOMENTS_KEY), (count, size))
        population = population_batch_stats(
            lambda variables, batch: moments(network.traced, variables, *batch),
            {"params": state.params, "batch_stats": state.batch_stats},
            list(zip(jnp.split(images[: count * size], count), keys, strict=True)),
        )
        return state._replace(batch_stats=population)


def optimizer(network: Network, num_steps: int) -> optax.GradientTransformation:
    """Momentum SGD whose rate a cosine takes to 0 over num_steps."""
    schedule = optax.cosine_decay_schedule(network.rate, num_steps)
    return create_optimizer("momentum", schedule, momentum=0.9)


def make_model(network: Network) -> CNN:
    """BN, of whatever kind, stands on the hidden layers."""
    norm: Any = functools.partial(
        BatchNorm,
        epsilon=1e-5,
        group_size=network.group_size or None,
        momentum=0.9,  # of the running statistics, which no result rests on
    )
    options: dict[str, Any] = dict(population=network.population)
    if network.norm in NORMS[2:]:
        options |= dict(noise="none" if network.norm == "population" else network.norm)
        norm = functools.partial(StochasticBatchNorm, **norm.keywords, **options)
    options = dict(kernel_init=kernel_initializer("he"))
    if network.dropout_placement != "none":
        options |= dict(dropout=network.dropout, dropout_placement=network.dropout_placement)
    return CNN(network.network, norm, "none" if network.norm == "none" else "hidden", **options)


def apply_training(
    network: Network, variables: Any, image: Array, keys: Key[Array, "batch"] | None
) -> tuple[Array, Any]:
    """Logits in training mode, and the collections `batch_stats` and `batch_moments`."""
    options: dict[str, Any] = {}
    if network.stochastic:
        assert keys is not None
        # Two uses of one key: noise is drawn once for the batch, dropout for each example.
        options["rngs"] = {"noise": jax.random.fold_in(keys[0], 1)}
        if network.dropout_placement != "none":
            options["keys"] = jax.vmap(jax.random.fold_in, (0, None))(keys, 2)
    mutable = ["batch_stats", MOMENTS]
    return make_model(network).apply(variables, image, train=True, mutable=mutable, **options)


@per_structure
def _creator(network: Network, shape: tuple[int, ...], num_steps: int):
    return settings.creator(
        lambda key, network: make_model(network).init(key, jnp.zeros(shape), train=False),
        functools.partial(optimizer, num_steps=num_steps),
    )


@per_structure
def _programs(network: Network, shape: tuple[int, ...], num_steps: int, each: int, level: int):
    """Of num_steps, so many each dispatch, compiled at a level."""

    def advance(state: TrainState, network: Network, examples: Batch):
        def apply_fn(variables, image, *, train, keys=None):
            logits, new = apply_training(network, variables, image, keys)
            return logits, new.get("batch_stats", {})

        return run_steps(
            make_train_step(apply_fn, optimizer(network, num_steps), stochastic=network.stochastic),
            state,
            examples,
            batch_size=network.batch_size,
            num_steps=each,
            order_of_epoch=functools.partial(
                epoch_order_of_groups,
                group_size=network.group_size or network.batch_size,
                regrouped=network.regrouped,
            ),
        )

    create = _creator(network.bare, shape, num_steps)
    return Programs(
        lambda key, network: create(key, network.bare),
        settings.sweep(advance, steps_per_dispatch=each, compiler_level=level),
    )


@functools.cache
def _moments_program(compiler_level: int):
    @functools.partial(jax.jit, compiler_options=compiler_options(compiler_level))
    def moments(network: Network, variables, image, keys):
        groups = 1
        if network.norm == "batch" and network.group_size:
            groups = network.batch_size // network.group_size

        def of_groups(found):
            """Moments whose m2/(count − 1) is unbiased, where m2 is about the means of groups.

            Algorithm 2 then gives the mean over groups of m/(m − 1)·σ_g², m the size of a group.
            """
            if not isinstance(found, Moments):
                return found
            return found._replace(m2=found.m2 * (found.count - 1) / (found.count - groups))

        found = apply_training(network, variables, image, keys)[1][MOMENTS]
        return jax.tree.map(of_groups, found, is_leaf=lambda leaf: isinstance(leaf, Moments))

    return moments


@per_structure
def _evaluation_program(network: Network, mesh: jax.sharding.Mesh, compiler_level: int):
    def apply_fn(variables, image, *, train):
        model = make_model(network)
        return model.apply(variables, image, train=False), variables["batch_stats"]

    return make_evaluation(
        lambda batch, state: make_eval_step(apply_fn)(state, batch),
        mesh,
        compiler_options=compiler_options(compiler_level),
    )
