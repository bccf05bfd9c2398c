"""Training of the networks of `experiments.training_steps`, and how long a step of each takes."""

import collections
import functools
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bn_research.claims.judging import choose, final
from bn_research.lab import Ledger
from bn_research.lab.fields import at_most
from bn_research.lab.images import Images, images_of
from bn_research.lab.runner import Runner
from bn_research.lab.settings import Programs, Training, creator, per_structure, sweep, train
from bn_research.training.cores import use_cpu_cores
from bn_research.training.distortion import distort, draw_factors
from bn_research.training.lanes import CreateFn
from bn_research.training.loop import History, epoch_order_of_groups, run_steps
from bn_research.training.state import TrainState
from bn_research.training.step import Batch, apply_fn_of, make_eval_step, make_train_step
from bn_research.training.sweep import Member, Sweep
from experiments.training_steps import Config, networks
from experiments.training_steps.networks import BASELINE, PLAIN, X5, Network, Task
from experiments.training_steps.verdicts import Records

_EVAL_BATCH = 125


def prepare(config: Config) -> Images:
    """The images, which the networks can take; each core becomes a device, for the sweeps."""
    use_cpu_cores()
    images = images_of(config, scale="unit")
    for split, name in ((images.train, "train_examples"), (images.test, "eval_examples")):
        at_most(config, len(split.label), f"all of {config.dataset}", name)
    images = images._replace(
        train=jax.tree.map(lambda leaf: leaf[: config.train_examples], images.train)
    )
    task = task_of(config, images)
    model = networks.make_model(networks.ladder(config)[PLAIN], task)
    sample = jax.ShapeDtypeStruct((1, *task.image_shape), jnp.float32)
    # Modules that are unknown, and images too small for them, are refused here.
    jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), sample)
    return images


def task_of(config: Config, images: Images) -> Task:
    """The task that a config sets with these images."""
    return Task(config, images.num_classes, images.train.image.shape[1:])


def measure(config: Config, images: Images, path: Path) -> Records:
    """Every network trained with every seed, the tuned ones at rates that are chosen first."""
    arms, task = networks.plan(config), task_of(config, images)
    data = place(images, config.eval_examples)
    total = 2 * len(config.learning_rates) + (len(arms) + 2) * config.seeds
    total_steps, ledger = total * config.num_steps, Ledger(path / "metrics.jsonl")
    with Runner(path, ledger, total_steps=total_steps, strategy="devices") as runner:
        timed = {name: arms[name] for name in (PLAIN, BASELINE, X5)}
        seconds = runner.get("seconds per step", time_steps, timed, task, data)

        def records_of(runs: Sequence[tuple[str, Network, int]]) -> list[dict[str, Any]]:
            return train(
                runner,
                [Training(network, seed, config.num_steps, arm) for arm, network, seed in runs],
                lambda network: programs(network, task),
                data,
                record=functools.partial(record, config),
            )

        for name, given in ((networks.TUNED, PLAIN), (networks.TUNED_BN, BASELINE)):
            grid = [arms[given].replace(rate=rate) for rate in config.learning_rates]
            trials = records_of([("tuning", network, networks.TUNING_SEED) for network in grid])
            arms[name] = arms[given].replace(rate=choose_rate(trials))
        seeds = range(config.seeds)
        trained = records_of([(n, network, s) for n, network in arms.items() for s in seeds])
    by_arm = {name: [r for r in trained if r["arm"] == name] for name in arms}
    return Records(by_arm, seconds, images.num_classes)


def record(
    config: Config, training: Training, state: TrainState, history: History
) -> dict[str, Any]:
    """What the ledger keeps of a training."""
    every = config.steps_per_dispatch
    return {
        **training.setting.as_record(),
        "seed": training.seed,
        "steps": [every * (i + 1) for i in range(len(history.observed))],  # at which tested
        "accuracy": history.observed,  # then, by running statistics
        "loss": history.loss.reshape(-1, every).mean(axis=1),  # since the last time
        "diverged": history.diverged,  # steps that were not finite and not taken
    }


def choose_rate(trials: Sequence[Mapping[str, Any]]) -> float:
    """The rate of the lowest training loss at the end; where all runs were lost, the lowest."""
    by_rate = sorted(trials, key=lambda trial: trial["rate"])
    return choose(by_rate, lambda trial: final(trial["loss"]))["rate"]


