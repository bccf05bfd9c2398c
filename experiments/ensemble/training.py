"""Training of the networks of `experiments.ensemble`, and what they predict alone and together."""

import functools
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from bn_research.claims import atomic
from bn_research.lab import settings
from bn_research.lab.fields import at_most
from bn_research.lab.images import Images, images_of
from bn_research.lab.runner import Runner
from bn_research.lab.settings import Programs, Setting, Training, per_structure
from bn_research.lab.workdir import Ledger, WorkdirError
from bn_research.layers.linen import MOMENTS, BatchNorm, update_from_batch_moments
from bn_research.models.inception import Inception
from bn_research.normalization.batch_stats import cumulative_momentum
from bn_research.probes.predictions import average, by_size, disagreement, scores
from bn_research.training.compiler import compiler_options
from bn_research.training.cores import use_cpu_cores
from bn_research.training.evaluation import place_batches
from bn_research.training.loop import History, run_steps
from bn_research.training.optimizers import create_optimizer
from bn_research.training.state import TrainState
from bn_research.training.step import Batch, apply_fn_of, make_train_step
from experiments.ensemble import Config

VARIED, SEEDS = "six settings", "one setting"  # the two kinds of ensemble

_MOMENTUM = 0.9  # of SGD, and of running statistics
_EPSILON = 1e-3  # of BN
_EVAL_BATCH = 32


class Network(Setting, traced="gain dropout"):
    """In what networks differ."""

    per_activation: bool  # BN of the last module
    gain: float  # times the initial kernels of convolutions
    dropout: float  # before the head


BASE = Network(per_activation=False, gain=1.0, dropout=0.0)


def six(gain: float) -> tuple[Network, ...]:
    """Six networks, each modified "via some of" the paper's three changes (section 4.2.3).

    The paper does not say which network has which, nor by how much its weights are increased.
    """
    return (
        BASE.replace(gain=gain),
        BASE.replace(dropout=0.05),
        BASE.replace(dropout=0.10),
        BASE.replace(gain=gain, dropout=0.05),
        BASE.replace(per_activation=True),
        BASE.replace(per_activation=True, gain=gain, dropout=0.10),
    )


def plan(config: Config) -> dict[str, list[list[Training]]]:
    """The networks of each ensemble, by kind; ensembles of both kinds share their seeds."""
    return {
        kind: [
            [Training(network, k * 6 + i, config.num_steps) for i, network in enumerate(networks)]
            for k in range(config.seeds)
        ]
        for kind, networks in ((VARIED, six(config.gain)), (SEEDS, (BASE,) * 6))
    }


class Task(NamedTuple):
    """What all networks of a run have in common; static."""

    config: Config
    num_classes: int
    image_shape: tuple[int, ...]


def task_of(config: Config, images: Images) -> Task:
    """The config on these images."""
    return Task(config, images.num_classes, images.train.image.shape[1:])


class Records(NamedTuple):
    """What the run measured."""

    ensembles: dict[str, list[dict[str, Any]]]  # by kind and seed: `Predictor.together`, `members`
    num_classes: int


def prepare(config: Config) -> Images:
    """The images, as many as are used; each core becomes a device, for the sweeps."""
    use_cpu_cores()
    images = images_of(config, scale="standardized")
    for split, name in ((images.train, "train_examples"), (images.test, "eval_examples")):
        at_most(config, len(split.label), f"as {config.dataset} has", name)
    images = images._replace(
        train=jax.tree.map(lambda leaf: leaf[: config.train_examples], images.train),
        test=jax.tree.map(lambda leaf: leaf[: config.eval_examples or None], images.test),
    )
    sample = jax.ShapeDtypeStruct((1, *images.train.image.shape[1:]), jnp.float32)
    # Modules that are unknown, and images too small for them, are refused here.
    model = make_model(task_of(config, images), BASE)
    jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), sample)
    return images


