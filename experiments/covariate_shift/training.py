"""Training for `experiments.covariate_shift`: settings chosen from a grid, then observed."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from bn_research.claims.judging import by_seed, choose
from bn_research.lab import Ledger, settings
from bn_research.lab.fields import at_most
from bn_research.lab.images import Images, check_network, images_of
from bn_research.lab.runner import Runner
from bn_research.lab.settings import Programs, Setting, Training, per_structure
from bn_research.layers.linen import BatchNorm
from bn_research.models.mlp import MLP
from bn_research.training.compiler import compiler_options
from bn_research.training.cores import use_cpu_cores
from bn_research.training.evaluation import make_evaluation, place_batches
from bn_research.training.loop import History, run_steps
from bn_research.training.state import TrainState
from bn_research.training.step import Batch, apply_fn_of, make_eval_step, make_train_step
from experiments.covariate_shift import Config
from experiments.covariate_shift.shifts import Data, observe, summary
from experiments.covariate_shift.verdicts import ARMS, Arms, small_weights

_EVAL_BATCH = 250
_SHARED = ("learning_rate", "momentum", "init_std")  # by both networks of a claim


def prepare(config: Config) -> Images:
    """The images, of which there are enough; each core becomes a device, for the sweeps."""
    use_cpu_cores()
    images = images_of(config, scale="standardized")
    check_network(config.network, images, config.dataset)
    count = len(images.train.label)
    if 2 * config.batch_size > count:
        raise ValueError(
            f"batch_size={config.batch_size} is not allowed: two batches of the {count} training "
            "examples are needed for the noise floor"
        )
    at_most(config, len(images.test.label), "the test set", "measuring_images", "evaluation_images")
    return images


class Network(Setting, traced="learning_rate momentum init_std epsilon"):
    """A network and how it is trained."""

    activation: str  # of jax.nn
    batch_norm: bool  # on every hidden layer, or on none
    learning_rate: float
    momentum: float  # of SGD; 0 is none
    init_std: float  # of every kernel's Gaussian weights; biases begin at 0
    epsilon: float  # of BN


def grids(config: Config) -> dict[str, list[Network]]:
    """What settings are chosen from, by comparison; that of the claims first.

    Without BN and then with it; ε is BN's alone.
    """
    first, *others = config.activations
    stds: dict[str, tuple[float, ...]] = {first: config.init_stds}
    if config.small_init_std:
        stds[small_weights(config)] = (config.small_init_std,)
    stds |= dict.fromkeys(others, config.init_stds)
    return {
        name: [
            Network(name if name in others else first, batch_norm, *point)
            for batch_norm, epsilons in ((False, config.epsilons[:1]), (True, config.epsilons))
            for point in itertools.product(config.learning_rates, config.momenta, of, epsilons)
        ]
        for name, of in stds.items()
    }


def choose_arms(tuned: Sequence[Mapping[str, Any]]) -> dict[str, Network]:
    """The arms at the settings of the lowest training loss; one that diverged comes last."""
    plain = choose(by_seed(tuned, batch_norm=False), "loss")
    same = by_seed(tuned, batch_norm=True, **{name: plain[name] for name in _SHARED})
    best = plain, choose(same, "loss"), choose(by_seed(tuned, batch_norm=True), "loss")
    networks = (Network(**{n: record[n] for n in Network.__annotations__}) for record in best)
    return dict(zip(ARMS, networks, strict=True))


def measure(config: Config, images: Images, path: Path) -> dict[str, Arms]:
    """Each comparison by name, that of the claims first; its arms are tuned on a seed apart."""
    planned, seeds = grids(config), range(config.seeds)
    total = sum(map(len, planned.values())) * config.tuning_steps
    total += len(ARMS) * len(seeds) * (config.num_steps + (len(planned) - 1) * config.other_steps)
    test = place_batches(images.test, batch_size=_EVAL_BATCH)
    evaluation = Batch(*(leaf[: config.evaluation_images or None] for leaf in images.test[:2]))
    data = Data(images.train, images.test.image[: config.measuring_images], evaluation)
    shape = (1, *images.train.image.shape[1:])

    def tuning(training: Training, state: TrainState, history: History) -> dict[str, Any]:
        last = history.loss[-max(1, config.tuning_steps // 10) :]
        return {"loss": float(np.mean(last)), "diverged": history.diverged}

    def whole(training: Training, state: TrainState, history: History) -> dict[str, Any]:
        """Accuracy is that of the whole test set at the end, by the running statistics."""
        evaluate = _evaluation(training.setting, config.network, test.mesh)
        state = state._replace(opt_state=())
        scores = evaluate(test.batches, state, training.setting.traced.epsilon)
        seen = summary(history, config.steps_per_dispatch)
        return {**seen, "accuracy": scores["accuracy"]}

    ledger = Ledger(path / "metrics.jsonl")
    with Runner(path, ledger, total_steps=total, strategy="devices") as runner:

        def records_of(
            purpose: str, trainings: Sequence[Training], kept: Callable[..., dict[str, Any]]
        ) -> list[dict[str, Any]]:
            return settings.train(
                runner,
                trainings,
                lambda network: programs(network, config, shape),
                data,
                record=lambda t, *end: {**t.setting.as_record(), "seed": t.seed, **kept(t, *end)},
                name=lambda t: f"{purpose}/{t.setting.name} seed={t.seed}",
            )

        found: dict[str, Arms] = {}
        for name, grid in planned.items():
            trials = [Training(n, config.seeds, config.tuning_steps, "tuning") for n in grid]
            arms = choose_arms(records_of("tune", trials, tuning)).items()
            steps = config.other_steps if found else config.num_steps
            trainings = [Training(n, seed, steps, arm) for arm, n in arms for seed in seeds]
            trained = records_of("train", trainings, whole)
            found[name] = {arm: by_seed(trained, arm=arm) for arm in ARMS}
    return found


def make_model(network: Network, spec: str, **options: Any) -> MLP:
    """The module of a network."""
    return MLP(
        spec=spec,
        norm=functools.partial(BatchNorm, epsilon=network.epsilon),
        placement="hidden" if network.batch_norm else "none",
        activation=getattr(jax.nn, network.activation),
        **options,
    )


@per_structure
def programs(_: Network, config: Config, shape: tuple[int, ...]) -> Programs:
    """Those of a network on images of a shape [1, …]; a dispatch observes before it trains."""
    spec, batch_size, every = config.network, config.batch_size, config.steps_per_dispatch

    def optimizer(network: Network) -> optax.GradientTransformation:
        # A momentum of 0 is SGD, bit for bit: one program serves both.
        return optax.sgd(network.learning_rate, momentum=network.momentum)

    def init(key: Array, network: Network) -> Any:
        kernel_init = jax.nn.initializers.normal(network.init_std)
        model = make_model(network, spec, kernel_init=kernel_init)
        return model.init(key, jnp.zeros(shape), train=False)

    def advance(state: TrainState, network: Network, data: Data):
        model = make_model(network, spec)
        step = make_train_step(apply_fn_of(model), optimizer(network))
        seen = observe(model, step, state, data, batch_size)
        state, metrics = run_steps(step, state, data.train, batch_size=batch_size, num_steps=every)
        return state, metrics._replace(observed=seen)

    create = settings.creator(init, optimizer)
    return Programs(create, settings.sweep(advance, steps_per_dispatch=every))


@per_structure
def _evaluation(network: Network, spec: str, mesh: jax.sharding.Mesh):
    def eval_step(batch, state, epsilon):
        model = make_model(network.replace(epsilon=epsilon), spec)
        return make_eval_step(apply_fn_of(model))(state, batch)

    return make_evaluation(eval_step, mesh, compiler_options=compiler_options(0))