class Data(NamedTuple):
    """Images from 0 to 1, and the two numbers that standardize them."""

    train: Batch
    test: Batch  # leaves [batches, examples, ...]
    mean: Array  # shape=(): of all pixels of the training set
    std: Array  # shape=(): likewise


def place(images: Images, eval_examples: int) -> Data:
    """The data as the programs take them, with the first eval_examples of the test set."""
    pixels = np.asarray(images.train.image, np.float64)
    # The largest divisor: no example is padded or left.
    size = max(size for size in range(1, _EVAL_BATCH + 1) if eval_examples % size == 0)

    def cut(leaf: Any) -> Array:
        return jnp.reshape(leaf[:eval_examples], (-1, size, *leaf.shape[1:]))

    return Data(
        images.train,
        Batch(cut(images.test.image), cut(images.test.label)),
        np.float32(pixels.mean()),  # type: ignore[arg-type]
        np.float32(pixels.std()),  # type: ignore[arg-type]
    )


def apply_fn(network: Network, task: Task, data: Data):
    """What the steps apply: distortion (in training), standardization, the network."""
    apply_model = apply_fn_of(networks.make_model(network, task))

    def apply(variables: Any, image: Array, *, train: bool, keys: Any = None):
        options = {}
        if train:
            distortion_keys, options["keys"] = (
                jax.vmap(jax.random.fold_in, (0, None))(keys, purpose) for purpose in (0, 1)
            )
            image = distort(image, draw_factors(distortion_keys, strength=network.distortion))
        return apply_model(variables, (image - data.mean) / data.std, train=train, **options)

    return apply


def programs(network: Network, task: Task) -> Programs:
    """Those of a network, whose start is that of all networks with its parameters."""
    bare = dict(activation="relu", dropout=0.0, local_response_norm=False)
    create = _creator(network.replace(**bare), task)
    return Programs(lambda key, net: create(key, net.replace(**bare)), _sweep(network, task))


@per_structure
def _creator(_: Network, task: Task) -> CreateFn:
    def init(key: Array, network: Network) -> Any:
        image = jnp.zeros((1, *task.image_shape))
        return networks.make_model(network, task).init(key, image, train=False)

    return creator(init, networks.optimizer)


@per_structure
def _sweep(_: Network, task: Task) -> Sweep:
    batch_size, every = task.config.batch_size, task.config.steps_per_dispatch

    def advance(state: TrainState, network: Network, data: Data):
        """A dispatch, and the test accuracy after it."""
        apply = apply_fn(network, task, data)
        step = make_train_step(apply, networks.optimizer(network), stochastic=True)
        order = functools.partial(
            epoch_order_of_groups, group_size=batch_size, regrouped=network.shuffled
        )
        sizes: dict[str, Any] = dict(batch_size=batch_size, num_steps=every)
        state, metrics = run_steps(step, state, data.train, **sizes, order_of_epoch=order)
        sums = jax.lax.map(lambda batch: make_eval_step(apply)(state, batch), data.test)
        return state, metrics._replace(observed=jnp.sum(sums.correct) / jnp.sum(sums.count))

    level = task.config.compiler_level
    return sweep(advance, steps_per_dispatch=every, devices=_devices(task), compiler_level=level)


def _devices(task: Task) -> list[jax.Device]:
    # Each arm has so many members or more: one program for all its sweeps.
    return jax.local_devices()[: task.config.seeds]


def time_steps(timed: Mapping[str, Network], task: Task, data: Data) -> dict[str, float]:
    """Seconds per training step, its share of the evaluations included, by name.

    Measured as the run spends them, with every device at work on its own member. The programs take
    turns, and the median of the rounds counts.
    """
    every = task.config.steps_per_dispatch
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(1 + task.config.timing_rounds):
        for name, network in timed.items():
            # One dispatch to load the lanes, and in the first round to compile, and one timed.
            seeds = range(len(_devices(task)))
            members = [Member(f"{name} {s}", s, network.traced, 2 * every) for s in seeds]
            create, program = programs(network, task)
            clock: list[float] = []
            hooks: dict[str, Any] = dict(
                on_choice=lambda choice: None,
                on_steps=lambda steps, clock=clock: clock.append(time.perf_counter()),
            )
            collections.deque(program.run(create, members, data, **hooks), maxlen=0)
            # Told of each member: of its start, and after each dispatch.
            times[name].append((clock[-1] - clock[2 * len(members) - 1]) / every)
    return {name: statistics.median(values[1:]) for name, values in times.items()}
