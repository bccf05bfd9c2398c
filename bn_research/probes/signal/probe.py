"""The probe: one pass forward and one backward, and the Jacobians between layers."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bn_research.claims.figures import Figure
from bn_research.probes.one_device import unbound_axis
from bn_research.probes.perturbation import Forward, Program, trace_layers
from bn_research.probes.signal import linen
from bn_research.probes.signal.figure import draw
from bn_research.probes.signal.jacobian import layer_jacobians
from bn_research.probes.signal.layers import Layers, LayerSignal, SingularValues
from bn_research.probes.signal.nnx import NnxForward
from bn_research.probes.signal.statistics import Statistics, statistics
from bn_research.probes.signal.table import as_table
from bn_research.probes.signal.verdict import in_words

LossFn = Callable[[Any], Float[Array, ""]]

_WAKING = 1e-3  # standard deviation of what takes the place of parameters that are 0


class Signal(Layers):
    """What the probe found out, as numbers, in words, as a table and as a figure."""

    def __repr__(self) -> str:
        return self.table()

    @property
    def verdict(self) -> str:
        """What is wrong and what to do, a line each; or "healthy" and the two growths.

        Then what is no fault but has to be known: branches that start at zero, and kernels that
        were left out.
        """
        return in_words(self)

    def table(self) -> str:
        """All layers, the growths and the verdict, as text for a terminal."""
        return as_table(self)

    def as_dict(self) -> dict[str, Any]:
        """The whole result as JSON can hold it; None for numbers that are not finite."""
        layers = []
        for layer in self.values():
            entry = {name: _plain(value) for name, value in vars(layer).items()}
            entry["shape"] = list(layer.shape)
            if layer.jacobian is not None:
                entry["jacobian"] = {
                    name: _plain(value) for name, value in layer.jacobian._asdict().items()
                }
            layers.append(entry)
        return {
            "layers": layers,
            "loss": _plain(self.loss),
            "output_std": _plain(self.output_std),
            "output_soft_rank": _plain(self.output_soft_rank),
            "forward_growth": _plain(self.forward_growth),
            "backward_growth": _plain(self.backward_growth),
            "verdict": self.verdict,
        }

    def figure(self, path: str | Path) -> Figure:
        """Std, gradient, singular values and soft rank of every layer, as a PNG file."""
        return draw(self, path)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def probe_signal(
    forward: Forward,
    params: Any,
    batch: Any,
    *,
    loss_fn: LossFn | None = None,
    jacobians: bool = True,
    iterations: int = 12,
    key: Array | None = None,
    axis_name: str | None = None,
) -> Signal:
    """Follows the signal through a network, forward and backward.

    forward is only traced, never called with numbers. Layers are found in the traced computation,
    inside jit and checkpoint too, and come in the order in which they are computed. The gradient of
    a layer h_l is that by δ, at δ = 0, of the loss with h_l + δ in the place of h_l; one backward
    pass gives all of them.

    A Jacobian of at most 256 rows or columns (batch × elements of a layer), and of at most 2²⁰
    elements, is decomposed whole. Of a larger one a Golub-Kahan bidiagonalization gives the extreme
    singular values: the largest is accurate after few iterations; the smallest is only an upper
    bound, and a close one where few are close to 0. Its rms is √(‖J‖_F²/min(rows, columns)), with
    ‖J‖_F estimated by 4 random vectors.

    Cost without Jacobians: one training step, or three where a layer or its gradient is 0.
    Jacobians add 2·iterations + 4 passes, each of at most a training step whatever the number of
    layers, and one more for those decomposed whole; two or three programs to compile; and in host
    memory `iterations` vectors of each layer's size. The result is deterministic.

    Args:
      forward: (params, batch) -> (output, intermediates), traceable; intermediates map the name of
        each layer to its pre-activations, floating-point [batch, ..., features].
      params: a pytree of arrays.
      batch: an array or a pytree of arrays, with one example for each entry of the first axis.
        Integers, such as tokens, are allowed.
      loss_fn: output -> scalar. By default Σ output·z / batch size with z standard Gaussian: how a
        gradient grows on its way can be seen without labels.
      jacobians: whether to measure singular values of Jacobians.
      iterations: steps of the bidiagonalization, at least 1.
      key: key of z and of the random vectors; jax.random.key(0) by default.
      axis_name: axis of devices over which forward shares statistics; it is run on one.

    Raises:
      ValueError: a batch that is empty, that holds values that are not finite, or that forward does
        not take; no layer to probe, or one of a shape or dtype that is not allowed; a loss that is
        not a floating-point scalar or not differentiable; iterations below 1. Raised before
        anything is computed.
    """
    examples = _check_batch(batch)
    if iterations < 1:
        raise ValueError(f"iterations={iterations!r} is not allowed: it must be at least 1")
    key = jax.random.key(0) if key is None else key
    try:
        program = trace_layers(forward, params, batch, axis_name=axis_name)
    except (TypeError, ValueError, NameError) as error:
        raise _one_line(error, batch) from error
    loss_of = loss_fn or _random_functional(program.output, key, examples)
    _check_loss(loss_of, program.output)
    measure = program.compiled(functools.partial(_measure, program, loss_of))
    try:
        loss, values, gradients, output = jax.device_get(measure(program.args))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"loss_fn(forward(...)) cannot be differentiated: {_first(error)}") from (
            error
        )
    ranges: Sequence[SingularValues | None] = [None] * len(values)
    if jacobians:
        seed = int(jax.random.randint(key, (), 0, np.iinfo(np.int32).max))
        ranges = layer_jacobians(program, iterations=iterations, seed=seed)
    layers = [
        _layer(name, layer.shape, values[i], gradients.get(i), ranges[i])
        for i, (name, layer) in enumerate(zip(program.names, program.layers, strict=True))
    ]
    layers = _with_branches(layers, program, loss_of, key)
    return Signal(
        layers,
        loss=float(loss),
        output_std=math.nan if output is None else float(output.largest) * float(output.std),
        output_soft_rank=math.nan if output is None else float(output.soft_rank),
        left_out=getattr(forward, "left_out", ()),
    )


def probe_linen(
    model: Any,
    variables: Any,
    batch: Any,
    *,
    loss_fn: LossFn | None = None,
    jacobians: bool = True,
    iterations: int = 12,
    key: Array | None = None,
    axis_name: str | None = None,
    **apply_options: Any,
) -> Signal:
    """`probe_signal` of a Flax linen model, whose layers are found where they are called.

    A layer is what a module returns that owns a kernel and holds no other module that does. A
    kernel is a parameter of that name, or any of two or more axes. A layer is named by the path of
    its module, such as "stage1_block1/conv1". A module that is called again gives another layer,
    "dense#2"; so does each turn of `nn.scan` and `nn.RNN`, which are unrolled. Layers that
    `nn.vmap` stacks are named "heads[0]", "heads[1]". The verdict names the kernels that no layer
    stands for.

    variables are what `model.init` returned; all collections but params may change on the way, and
    the changes are dropped. apply_options go to `model.apply`, such as `train=True` for BN in
    training mode and `rngs={"dropout": key}`. All other arguments are those of `probe_signal`.

    Raises:
      ValueError: as `probe_signal`; variables without params, or without any kernel; a layer that
        cannot be seen, inside a branch or a loop without end; a batch that the parameters do not
        fit, with the shapes of both.
    """
    _check_batch(batch)
    forward = linen.LinenForward(model, variables, apply_options)
    try:
        return probe_signal(
            forward,
            variables,
            batch,
            loss_fn=loss_fn,
            jacobians=jacobians,
            iterations=iterations,
            key=key,
            axis_name=axis_name,
        )
    except linen.ApplyError as error:
        if unbound_axis(error):
            raise _one_line(error, batch) from error
        mismatch = linen.mismatch(model, variables, batch, apply_options)
        if mismatch is None:
            raise _one_line(error, batch) from error
        raise ValueError(f"batch of {_shapes(batch)} does not fit variables: {mismatch}") from error


def probe_nnx(
    model: Any,
    batch: Any,
    *,
    loss_fn: LossFn | None = None,
    jacobians: bool = True,
    iterations: int = 12,
    key: Array | None = None,
    axis_name: str | None = None,
    **call_options: Any,
) -> Signal:
    """`probe_linen` of a Flax nnx model, which stays as it is.

    It is probed in the mode that it is in: `model.train()` is for BN in training mode. call_options
    go to the call of the model. All other arguments are those of `probe_signal`.

    Raises:
      ValueError: as `probe_linen`.
    """
    forward = NnxForward(model, call_options)
    return probe_signal(
        forward,
        forward.state,
        batch,
        loss_fn=loss_fn,
        jacobians=jacobians,
        iterations=iterations,
        key=key,
        axis_name=axis_name,
    )


def linen_layers(
    model: Any, variables: Any, batch: Any, *, axis_name: str | None = None, **apply_options: Any
) -> dict[str, Array]:
    """The pre-activations that `probe_linen` looks at, by the names of the layers.

    Raises:
      ValueError: as `probe_linen`.
    """
    forward = linen.LinenForward(model, variables, apply_options)
    return _values(forward, variables, batch, axis_name)


def nnx_layers(
    model: Any, batch: Any, *, axis_name: str | None = None, **call_options: Any
) -> dict[str, Array]:
    """The pre-activations that `probe_nnx` looks at, by the names of the layers.

    Raises:
      ValueError: as `probe_nnx`.
    """
    forward = NnxForward(model, call_options)
    return _values(forward, forward.state, batch, axis_name)


def _values(forward: Forward, params: Any, batch: Any, axis_name: str | None) -> dict[str, Array]:
    _check_batch(batch)
    try:
        program = trace_layers(forward, params, batch, axis_name=axis_name)
    except (TypeError, ValueError, NameError, linen.ApplyError) as error:
        raise _one_line(error, batch) from error
    layers = program.compiled(lambda args: program.run(args, {})[1])(program.args)
    return dict(zip(program.names, layers, strict=True))


def _measure(
    program: Program, loss_of: LossFn, args: Sequence[Any]
) -> tuple[Array, list[Statistics], dict[int, Statistics], Statistics | None]:
    """Loss, statistics of the layers, of their gradients by number, and of the output."""

    def loss(deltas: Mapping[int, Array]) -> tuple[Array, tuple[Any, list[Array]]]:
        output, layers, _ = program.run(args, deltas)
        return loss_of(output), (output, layers)

    (value, (output, layers)), gradients = jax.value_and_grad(loss, has_aux=True)(_zeros(program))
    leaves = jax.tree.leaves(output)
    one = len(leaves) == 1 and leaves[0].ndim > 1 and leaves[0].size > 0
    one = one and jnp.issubdtype(leaves[0].dtype, jnp.floating)
    return (
        value,
        [statistics(layer) for layer in layers],
        {i: statistics(gradient) for i, gradient in gradients.items()},
        statistics(leaves[0]) if one else None,
    )


def _with_branches(
    layers: Sequence[LayerSignal], program: Program, loss_of: LossFn, key: Array
) -> list[LayerSignal]:
    """The layers, with `bypassed` and `starts_at_zero` where h or its gradient is 0."""
    silent = {i for i, layer in enumerate(layers) if layer.log10_gradient_rms == -math.inf}
    empty = {i for i, layer in enumerate(layers) if layer.log10_rms == -math.inf}
    if not silent | empty:
        return list(layers)
    alive = program.compiled(functools.partial(_alive, program, loss_of))
    args = list(program.args)
    for i in program.param_args:
        w = jnp.asarray(args[i])
        if jnp.issubdtype(w.dtype, jnp.floating) and not jnp.any(w):
            noise = jax.random.normal(jax.random.fold_in(key, i), w.shape, w.dtype)
            args[i] = _WAKING * noise
    (value, gradient, batch), (woken, woken_gradient, _) = jax.device_get(
        [alive(program.args), alive(args)]
    )
    needs = [program.needs(i) for i in range(len(layers))]

    def starts(i: int, zero: set[int], woken: Mapping[int, Any]) -> bool:
        name = layers[i].name.split("#")[0]
        calls = [j for j, layer in enumerate(layers) if layer.name.split("#")[0] == name]
        return i not in zero or bool(woken.get(i)) or any(j not in zero for j in calls)

    # What is 0 itself may have its gradient through the layer in question.
    healthy = [j for j in range(len(layers)) if value[j] and gradient.get(j)]
    found = []
    for i, layer in enumerate(layers):
        bypassed = i in silent | empty and (
            any(i not in needs[j][0] for j in healthy if j != i)
            or any(batch.get(j) for j in needs[i][1])
        )
        starts_at_zero = bypassed and starts(i, silent, woken_gradient) and starts(i, empty, woken)
        found.append(replace(layer, bypassed=bypassed, starts_at_zero=starts_at_zero))
    return found


def _alive(
    program: Program, loss_of: LossFn, args: Sequence[Any]
) -> tuple[dict[int, Array], dict[int, Array], dict[int, Array]]:
    """Which layers, gradients of layers and gradients of the batch's arrays are not 0."""
    zeros = _zeros(program)
    shifts = {
        i: jnp.zeros_like(args[i])
        for i in program.batch_args
        if jnp.issubdtype(jnp.result_type(args[i]), jnp.floating)
    }

    def loss(deltas: Mapping[int, Array], shifts: Mapping[int, Array]) -> tuple[Array, list[Array]]:
        moved = [arg + shifts[i] if i in shifts else arg for i, arg in enumerate(args)]
        output, layers, _ = program.run(moved, deltas)
        return loss_of(output), layers

    gradients, layers = jax.grad(loss, argnums=(0, 1), has_aux=True)(zeros, shifts)
    not_zero = jax.tree.map(jnp.any, (dict(enumerate(layers)), *gradients))
    return not_zero


