"""Training of the networks of `experiments.training_steps`, and how long a step of each takes."""

import collections
import functools
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bn_research.lab.compiler import compiler_options
from bn_research.lab.images import Images
from bn_research.lab.runner import Runner
from bn_research.training.distortion import distort, draw_factors
from bn_research.training.loop import epoch_order_of_groups, run_steps
from bn_research.training.state import TrainState, create_train_state
from bn_research.training.step import Batch, make_eval_step, make_train_step
from bn_research.training.sweep import Member, Sweep
from experiments.training_steps.arms import Hyper, Network, Setting, hyper, make_model, optimizer

_EVAL_BATCH = 125


class Data(NamedTuple):
    """Images from 0 to 1, and the two numbers that standardize them."""

    train: Batch
    test: Batch  # leaves [batches, examples, ...]
    mean: Array  # shape=(): of all pixels of the training set
    std: Array  # shape=(): likewise


def place(images: Images, eval_examples: int) -> Data:
    """The data as the programs take them, with the first eval_examples of the test set."""
    pixels = np.asarray(images.train.image, np.float64)

    size = _eval_batch(eval_examples)

    def cut(leaf: Any) -> Array:
        return jnp.reshape(leaf[:eval_examples], (-1, size, *leaf.shape[1:]))

    return Data(
        images.train,
        Batch(cut(images.test.image), cut(images.test.label)),
        np.float32(pixels.mean()),  # type: ignore[arg-type]
        np.float32(pixels.std()),  # type: ignore[arg-type]
    )


def _eval_batch(count: int) -> int:
    """The largest divisor of count that is at most _EVAL_BATCH: no example is padded or left."""
    return max(size for size in range(1, _EVAL_BATCH + 1) if count % size == 0)


def apply_fn(network: Network, static: tuple[Any, ...], hyper: Hyper, data: Data):
    """What the steps apply: distortion (in training), standardization, the network."""
    model = make_model(network, static)

    def apply(variables, image, *, train, keys=None):
        if not train:
            logits = model.apply(variables, (image - data.mean) / data.std, train=False)
            return logits, variables["batch_stats"]
        distortion_keys, dropout_keys = (
            jax.vmap(jax.random.fold_in, (0, None))(keys, purpose) for purpose in (0, 1)
        )
        factors = draw_factors(distortion_keys, strength=hyper.distortion)
        image = (distort(image, factors) - data.mean) / data.std
        logits, new = model.apply(
            variables, image, train=True, keys=dropout_keys, mutable=["batch_stats"]
        )
        return logits, new.get("batch_stats", {})

    return apply


def create_program(network: Network, setting: Setting):
    """(key, hyper) -> state before the first step: the same whatever has no parameters."""
    plain = setting._replace(activation="relu", dropout=0.0, local_response_norm=False)
    return _create_program(network, plain.static)


@functools.cache
def _create_program(network: Network, static: tuple[Any, ...]):
    @functools.partial(jax.jit, compiler_options=compiler_options(0))
    def create(key, hyper):
        model, image = make_model(network, static), jnp.zeros((1, *network.image_shape))
        return create_train_state(
            lambda key: model.init(key, image, train=False), optimizer(hyper), key
        )

    return create


def advance_fn(network: Network, static: tuple[Any, ...]):
    """(state, hyper, data) -> state after a dispatch, and metrics that hold the test accuracy."""

    def advance(state: TrainState, hyper: Hyper, data: Data):
        apply = apply_fn(network, static, hyper, data)
        step = make_train_step(apply, optimizer(hyper), stochastic=True)
        state, metrics = run_steps(
            step,
            state,
            data.train,
            batch_size=network.batch_size,
            num_steps=network.steps_per_dispatch,
            order_of_epoch=functools.partial(
                epoch_order_of_groups, group_size=network.batch_size, regrouped=hyper.shuffled
            ),
        )
        sums = jax.lax.map(lambda batch: make_eval_step(apply)(state, batch), data.test)
        return state, metrics._replace(observed=jnp.sum(sums.correct) / jnp.sum(sums.count))

    return advance


def _devices(network: Network) -> list[jax.Device]:
    return jax.local_devices()[: network.lanes]


