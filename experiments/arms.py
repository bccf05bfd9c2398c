"""Arms of a comparison: one network, one optimizer, one setting, trained for each seed.

Everything that changes the program (network, BN placement, optimizer, initializer, biases) is
static; rate, ε and the initialization's width are traced, so that a sweep over them compiles once.
"""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from bn_research import data
from bn_research.layers.linen import MOMENTS, BatchNorm, population_batch_stats
from bn_research.models.cnn import CNN, NormPlacement
from bn_research.models.initializers import kernel_initializer
from bn_research.training.checkpoint import Checkpointer
from bn_research.training.evaluation import make_evaluation, place_batches
from bn_research.training.loop import History, every, run_steps
from bn_research.training.optimizers import create_optimizer
from bn_research.training.preemption import Preemption
from bn_research.training.state import TrainState, create_train_state
from bn_research.training.step import Batch, make_eval_step, make_train_step
from bn_research.training.sweep import Choice, Member, Sweep
from experiments.workdir import Ledger

FIXUP = "fixup"  # He's, with a head of zeros: Zhang et al. (2019) without residual branches
_EVAL_BATCH = 32
_POPULATION_BATCHES = 32
_SECONDS_BETWEEN_CHECKPOINTS = 10.0
_STRATEGY = "strategy of the sweeps"  # in the ledger


class Arm(NamedTuple):
    """A setting; the first five fields are static, the next three traced."""

    network: str
    placement: NormPlacement  # of BN
    optimizer: str = "sgd"
    initializer: str = "uniform"  # of kernels; or FIXUP
    use_bias: bool = False
    learning_rate: float = 0.1
    epsilon: float = 1e-5
    a: float = 1e-3  # half-width of the uniform initializer
    num_steps: int = 100
    stop_below: float = -math.inf  # end once a batch's loss is below this

    @property
    def name(self) -> str:
        """Identifies the arm in the ledger."""
        return " ".join(f"{field}={getattr(self, field)}" for field in self._fields)


class Hyper(NamedTuple):
    """The traced part of an arm."""

    learning_rate: Array
    epsilon: Array
    a: Array


class Images(NamedTuple):
    """A data set, scaled and in memory."""

    train: Batch
    test: Batch
    pixels: np.ndarray  # uint8: the training images as they came
    num_classes: int


def load_images(
    name: str,
    *,
    data_dir: str,
    manual_dir: str,
    scale: str,
    size: int = 0,
    limit: int | None = None,
) -> Images:
    """A data set with float32 images; resized to size × size unless that is 0.

    Args:
      name: of `bn_research.data.DATASETS`.
      data_dir: where tfds keeps prepared sets; "" is its default.
      manual_dir: where source files lie; "" is the set's default.
      scale: see `bn_research.data.scale_images`; "standardized" by the training set.
      size: height and width of the images; 0 keeps theirs.
      limit: use this many examples of each split only.
    """
    builder = data.prepare(name, data_dir=data_dir or None, manual_dir=manual_dir or None)
    splits = [data.load_examples(builder, split, limit=limit) for split in ("train", "test")]
    batches = []
    for split in splits:
        images = data.scale_images(
            split.image, scale, reference=splits[0].image, full_scale=data.FULL_SCALE[name]
        )
        batches.append(Batch(resize(images, size), jnp.asarray(split.label)))
    num_classes = builder.info.features["label"].num_classes
    return Images(batches[0], batches[1], splits[0].image, num_classes)


def resize(images: np.ndarray | Array, size: int) -> Array:
    """Images resized to size × size, bilinear with antialiasing; size 0 keeps them."""
    images = jnp.asarray(images)
    if size in (0, images.shape[1]):
        return images
    shape = (images.shape[0], size, size, images.shape[3])
    return jax.image.resize(images, shape, "linear", antialias=True)