def _zeros(program: Program) -> dict[int, Array]:
    """δ = 0 for each layer that the output depends on."""
    return {
        i: jnp.zeros(layer.shape, layer.dtype)
        for i, (layer, reaches) in enumerate(
            zip(program.layers, program.reaches_output, strict=True)
        )
        if reaches
    }


def _layer(
    name: str,
    shape: tuple[int, ...],
    found: Statistics,
    gradient: Statistics | None,
    jacobian: SingularValues | None,
) -> LayerSignal:
    # Products in float64: 1e-38 times 1e-5 is not 0 there.
    largest = float(found.largest)
    return LayerSignal(
        name=name,
        shape=tuple(shape),
        log10_rms=float(found.log10_rms),
        mean=largest * float(found.mean),
        std=largest * float(found.std),
        dead_fraction=float(found.non_positive),
        silent_fraction=None if gradient is None else float(gradient.zero),
        conditioning=float(found.conditioning),
        soft_rank=float(found.soft_rank),
        max_rank=min(shape[0], math.prod(shape[1:])),
        gradient_std=None if gradient is None else float(gradient.largest) * float(gradient.std),
        log10_gradient_rms=None if gradient is None else float(gradient.log10_rms),
        jacobian=jacobian,
    )


def _random_functional(output: Any, key: Array, examples: int) -> LossFn:
    shapes = jax.tree.leaves(output)
    if not any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in shapes):
        raise ValueError("forward's output holds no floating-point array: give loss_fn")

    def loss_of(output: Any) -> Array:
        total = jnp.zeros(())
        for number, leaf in enumerate(jax.tree.leaves(output)):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                leaf = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
                z = jax.random.normal(jax.random.fold_in(key, number), leaf.shape, leaf.dtype)
                total += jnp.sum(leaf * z) / examples
        return total

    return loss_of