@functools.cache
def _sweep(network: Network, static: tuple[Any, ...]) -> Sweep:
    # Fixed, so that it need not be measured: its numbers are those of single runs everywhere.
    return Sweep(
        advance_fn(network, static),
        steps_per_dispatch=network.steps_per_dispatch,
        strategy="devices",
        devices=_devices(network),
        compiler_options=compiler_options(network.compiler_level),
    )


class Run(NamedTuple):
    """One training."""

    arm: str
    setting: Setting
    seed: int

    @property
    def name(self) -> str:
        """Identifies it in the ledger: what it is, not what it is for."""
        fields = " ".join(f"{field}={value}" for field, value in self.setting._asdict().items())
        return f"{fields} seed={self.seed}"


class Trainer(NamedTuple):
    """What the trainings of a run share."""

    runner: Runner
    network: Network
    data: Data
    num_steps: int

    def train(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """Records of the runs, in their order.

        Each holds the steps after which the test set was seen, its accuracy then by running
        statistics, the mean training loss since the last time, and the number of steps that were
        not finite and so not taken. Runs of equal settings and seed are one training.
        """
        sweeps: dict[tuple, dict[str, Run]] = {}
        for run in runs:
            sweeps.setdefault(run.setting.static, {}).setdefault(run.name, run)
        records: dict[str, dict[str, Any]] = {}
        for static, group in sweeps.items():
            first = next(iter(group.values()))
            self.runner.describe(first.arm)
            found = self.runner.train(
                create_program(self.network, first.setting),
                _sweep(self.network, static),
                [Member(r.name, r.seed, hyper(r.setting), self.num_steps) for r in group.values()],
                self.data,
                record=functools.partial(self._record, group),
            )
            records.update(zip(group, found, strict=True))
        return [{**records[run.name], "arm": run.arm} for run in runs]

    def _record(self, group: Mapping[str, Run], member, state, history) -> dict[str, Any]:
        every, run = self.network.steps_per_dispatch, group[member.name]
        return {
            **run.setting._asdict(),
            "seed": run.seed,
            "steps": [every * (i + 1) for i in range(len(history.observed))],
            "accuracy": history.observed,
            "loss": history.loss.reshape(-1, every).mean(axis=1),
            "diverged": history.diverged,
        }

    def time_steps(self, settings: Mapping[str, Setting], rounds: int) -> dict[str, float]:
        """Seconds per training step, its share of the evaluations included, by name.

        Measured as the run spends them, with every device at work on its own member. The programs
        take turns, and the median of the rounds counts.
        """
        every = self.network.steps_per_dispatch
        times: dict[str, list[float]] = {name: [] for name in settings}
        for _ in range(1 + rounds):
            for name, setting in settings.items():
                # One dispatch to load the lanes, and in the first round to compile, and one timed.
                members = [
                    Member(f"{name} {seed}", seed, hyper(setting), 2 * every)
                    for seed in range(len(_devices(self.network)))
                ]
                clock: list[float] = []
                create = create_program(self.network, setting)
                trained = _sweep(self.network, setting.static).run(
                    create,
                    members,
                    self.data,
                    on_choice=lambda choice: None,
                    on_steps=functools.partial(_note_time, clock),
                )
                collections.deque(trained, maxlen=0)
                # Told of each member: of its start, and after each dispatch.
                first, second = clock[2 * len(members) - 1], clock[-1]
                times[name].append((second - first) / every)
        return {name: statistics.median(values[1:]) for name, values in times.items()}


def _note_time(clock: list[float], steps: int) -> None:
    clock.append(time.perf_counter())


def choose_rate(records: Sequence[Mapping[str, Any]]) -> float:
    """The rate whose run has the lowest training loss at the end; of runs lost, the lowest rate.

    Args:
      records: of one network, one for each rate.
    """
    sound = [r for r in records if not r["diverged"] and None not in r["loss"]]
    if not sound:
        return min(record["rate"] for record in records)
    return min(sound, key=lambda record: final(record["loss"]))["rate"]


def final(values: Sequence[float]) -> float:
    """Mean over the last tenth."""
    return float(np.mean(values[-max(1, len(values) // 10) :]))