def measure(config: Config, images: Images, path: Path) -> Records:
    """Trains what is not yet in the workdir, and lets each six predict together."""
    ensembles, task = plan(config), task_of(config, images)
    trainings = [t for of_kind in ensembles.values() for ensemble in of_kind for t in ensemble]
    sampled = [ensemble[0] for ensemble in ensembles[SEEDS]]
    records: dict[str, list[dict[str, Any]]] = {kind: [] for kind in ensembles}
    ledger, total = Ledger(path / "metrics.jsonl"), len(trainings) * config.num_steps
    with Runner(path, ledger, total_steps=total, strategy=config.strategy) as runner:
        predictor = Predictor(task, images, path / "predictions")
        found = settings.train(
            runner,
            trainings,
            lambda network: training_programs(network, task),
            images.train,
            record=lambda t, *end: predictor.record(t, *end, sampled=t in sampled),
            describe=lambda t: f"BN per {'activation' if t.setting.per_activation else 'channel'}",
        )
        trained = dict(zip(trainings, found, strict=True))
        for kind, of_kind in ensembles.items():
            for k, ensemble in enumerate(of_kind):
                members, name = [trained[t] for t in ensemble], f"ensemble of {kind} seed={k}"
                together = runner.get(name, predictor.together, members)
                records[kind].append({"members": members, **together})
    return Records(records, images.num_classes)