class Trainer:
    """Trains arms on a data set, each once in the life of a workdir.

    Args:
      images: the data set.
      path: the workdir, for its ledger and checkpoints.
      ledger: where finished arms stand.
      batch_size: examples a step.
      steps_per_dispatch: steps of one call into the compiled program.
      total_steps: for the progress bar.
      strategy: of the sweeps; "auto" measures once, prints the choice and keeps it in the ledger.
    """

    def __init__(
        self,
        images: Images,
        path: Path,
        ledger: Ledger,
        *,
        batch_size: int,
        steps_per_dispatch: int,
        total_steps: int,
        strategy: str = "auto",
    ):
        """Opens the checkpoints; raises CheckpointError when all of them are damaged."""
        self._images = images
        self._ledger = ledger
        self._batch_size = batch_size
        self._steps_per_dispatch = steps_per_dispatch
        self._strategy = strategy
        self._test = place_batches(images.test, batch_size=_EVAL_BATCH)
        self._saver = Checkpointer(path / "checkpoints")
        self._saver.newest()
        self._preemption = Preemption()
        self._checkpoint_is_due = every(_SECONDS_BETWEEN_CHECKPOINTS)
        self._last: Callable[[], None] = lambda: None
        self._bar = tqdm(total=total_steps, unit="step", dynamic_ncols=True, smoothing=0.05)

    def __enter__(self) -> "Trainer":
        """Itself, with SIGTERM noted: it saves and ends the run after the next dispatch."""
        self._preemption.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Keeps the last trained state when all went well, and closes the progress bar."""
        try:
            if exception[0] is None:
                self._last()
            self._saver.close()
        finally:
            self._bar.close()
            self._preemption.__exit__(*exception)

    def describe(self, text: str) -> None:
        """Says beside the progress bar what is being done."""
        self._bar.set_description(text)

    def train(self, runs: Sequence[tuple[Arm, int]]) -> list[dict[str, Any]]:
        """Records of arms with their seeds: loss of each step, and accuracy on the whole test set.

        The accuracy is that of inference by population statistics (algorithm 2 of Ioffe &
        Szegedy, 2015) over batches of the training set. Arms that differ in traced fields alone
        are one sweep.
        """
        return self._records("train", runs, self._evaluate)

    def tune(self, runs: Sequence[tuple[Arm, int]]) -> list[dict[str, Any]]:
        """Records of arms trained to choose between settings: losses only, no test set."""
        return self._records("tune", runs, lambda arm, state: {})

    def _records(self, purpose, runs, score):
        arms = {f"{purpose}/{arm.name} seed={seed}": (arm, seed) for arm, seed in runs}
        sweeps: dict[tuple, list[str]] = {}
        for name, (arm, _) in arms.items():
            sweeps.setdefault(arm[:5], []).append(name)
        for names in sweeps.values():
            done = [name for name in names if name in self._ledger]
            self._bar.update(sum(arms[name][0].num_steps for name in done))
            if len(done) < len(names):
                self._sweep({name: arms[name] for name in names}, done, score)
        return [self._ledger.get(f"{purpose}/{arm.name} seed={seed}", dict) for arm, seed in runs]

    def _sweep(self, arms, done, score):
        """Trains the arms of one sweep and writes their records."""
        first = next(iter(arms.values()))[0]
        static = (first.network, first.placement, first.optimizer)
        shape = (1, *self._images.train.image.shape[1:])
        create = _create_program(*static, first.initializer, first.use_bias, shape)
        sweep = _sweep_program(*static, first.use_bias, self._batch_size, self._steps_per_dispatch)
        members = [
            Member(name, seed, _hyper(arm), arm.num_steps) for name, (arm, seed) in arms.items()
        ]
        self._bar.set_description(f"BN {first.placement}, {first.optimizer}, {first.initializer}")
        self._choose(sweep, create, members)
        for member, state, history in sweep.run(
            create,
            members,
            self._images.train,
            done=done,
            saver=self._saver,
            save_when=self._checkpoint_is_due,
            stop_when=lambda member, loss: bool(np.min(loss) < arms[member.name][0].stop_below),
            on_choice=lambda choice: None,
            on_steps=self._bar.update,
            preempted=self._preemption.requested,
        ):
            arm, seed = arms[member.name]
            record = {
                **arm._asdict(),
                "seed": seed,
                "loss": history.loss,
                "diverged": history.diverged,
                **score(arm, state),
            }
            self._ledger.get(member.name, lambda record=record: record)
            self._bar.update(arm.num_steps - len(history.loss))
            self._last = functools.partial(self._save_last, member.name, state, history)

    def _choose(self, sweep, create, members):
        """Sets the strategy of a sweep: that of the first one of this workdir."""
        if self._strategy == "auto":
            if _STRATEGY not in self._ledger:
                choice = sweep.measure(create, members, self._images.train)
                self._bar.write(str(choice))
                self._ledger.get(_STRATEGY, choice._asdict)
            self._strategy = self._ledger.get(_STRATEGY, dict)["strategy"]
        sweep.choice = Choice(self._strategy, {})

    def _save_last(self, name: str, state: TrainState, history: History) -> None:
        newest = self._saver.newest()
        note = {"name": name, "steps": len(history.loss), "diverged": history.diverged}
        saved = {"state": state, "loss": jnp.asarray(history.loss)}
        self._saver.save((newest[0] if newest else 0) + 1, saved, note)

    def _evaluate(self, arm: Arm, state: TrainState) -> dict[str, float]:
        static = (arm.network, arm.placement, arm.use_bias)
        epsilon = _hyper(arm).epsilon
        state = state._replace(opt_state=())  # one program for every optimizer
        if arm.placement != "none":
            moments = _moments_program(*static)
            population = population_batch_stats(
                lambda variables, image: moments(variables, image, epsilon),
                {"params": state.params, "batch_stats": state.batch_stats},
                self._population_batches(),
            )
            state = state._replace(batch_stats=population)
        evaluation = _evaluation_program(*static, self._test.mesh)
        scores = evaluation(self._test.batches, state, epsilon)
        return {"accuracy": scores["accuracy"], "test_loss": scores["loss"]}

    def _population_batches(self) -> list[Array]:
        images = self._images.train.image
        whole = len(images) // self._batch_size * self._batch_size
        used = min(whole, _POPULATION_BATCHES * self._batch_size)
        return list(jnp.split(images[:used], used // self._batch_size))


def _hyper(arm: Arm) -> Hyper:
    return Hyper(*(jnp.float32(getattr(arm, field)) for field in Hyper._fields))


def _model(network, placement, use_bias, epsilon, **options):
    norm = functools.partial(BatchNorm, epsilon=epsilon)
    return CNN(network, norm, placement, use_bias=use_bias, **options)


def _apply_fn(model: CNN):
    def apply_fn(variables, image, *, train):
        if not train:
            return model.apply(variables, image, train=False), variables["batch_stats"]
        logits, new = model.apply(variables, image, train=True, mutable=["batch_stats"])
        return logits, new.get("batch_stats", {})

    return apply_fn


def compiler_options(level: int) -> dict[str, Any]:
    """XLA's optimization level for a program, 0 to 3; a CPU spends seconds compiling each.

    Level 1 gives the training step of the default network the speed of level 3 (within 3 %) for
    30 % less compilation. Level 0 suits what runs once, as drawing the weights: a sixth of it.
    """
    cpu = jax.default_backend() == "cpu"
    return {"xla_backend_optimization_level": level} if cpu else {}


@functools.cache
def _create_program(network, placement, optimizer, initializer, use_bias, shape):
    @functools.partial(jax.jit, compiler_options=compiler_options(0))
    def create(key, hyper):
        fixup = initializer == FIXUP
        model = _model(
            network,
            placement,
            use_bias,
            hyper.epsilon,
            kernel_init=kernel_initializer("he" if fixup else initializer, a=hyper.a),
            head_init=jax.nn.initializers.zeros if fixup else None,
        )
        return create_train_state(
            lambda key: model.init(key, jnp.zeros(shape), train=False),
            create_optimizer(optimizer, hyper.learning_rate),
            key,
        )

    return create


@functools.cache
def _sweep_program(network, placement, optimizer, use_bias, batch_size, num_steps):
    def advance(state, hyper, examples):
        apply_fn = _apply_fn(_model(network, placement, use_bias, hyper.epsilon))
        step = make_train_step(apply_fn, create_optimizer(optimizer, hyper.learning_rate))
        return run_steps(step, state, examples, batch_size=batch_size, num_steps=num_steps)

    return Sweep(advance, steps_per_dispatch=num_steps, compiler_options=compiler_options(1))


@functools.cache
def _moments_program(network, placement, use_bias):
    @functools.partial(jax.jit, compiler_options=compiler_options(1))
    def moments(variables, image, epsilon):
        model = _model(network, placement, use_bias, epsilon)
        mutable = [MOMENTS, "batch_stats"]
        return model.apply(variables, image, train=True, mutable=mutable)[1][MOMENTS]

    return moments


@functools.cache
def _evaluation_program(network, placement, use_bias, mesh):
    def eval_step(batch, state, epsilon):
        model = _model(network, placement, use_bias, epsilon)
        return make_eval_step(_apply_fn(model))(state, batch)

    return make_evaluation(eval_step, mesh, compiler_options=compiler_options(1))
