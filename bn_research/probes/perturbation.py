"""Perturbing what a function computes on its way: the layers of a network that was never told.

A function that returns its intermediates h₁ … h_L says nothing of how its output depends on them.
Its jaxpr does: the function is traced, calls of jitted and checkpointed functions are replaced by
what they compute, and the equations are evaluated one by one with h_l + δ_l in the place of h_l.
Derivatives by δ_l at 0 are those by the layer: the gradients of all layers by one backward pass,
and the Jacobian from one layer to the next by the equations between the two alone.

Functions with a derivative rule of their own (`jax.custom_jvp`, `jax.custom_vjp`), loops and
branches stay whole. A layer that one of them computes and uses inside cannot be perturbed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array

Forward = Callable[[Any, Any], tuple[Any, Mapping[str, Array]]]

# Primitives that only call a jaxpr, by name, and the parameter that holds it.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
}


@dataclass(frozen=True)
class Program:
    """A traced function, its layers in the order in which they are computed.

    Attributes:
      names: of the layers.
      layers: shape and dtype of each.
      output: shapes and dtypes, in the structure of the function's output.
      args: all that the equations need: constants, then the leaves of params and batch.
      sources: the variable that δ is added to, None for a layer that cannot be perturbed.
      reaches_output: whether the output depends on the layer, as far as δ shows.
      paths: the equations that lead from the layer before to this one; None where there are none:
        for the first layer, after one that cannot be perturbed, and for a parallel branch.
    """

    names: tuple[str, ...]
    layers: tuple[jax.ShapeDtypeStruct, ...]
    output: Any
    args: tuple[Any, ...]
    sources: tuple[Any, ...]
    reaches_output: tuple[bool, ...]
    paths: tuple[tuple[Any, ...] | None, ...]
    _jaxpr: core.Jaxpr
    _outvars: tuple[Any, ...]  # leaves of the output
    _layervars: tuple[Any, ...]

    def run(
        self, args: Sequence[Any], deltas: Mapping[int, Array]
    ) -> tuple[Any, list[Array], dict[Any, Any]]:
        """Evaluates the function with δ_l added to layers.

        Args:
          args: in the place of `args`.
          deltas: by number of the layer, in its shape and dtype.

        Returns:
          The output, the layers, and the value of every variable for `step`.
        """
        added: dict[Any, list[Array]] = {}
        for number, delta in deltas.items():
            added.setdefault(self.sources[number], []).append(delta)
        env: dict[Any, Any] = {}

        def define(variables: Iterable[Any], values: Iterable[Any]) -> None:
            for variable, value in zip(variables, values, strict=True):
                env[variable] = sum(added.get(variable, ()), start=value)

        define(self._jaxpr.invars, args)
        for equation in self._jaxpr.eqns:
            define(_results(equation), _apply(self._jaxpr, equation, env))
        output = [_read(env, variable) for variable in self._outvars]
        layers = [_read(env, variable) for variable in self._layervars]
        return jax.tree.unflatten(jax.tree.structure(self.output), output), layers, env

    def step(self, number: int, env: Mapping[Any, Any], before: Array) -> Array:
        """Layer `number` as a function of the layer before it, all else as in env of `run`."""
        path = self.paths[number]
        assert path is not None
        local = {self.sources[number - 1]: before}
        for equation in path:
            results = _apply(self._jaxpr, equation, {**_needed(equation, env), **local})
            local.update(zip(_results(equation), results, strict=True))
        return local[self._layervars[number]]


def trace_layers(forward: Forward, params: Any, batch: Any) -> Program:
    """Traces forward(params, batch), without computing anything.

    Raises:
      ValueError: forward does not return an output and a mapping of arrays, or an intermediate is
        not a floating-point array with the batch's examples on its first axis.
    """
    found: list[Any] = []

    def flat(params: Any, batch: Any) -> tuple[list[Any], list[Any]]:
        returned = forward(params, batch)
        if not (isinstance(returned, tuple) and len(returned) == 2):
            raise ValueError(
                f"forward returns a {type(returned).__name__}: allowed is a pair (output, "
                "intermediates)"
            )
        output, layers = returned
        if not isinstance(layers, Mapping):
            raise ValueError(
                f"forward returns intermediates in a {type(layers).__name__}: allowed is a mapping "
                "from name to pre-activations"
            )
        leaves, tree = jax.tree.flatten(output)
        found[:] = [tuple(map(str, layers)), tree]
        return leaves, list(layers.values())

    closed, shapes = jax.make_jaxpr(flat, return_shape=True)(params, batch)
    names, tree = found
    _check_layers(names, shapes[1], batch)
    leaves = jax.tree.leaves((params, batch))
    called = functools.partial(_inlined, closed.jaxpr, closed.consts)
    traced = jax.make_jaxpr(called)(*leaves)
    # Constants become arguments: compiled into a program they would be copied for each.
    jaxpr = traced.jaxpr.replace(
        constvars=[], invars=[*traced.jaxpr.constvars, *traced.jaxpr.invars]
    )
    outvars, layervars = jaxpr.outvars[: tree.num_leaves], jaxpr.outvars[tree.num_leaves :]

    made = {variable: -1 for variable in jaxpr.invars}
    for place, equation in enumerate(jaxpr.eqns):
        made.update(dict.fromkeys(_results(equation), place))
    order = sorted(
        range(len(names)), key=lambda i: -1 if _is_literal(layervars[i]) else made[layervars[i]]
    )
    layervars = [layervars[i] for i in order]
    sources = [_source(jaxpr, variable, made) for variable in layervars]
    needed = _ancestors(jaxpr.eqns, outvars)
    paths = [None] + [
        _path(jaxpr, before, after)
        for before, after in zip(sources[:-1], layervars[1:], strict=True)
    ]
    return Program(
        names=tuple(names[i] for i in order),
        layers=tuple(shapes[1][i] for i in order),
        output=jax.tree.unflatten(tree, shapes[0]),
        args=(*traced.consts, *leaves),
        sources=tuple(sources),
        reaches_output=tuple(source is not None and source in needed for source in sources),
        paths=tuple(paths),
        _jaxpr=jaxpr,
        _outvars=tuple(outvars),
        _layervars=tuple(layervars),
    )


def _check_layers(names: Sequence[str], shapes: Sequence[Any], batch: Any) -> None:
    if not names:
        raise ValueError(
            "forward returns no intermediates, so there is no layer to probe: return the "
            "pre-activations of at least one layer by name"
        )
    examples = jnp.shape(jax.tree.leaves(batch)[0])[0]
    for name, found in zip(names, shapes, strict=True):
        if not hasattr(found, "shape") or not jnp.issubdtype(found.dtype, jnp.floating):
            what = getattr(found, "dtype", type(found).__name__)
            raise ValueError(
                f"intermediates[{name!r}] is of {what}: allowed are floating-point arrays"
            )
        if len(found.shape) < 2 or found.shape[0] != examples or 0 in found.shape:
            raise ValueError(
                f"intermediates[{name!r}] has shape {found.shape}: allowed is (batch, ..., "
                f"features) with batch={examples}; layers that a scan stacks have to be unrolled"
            )


def _is_literal(variable: Any) -> bool:
    return isinstance(variable, core.Literal)


def _results(equation: Any) -> list[Any]:
    """Variables that an equation defines and that anything can read."""
    return [v for v in equation.outvars if not isinstance(v, core.DropVar)]


def _operands(equation: Any) -> list[Any]:
    return list(dict.fromkeys(v for v in equation.invars if not _is_literal(v)))


def _read(env: Mapping[Any, Any], variable: Any) -> Any:
    return variable.val if _is_literal(variable) else env[variable]


def _needed(equation: Any, env: Mapping[Any, Any]) -> dict[Any, Any]:
    return {variable: env[variable] for variable in _operands(equation)}


def _apply(jaxpr: core.Jaxpr, equation: Any, env: Mapping[Any, Any]) -> list[Any]:
    """Values of an equation's results, by JAX's own evaluation of a jaxpr of this equation alone.

    How parameters are handed to a primitive, and with them custom derivatives, is JAX's business.
    """
    operands = _operands(equation)
    alone = jaxpr.replace(
        constvars=[],
        invars=operands,
        outvars=_results(equation),
        eqns=[equation],
    )
    return core.jaxpr_as_fun(core.ClosedJaxpr(alone, []))(*(env[v] for v in operands))


def _inlined(jaxpr: core.Jaxpr, consts: Sequence[Any], *args: Any) -> list[Any]:
    """Evaluates a jaxpr with the equations of called jaxprs in the place of the calls."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for equation in jaxpr.eqns:
        called = _CALLS.get(equation.primitive.name)
        if called is None:
            env.update(zip(_results(equation), _apply(jaxpr, equation, env), strict=True))
            continue
        inner = equation.params[called]
        closed = inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, [])
        values = [_read(env, variable) for variable in equation.invars]
        results = _inlined(closed.jaxpr, closed.consts, *values)
        env.update(zip(equation.outvars, results, strict=True))
    return [_read(env, variable) for variable in jaxpr.outvars]


