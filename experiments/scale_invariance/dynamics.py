"""The networks of `experiments.scale_invariance`: their loss, and their training runs."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from bn_research.lab.flags import UsageError
from bn_research.lab.settings import Programs, Setting, creator, per_structure, sweep
from bn_research.layers.linen import BatchNorm
from bn_research.models.cnn import CNN, NormPlacement, hidden_layers
from bn_research.probes.angular_updates import angular_update
from bn_research.training.loop import run_steps
from bn_research.training.state import TrainState, create_train_state
from bn_research.training.step import Batch, apply_fn_of, make_train_step


class Run(Setting, traced="rates other_rate decay momentum factor"):
    """A network and how it is trained; the kernels of all layers but the head are "hidden"."""

    spec: str
    placement: NormPlacement  # of BN: "hidden" makes the hidden kernels scale-invariant
    use_bias: bool = False
    epsilon: float = 0.0
    rates: Any = 0.0  # η_t of the hidden kernels, shape=(steps,); the last holds from there on
    other_rate: float = 0.0  # of scale, bias and the head's kernel
    decay: float = 0.0  # λ of the hidden kernels; nothing else decays
    momentum: float = 0.0  # of all
    factor: float = 1.0  # times the hidden kernels' initial values


class Norms(NamedTuple):
    """What is seen of each hidden kernel at a step, [kernels] each."""

    squared: Array  # ‖w‖² before the step
    squared_after: Array
    gradient_squared: Array  # ‖∇L‖², without decay
    radial: Array  # ⟨w, ∇L⟩


def trajectory(run: Run, examples: Batch, seed: int, batch_size: int) -> tuple[np.ndarray, Norms]:
    """Losses [steps] and norms [steps, kernels] of a run, in float64.

    Runs with the same network, seed and number of steps see the same initial weights, but for
    the factor, and the same batches.
    """
    with jax.enable_x64(True):
        program = _trajectory_program(run, examples.image.shape[1:], batch_size, len(run.rates))
        examples = Batch(examples.image.astype(np.float64), examples.label)
        metrics = program(jax.random.key(seed), examples, jax.tree.map(jnp.asarray, run))
        if np.any(metrics.diverged):
            raise UsageError(
                f"network {run.spec!r}, BN {run.placement}, diverged at a rate of "
                f"{run.rates[0]:g}, weights times {run.factor:g}: give a smaller learning_rate or "
                "factors nearer to 1"
            )
        return np.asarray(metrics.loss), jax.tree.map(np.asarray, metrics.observed)


@per_structure
def _trajectory_program(run: Run, shape: tuple[int, ...], batch_size: int, steps: int):
    observe = functools.partial(_observe, hidden_layers(run.spec))

    @jax.jit
    def program(key, examples, run):
        init = functools.partial(_variables, run, shape, jnp.float64)
        state = create_train_state(init, _optimizer(run), key)
        step = make_train_step(apply_fn_of(_model(run)), _optimizer(run), observe=observe)
        return run_steps(step, state, examples, batch_size=batch_size, num_steps=steps)[1]

    return program


def _observe(layers: Sequence[str], params: Any, grads: Any, new_params: Any) -> Norms:
    rows = []
    for layer in layers:
        w, new, g = (tree[layer]["kernel"] for tree in (params, new_params, grads))
        rows.append((jnp.vdot(w, w), jnp.vdot(new, new), jnp.vdot(g, g), jnp.vdot(w, g)))
    return Norms(*map(jnp.stack, zip(*rows, strict=True)))


@per_structure
def equilibrium_programs(run: Run, shape: tuple[int, ...], batch_size: int, steps: int) -> Programs:
    """Training in float32; of each step the angles of the hidden kernels are observed."""
    observe = functools.partial(angular_update, groups=kernel_paths(run.spec))

    def init(key: Array, run: Run) -> Any:
        return _variables(run, shape, jnp.float32, key)

    def advance(state: TrainState, run: Run, examples: Batch):
        step = make_train_step(apply_fn_of(_model(run)), _optimizer(run), observe=observe)
        return run_steps(step, state, examples, batch_size=batch_size, num_steps=steps)

    level = 3  # XLA's own: the published records are of that, to the bit
    program = sweep(advance, steps_per_dispatch=steps, compiler_level=level)
    return Programs(creator(init, _optimizer, compiler_level=level), program)


def kernel_paths(spec: str) -> list[str]:
    """Paths of the hidden kernels, first layer to last."""
    return [f"['{layer}']['kernel']" for layer in hidden_layers(spec)]


def losses(run: Run, examples: Batch, scales: Sequence[float], seed: int) -> np.ndarray:
    """Training loss at initialization with all hidden kernels times each scale, float64.

    Biases, if there are any, are random, and not scaled.
    """
    with jax.enable_x64(True):
        image = jnp.asarray(examples.image, jnp.float64)
        init = functools.partial(_variables, run, image.shape[1:], jnp.float64)
        state = create_train_state(init, _optimizer(run), jax.random.key(seed))
        params, rng = state.params, np.random.default_rng(seed)
        for layer in params.values():
            if {"kernel", "bias"} <= layer.keys():
                layer["bias"] = 0.1 * rng.standard_normal(layer["bias"].shape)

        @jax.jit
        def loss(a):
            variables = {"params": _scaled(run, params, a), "batch_stats": state.batch_stats}
            logits, _ = apply_fn_of(_model(run))(variables, image, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, examples.label).mean()

        return np.array([loss(np.float64(a)) for a in scales])


def _variables(run: Run, shape: Sequence[int], dtype: Any, key: Array) -> dict[str, Any]:
    """Variables before the first step, everything of dtype."""
    variables = _model(run).init(key, jnp.zeros((1, *shape)), train=False)
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    return {**variables, "params": _scaled(run, variables["params"], run.factor)}


def _optimizer(run: Run) -> optax.GradientTransformation:
    """Momentum SGD; rates of their own and L2 decay for the hidden kernels."""
    sgd = functools.partial(optax.sgd, momentum=run.momentum)
    rate = functools.partial(jnp.take, run.rates, mode="clip")  # of a step
    hidden = optax.chain(optax.add_decayed_weights(run.decay), sgd(rate))
    kinds = {"hidden": hidden, "other": sgd(run.other_rate)}
    return optax.partition(kinds, functools.partial(_labels, run))


def _model(run: Run) -> CNN:
    return CNN(
        run.spec,
        functools.partial(BatchNorm, epsilon=run.epsilon),
        run.placement,
        use_bias=run.use_bias,
        kernel_init=nn.initializers.he_normal(),
    )


def _labels(run: Run, params: Any) -> Any:
    """Which parameters are hidden kernels; a pytree like params."""
    paths = kernel_paths(run.spec)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "hidden" if jax.tree_util.keystr(path) in paths else "other", params
    )


def _scaled(run: Run, params: Any, factor: Array | float) -> Any:
    """The params, with all hidden kernels times a factor."""

    def scaled(label: str, leaf: Any) -> Any:
        return factor * leaf if label == "hidden" else leaf

    return jax.tree.map(scaled, _labels(run, params), params)
