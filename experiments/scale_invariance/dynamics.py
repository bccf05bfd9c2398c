"""The networks of `experiments.scale_invariance`: their loss, and their training runs."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from bn_research.lab.flags import UsageError
from bn_research.layers.linen import BatchNorm
from bn_research.models.cnn import CNN, hidden_layers
from bn_research.probes.angular_updates import angular_update
from bn_research.training.loop import run_steps
from bn_research.training.state import TrainState, create_train_state
from bn_research.training.step import Batch, make_train_step


class Network(NamedTuple):
    """What fixes the compiled program; the kernels of all layers but the head are "hidden"."""

    spec: str
    placement: str  # of BN: "hidden" makes the hidden kernels scale-invariant, "none" does not
    use_bias: bool = False
    epsilon: float = 0.0


class Setting(NamedTuple):
    """What a run is given; all of it traced."""

    rates: Float[Array, "steps"]  # η_t of the hidden kernels
    decay: float  # λ of the hidden kernels; nothing else decays
    momentum: float  # of all
    other_rate: float  # of scale, bias and the head's kernel
    factor: float  # times the hidden kernels' initial values


def setting(
    rates: float | np.ndarray,
    decay: float = 0.0,
    *,
    steps: int,
    momentum: float = 0.0,
    other_rate: float,
    factor: float = 1.0,
) -> Setting:
    """A Setting of Python and NumPy numbers; a rate alone is that of every step."""
    rates = np.broadcast_to(np.asarray(rates, np.float64), (steps,))
    return Setting(np.array(rates), decay, momentum, other_rate, factor)  # type: ignore[arg-type]


class Norms(NamedTuple):
    """What is seen of each hidden kernel at a step, [kernels] each."""

    squared: Array  # ‖w‖² before the step
    squared_after: Array
    gradient_squared: Array  # ‖∇L‖², without decay
    radial: Array  # ⟨w, ∇L⟩


def largest_product(momentum: float) -> float:
    """ηλ up to which momentum and decay do not overshoot, (1 − √γ)² (Li & Arora, 2019)."""
    return (1 - momentum**0.5) ** 2


def exponential_rates(
    rates: Sequence[float] | np.ndarray, decay: float, momentum: float
) -> Float[np.ndarray, "steps"]:
    """Rates at which momentum SGD without decay follows that with decay (Li & Arora, 2019).

    With v ← γv + ∇L + λθ, θ ← θ − η_t·v and v₀ = 0, θ̃_t = P_t·θ_t follows momentum SGD without
    decay at η̃_t = P_t·P_{t+1}·η_t, where P₀ = 1, P_{t+1} = P_t/α_{t+1}, α₁ = 1 − η₀λ and
    α_{t+1} = 1 − η_t·λ + γ·(η_t/η_{t−1})·(1 − 1/α_t).

    Raises:
      ValueError: ηλ > (1 − √γ)² at some step, where α can turn negative.
    """
    rates = np.asarray(rates, np.float64)
    bound = largest_product(momentum)
    if np.max(rates) * decay > bound:
        raise ValueError(
            f"decay={decay:g} at a rate of {np.max(rates):g} is not allowed: their product must be "
            f"at most (1 − √momentum)² = {bound:.3g}"
        )
    p, alpha, found = 1.0, 1 - rates[0] * decay, []
    for t, rate in enumerate(rates):
        if t:
            alpha = 1 - rate * decay + momentum * rate / rates[t - 1] * (1 - 1 / alpha)
        found.append(p * (p / alpha) * rate)
        p /= alpha
    return np.array(found)


def trajectory(
    network: Network, examples: Batch, seed: int, run: Setting, *, batch_size: int
) -> tuple[np.ndarray, Norms]:
    """Losses [steps] and norms [steps, kernels] of a run, in float64.

    Runs with the same network, seed and number of steps see the same initial weights, but for
    the factor, and the same batches.
    """
    with jax.enable_x64(True):
        program = _trajectory_program(network, examples.image.shape, batch_size, len(run.rates))
        examples = Batch(examples.image.astype(np.float64), examples.label)
        metrics = program(jax.random.key(seed), examples, jax.tree.map(jnp.asarray, run))
        if np.any(metrics.diverged):
            raise UsageError(
                f"network {network.spec!r}, BN {network.placement}, diverged at a rate of "
                f"{run.rates[0]:g}, weights times {run.factor:g}: give a smaller learning_rate or "
                "factors nearer to 1"
            )
        return np.asarray(metrics.loss), jax.tree.map(np.asarray, metrics.observed)


@functools.cache
def _trajectory_program(network: Network, shape: tuple[int, ...], batch_size: int, steps: int):
    @jax.jit
    def program(key, examples, run):
        state = create_state(network, shape[1:], key, run, jnp.float64)
        observe = functools.partial(_observe, hidden_layers(network.spec))
        step = make_train_step(apply_fn(network), optimizer(network, run), observe=observe)
        return run_steps(step, state, examples, batch_size=batch_size, num_steps=steps)[1]

    return program


def create_state(
    network: Network, shape: Sequence[int], key: Array, run: Setting, dtype: Any
) -> TrainState:
    """State before the first step, everything of dtype."""
    model = _model(network)

    def init(key):
        variables = model.init(key, jnp.zeros((1, *shape)), train=False)
        variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
        return {**variables, "params": _scaled(network, variables["params"], run.factor)}

    return create_train_state(init, optimizer(network, run), key)


def optimizer(network: Network, run: Setting) -> optax.GradientTransformation:
    """Momentum SGD; rates of their own and L2 decay for the hidden kernels."""

    def labels(params):
        return jax.tree.map(
            lambda hidden: "hidden" if hidden else "other", _is_hidden_kernel(network, params)
        )

    def rate(count):
        return jnp.take(run.rates, count, mode="clip")

    hidden = optax.chain(
        optax.add_decayed_weights(run.decay), optax.sgd(rate, momentum=run.momentum)
    )
    other = optax.sgd(run.other_rate, momentum=run.momentum)
    return optax.partition({"hidden": hidden, "other": other}, labels)


def apply_fn(network: Network):
    """(variables, image, train) -> logits and new batch_stats."""
    model = _model(network)

    def apply(variables, image, *, train):
        logits, new = model.apply(variables, image, train=True, mutable=["batch_stats"])
        return logits, new.get("batch_stats", {})

    return apply


def _model(network: Network) -> CNN:
    return CNN(
        network.spec,
        functools.partial(BatchNorm, epsilon=network.epsilon),
        network.placement,  # type: ignore[arg-type]
        use_bias=network.use_bias,
        kernel_init=nn.initializers.he_normal(),
    )


def _is_hidden_kernel(network: Network, params: Any) -> Any:
    """True for the hidden kernels; a pytree like params."""
    layers = hidden_layers(network.spec)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[0].key in layers and path[-1].key == "kernel", params
    )


def _scaled(network: Network, params: Any, factor: Array | float) -> Any:
    """The params, with all hidden kernels times a factor."""
    return jax.tree.map(
        lambda hidden, leaf: factor * leaf if hidden else leaf,
        _is_hidden_kernel(network, params),
        params,
    )


def losses(
    network: Network, examples: Batch, scales: Sequence[float], seed: int
) -> Float[np.ndarray, "scales"]:
    """Training loss at initialization with all hidden kernels times each scale, float64.

    Biases, if there are any, are random, and not scaled.
    """
    with jax.enable_x64(True):
        image = jnp.asarray(examples.image, jnp.float64)
        run = setting(0.0, steps=1, other_rate=0.0)
        params, batch_stats = create_state(
            network, image.shape[1:], jax.random.key(seed), run, jnp.float64
        )[1:3]
        if network.use_bias:
            rng = np.random.default_rng(seed)
            params = {
                name: {**layer, "bias": 0.1 * rng.standard_normal(layer["bias"].shape)}
                if "kernel" in layer
                else layer
                for name, layer in params.items()
            }

        @jax.jit
        def loss(a):
            variables = {"params": _scaled(network, params, a), "batch_stats": batch_stats}
            logits, _ = apply_fn(network)(variables, image, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, examples.label).mean()

        return np.array([loss(np.float64(a)) for a in scales])


def _observe(layers: Sequence[str], params: Any, grads: Any, new_params: Any) -> Norms:
    rows = []
    for layer in layers:
        w, new, g = (tree[layer]["kernel"] for tree in (params, new_params, grads))
        rows.append((jnp.vdot(w, w), jnp.vdot(new, new), jnp.vdot(g, g), jnp.vdot(w, g)))
    return Norms(*(jnp.stack(column) for column in zip(*rows, strict=True)))


def kernel_paths(network: Network) -> list[str]:
    """Paths of the hidden kernels, first layer to last."""
    return [f"['{layer}']['kernel']" for layer in hidden_layers(network.spec)]


def check_network(network: Network, shape: Sequence[int]) -> None:
    """ValueError unless it has a hidden layer and takes images of this shape."""
    if not hidden_layers(network.spec):
        raise ValueError(f"network {network.spec!r} has no hidden layer: give one before the head")
    jax.eval_shape(
        lambda key: _model(network).init(key, jnp.zeros((1, *shape)), train=False),
        jax.random.key(0),
    )


@functools.cache
def equilibrium_programs(
    network: Network, shape: tuple[int, ...], batch_size: int, steps: int, groups: tuple[str, ...]
):
    """(key, run) -> state before the first step, and (state, examples, run) -> steps later."""

    @jax.jit
    def create(key, run):
        return create_state(network, shape, key, run, jnp.float32)

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(state, examples, run):
        observe = functools.partial(angular_update, groups=groups)
        step = make_train_step(apply_fn(network), optimizer(network, run), observe=observe)
        return run_steps(step, state, examples, batch_size=batch_size, num_steps=steps)

    return create, advance