def _source(jaxpr: core.Jaxpr, variable: Any, made: Mapping[Any, int]) -> Any:
    """The variable to perturb, or None where that would miss what depends on the layer."""
    if _is_literal(variable):
        return None
    place = made[variable]
    return None if place >= 0 and _used_inside(jaxpr.eqns[place], variable) else variable


def _used_inside(equation: Any, variable: Any) -> bool:
    """Whether an equation that holds a jaxpr uses the variable that it defines."""
    index = list(equation.outvars).index(variable)
    for inner in core.jaxprs_in_params(equation.params):
        if len(inner.outvars) != len(equation.outvars) or _is_literal(inner.outvars[index]):
            continue
        result = inner.outvars[index]
        if sum(v is result for v in inner.outvars) > 1:
            return True
        for step in inner.eqns:
            if any(v is result for v in step.invars):
                return True
            if any(v is result for v in step.outvars) and _used_inside(step, result):
                return True
    return False


def _ancestors(equations: Sequence[Any], variables: Iterable[Any]) -> set[Any]:
    """Variables, and all that they depend on."""
    needed = {variable for variable in variables if not _is_literal(variable)}
    for equation in reversed(equations):
        if any(variable in needed for variable in equation.outvars):
            needed.update(_operands(equation))
    return needed


def _path(jaxpr: core.Jaxpr, before: Any, after: Any) -> tuple[Any, ...] | None:
    """Equations that depend on `before` and that `after` depends on."""
    if before is None or _is_literal(after):
        return None
    reached = {before}
    for equation in jaxpr.eqns:
        if any(variable in reached for variable in _operands(equation)):
            reached.update(_results(equation))
    if after not in reached:
        return None
    needed = _ancestors(jaxpr.eqns, [after])
    return tuple(
        equation
        for equation in jaxpr.eqns
        if any(variable in reached for variable in _operands(equation))
        and any(variable in needed for variable in _results(equation))
        and before not in equation.outvars
    )