class Predictor:
    """Asks trained networks for the classes of the test set, and keeps what they predict.

    That is too much for the ledger: it goes into a folder of its own.
    """

    def __init__(self, task: Task, images: Images, folder: Path):
        """Places the test set on the devices."""
        self._task, self._train, self._folder = task, images.train, folder
        self._draws = sorted(task.config.draws)  # algorithm 2 takes the most
        self._label = np.asarray(images.test.label)
        self._test = place_batches(images.test, batch_size=_EVAL_BATCH)

    def record(
        self, training: Training, state: TrainState, history: History, *, sampled: bool
    ) -> dict[str, Any]:
        """What the ledger keeps of a network; sampled ones predict by MC-BN, too."""
        network = training.setting
        population, of_batches = statistics_program(network, self._task)(
            state.params, state.batch_stats, self.batches(training.seed)
        )
        predicted = self.predict(network, state.params, population)
        every = self._task.config.steps_per_dispatch
        choice = training_programs(network, self._task).sweep.choice
        assert choice is not None  # it was made before the first dispatch
        return {
            **network.as_record(),
            "seed": training.seed,
            "strategy": choice.strategy,
            "loss": history.loss.reshape(-1, every).mean(axis=1),
            "diverged": history.diverged,
            "scores": scores(average([predicted]), self._label),
            "predictions": self._keep(predicted),
            **({"mc_bn": self.sample(network, state.params, of_batches)} if sampled else {}),
        }

    def batches(self, seed: int) -> Array:
        """Training images of an epoch's first batches, [batches, examples, …]; its order is new."""
        size, count = self._task.config.batch_size, self._draws[-1]
        rows = np.random.default_rng(seed).permutation(len(self._train.label))[: count * size]
        return self._train.image[rows].reshape(count, size, *self._task.image_shape)

    def predict(self, network: Network, params: Any, batch_stats: Any) -> np.ndarray:
        """Logarithms of class probabilities of the test set, [examples, classes]."""
        program = prediction_program(network, self._task, self._test.mesh)
        whole = NamedSharding(self._test.mesh, PartitionSpec())
        placed = jax.device_put((params, batch_stats), whole)
        found = np.asarray(program(*placed, self._test.batches.image))
        found = found.reshape(-1, found.shape[-1])[: len(self._label)]
        # A network that was lost predicts nothing: all classes alike, which counts as an error.
        sound = np.all(np.isfinite(found), axis=1, keepdims=True)
        return np.where(sound, found, -np.log(np.float32(found.shape[-1])))

    def sample(self, network: Network, params: Any, of_batches: Any) -> dict[str, Any]:
        """Scores by number of draws: the mean over draws of probabilities by a batch's statistics.

        A draw serves the whole test set; each draw is another batch.
        """
        of_batches = jax.device_get(of_batches)  # slicing it compiles nothing then
        predicted = [
            self.predict(network, params, jax.tree.map(lambda leaf, i=i: leaf[i], of_batches))
            for i in range(self._draws[-1])
        ]
        return {str(n): scores(average(predicted[:n]), self._label) for n in self._draws}

    def _keep(self, predicted: np.ndarray) -> str:
        """Writes predictions, before the ledger tells of them; their name is their digest."""
        buffer = io.BytesIO()
        np.save(buffer, predicted, allow_pickle=False)
        name = f"{hashlib.sha256(buffer.getvalue()).hexdigest()}.npy"
        atomic.write_bytes(self._folder / name, buffer.getvalue())
        return name

    def together(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What an ensemble of these networks measures; needs their predictions."""
        predicted = [load_predictions(self._folder, record) for record in records]
        return {
            "scores": scores(average(predicted), self._label),
            "sizes": by_size(predicted, self._label),
            "disagreement": disagreement(predicted),
        }


def load_predictions(folder: Path, record: Mapping[str, Any]) -> np.ndarray:
    """Logarithms of class probabilities of a network; WorkdirError unless they are as written."""
    path = folder / record["predictions"]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WorkdirError(
            f"predictions of the network {record['name']!r} cannot be read ({error}): give another "
            "--workdir"
        ) from error
    if hashlib.sha256(content).hexdigest() != path.stem:
        words = "is damaged: it is not what was predicted; give another --workdir"
        raise WorkdirError(f"{path} {words}")
    return np.load(io.BytesIO(content), allow_pickle=False)


def make_model(task: Task, network: Network, dropout: Any = 0.0) -> Inception:
    """Inception with BN as the network has it; dropout may be traced."""
    norm = functools.partial(BatchNorm, momentum=_MOMENTUM, epsilon=_EPSILON)
    return Inception(
        task.num_classes,
        norm,
        width=task.config.width,
        dropout=dropout,
        modules=task.config.modules,
        stem="small",
        implementation="auto",
        # Of images, not of channels: one mean for each pixel of each channel.
        last_norm=functools.partial(norm, axis=(1, 2, 3)) if network.per_activation else None,
    )


def scale_convolutions(params: Any, gain: Array | float) -> Any:
    """Params with the kernels of all convolutions times gain; those of the head stay."""

    def scaled(path, leaf):
        return leaf * gain if [key.key for key in path[-2:]] == ["conv", "kernel"] else leaf

    return jax.tree_util.tree_map_with_path(scaled, params)


@per_structure
def training_programs(network: Network, task: Task) -> Programs:
    """The training of all networks with BN of one kind."""
    config, every = task.config, task.config.steps_per_dispatch

    def optimizer(_: Network) -> optax.GradientTransformation:
        rate = optax.cosine_decay_schedule(config.rate, config.num_steps)
        return create_optimizer("momentum", rate, momentum=_MOMENTUM, weight_decay=config.l2)

    def init(key: Array, network: Network) -> Any:
        image = jnp.zeros((1, *task.image_shape))
        variables = make_model(task, network).init(key, image, train=False)
        return {**variables, "params": scale_convolutions(variables["params"], network.gain)}

    def advance(state: TrainState, network: Network, examples: Batch):
        apply = apply_fn_of(make_model(task, network, network.dropout))
        step = make_train_step(apply, optimizer(network), stochastic=True)
        return run_steps(step, state, examples, batch_size=config.batch_size, num_steps=every)

    level = config.compiler_level
    sweep = settings.sweep(advance, steps_per_dispatch=every, compiler_level=level)
    return Programs(settings.creator(init, optimizer), sweep)


@per_structure
def statistics_program(network: Network, task: Task):
    """(params, batch_stats, batches) -> statistics of the population, and those of each batch.

    The first are those of algorithm 2, means over the batches of mean and unbiased variance, with
    every layer normalizing by the batch; the second are what the batch is normalized by, with a
    first axis of batches. batch_stats gives the shapes alone.
    """
    model = make_model(task, network)

    @functools.partial(jax.jit, compiler_options=compiler_options(task.config.compiler_level))
    def statistics(params, batch_stats, batches):
        def see(population, numbered):
            number, image = numbered
            variables = {"params": params, "batch_stats": batch_stats}
            moments = model.apply(variables, image, train=True, mutable=[MOMENTS])[1][MOMENTS]
            population = update_from_batch_moments(
                population, moments, momentum=cumulative_momentum(number), unbiased=True
            )
            return population, update_from_batch_moments(batch_stats, moments, momentum=0.0)

        return jax.lax.scan(see, batch_stats, (jnp.arange(len(batches)), batches))

    return statistics


@per_structure
def prediction_program(network: Network, task: Task, mesh: Mesh):
    """(params, batch_stats, images) -> logarithms of class probabilities, [batches, examples, …].

    The batches are shared out over the devices.
    """
    model = make_model(task, network)
    (axis,) = mesh.axis_names
    cut, whole = PartitionSpec(axis), PartitionSpec()

    def predict(params, batch_stats, images):
        apply = functools.partial(model.apply, {"params": params, "batch_stats": batch_stats})
        return jax.lax.map(lambda image: jax.nn.log_softmax(apply(image, train=False)), images)

    mapped = jax.shard_map(
        predict, mesh=mesh, in_specs=(whole, whole, cut), out_specs=cut, check_vma=False
    )
    return jax.jit(mapped, compiler_options=compiler_options(task.config.compiler_level))