def _check_batch(batch: Any) -> int:
    """How many examples there are."""
    leaves = jax.tree.leaves(batch)
    shapes = [jnp.shape(leaf) for leaf in leaves]
    if not leaves or any(not shape or 0 in shape for shape in shapes):
        raise ValueError(
            f"batch of {_shapes(batch)} is empty: give at least one example, on the first axis"
        )
    if len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"batch of {_shapes(batch)}: all must have one first axis, the examples")
    for leaf in leaves:
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) and not jnp.all(jnp.isfinite(leaf)):
            wrong = int(jnp.sum(~jnp.isfinite(leaf)))
            raise ValueError(
                f"batch holds {wrong} values that are not finite, NaN or infinity: remove or "
                "replace them"
            )
    return shapes[0][0]


def _check_loss(loss_of: LossFn, output: Any) -> None:
    try:
        found = jax.tree.leaves(jax.eval_shape(loss_of, output))
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss_fn does not take forward's output: {_first(error)}") from error
    shapes = [leaf.shape for leaf in found]
    if shapes != [()] or not jnp.issubdtype(found[0].dtype, jnp.floating):
        what = (
            f"{found[0].dtype} of shape {shapes[0]}" if len(found) == 1 else f"{len(found)} arrays"
        )
        raise ValueError(f"loss_fn returns {what}: it must return one floating-point scalar")


def _shapes(batch: Any) -> str:
    shapes = [str(jnp.shape(leaf)) for leaf in jax.tree.leaves(batch)]
    return f"shape {', '.join(shapes)}" if shapes else "no arrays"


def _first(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _one_line(error: Exception, batch: Any) -> ValueError:
    """An error of the network, about a batch or about itself, in one line."""
    message, axis = _first(error), unbound_axis(error)
    if axis is not None:
        return ValueError(
            f"forward names the axis {axis!r}, which is not bound: give axis_name={axis!r}, and it "
            "runs on one device"
        )
    if isinstance(error, linen.ApplyError) or not message.startswith(("forward", "intermediates")):
        message = f"forward does not take a batch of {_shapes(batch)}: {message}"
    return ValueError(message)
