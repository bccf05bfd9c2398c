"""Perturbing what a function computes on its way: the layers of a network that was never told.

A function that returns its intermediates h₁ … h_L says nothing of how its output depends on them.
Its jaxpr does: the function is traced, calls of jitted and checkpointed functions are replaced by
what they compute, and the equations are evaluated one by one with h_l + δ_l in the place of h_l.
Derivatives by δ_l at 0 are those by the layer: the gradients of all layers by one backward pass,
and the Jacobian from one layer to the next by the equations between the two alone.

Functions with a derivative rule of their own (`jax.custom_jvp`, `jax.custom_vjp`), loops and
branches stay whole. A layer that one of them computes and uses inside cannot be perturbed.

A layer can also be `marked` where it is computed, and be found there: a scan with a mark inside is
unrolled, into a layer for each turn, and what vmap made of a layer is taken apart again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from jaxtyping import Array

from bn_research.probes.one_device import on_one_device

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
    "custom_vmap_call": "call",
}
_MARK = "bn_research layer "  # then the axes of vmap, a colon and the name
_STACKED, _SHARED = "s", "m"  # an axis of vmap over weights too, and over inputs alone


@dataclass(frozen=True)
class Program:
    """A traced function, its layers in the order in which they are computed.

    Attributes:
      names: of the layers.
      layers: shape and dtype of each.
      output: shapes and dtypes, in the structure of the function's output.
      args: all that the equations need: constants, then the leaves of params and batch.
      param_args: which of them are of params.
      batch_args: which are of the batch.
      sources: the variable that δ is added to, None for a layer that cannot be perturbed.
      reaches_output: whether the output depends on the layer, as far as δ shows.
      paths: the equations that lead from the layer before to this one; None where there are none:
        for the first layer, after one that cannot be perturbed, and for a parallel branch.
    """

    names: tuple[str, ...]
    layers: tuple[jax.ShapeDtypeStruct, ...]
    output: Any
    args: tuple[Any, ...]
    param_args: range
    batch_args: range
    sources: tuple[Any, ...]
    reaches_output: tuple[bool, ...]
    paths: tuple[tuple[Any, ...] | None, ...]
    _jaxpr: core.Jaxpr
    _outvars: tuple[Any, ...]  # leaves of the output
    _layervars: tuple[Any, ...]
    _axis_name: str | None

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of arrays that calls `run` or `step`, jitted, with the axis that they name."""
        return jax.jit(on_one_device(function, self._axis_name))

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

    def needs(self, number: int) -> tuple[set[int], set[int]]:
        """Numbers of the layers, and of args, that layer `number` depends on."""
        needed = _ancestors(self._jaxpr.eqns, [self._layervars[number]])
        layers = {i for i, source in enumerate(self.sources) if source in needed}
        return layers - {number}, {i for i, v in enumerate(self._jaxpr.invars) if v in needed}

    def step(self, number: int, env: Mapping[Any, Any], before: Array) -> Array:
        """Layer `number` as a function of the layer before it, all else as in env of `run`."""
        path = self.paths[number]
        assert path is not None
        local = {self.sources[number - 1]: before}
        for equation in path:
            results = _apply(self._jaxpr, equation, {**_needed(equation, env), **local})
            local.update(zip(_results(equation), results, strict=True))
        return local[self._layervars[number]]


def marked(h: Array, kernel: Array, name: str, axes: str = "") -> Array:
    """Marks h for `trace_layers` as the pre-activations of a layer; gives h back.

    Args:
      h: the pre-activations.
      kernel: a parameter of the layer; tells vmap over weights from vmap over inputs.
      name: of the layer.
      axes: that vmap added in front of h, a letter each.
    """

    @jax.custom_batching.custom_vmap
    def layer(h, kernel):
        return checkpoint_name(h, f"{_MARK}{axes}:{name}")

    @layer.def_vmap
    def mapped(size, in_batched, h, kernel):
        h_is, kernel_is = in_batched
        if not h_is:
            return marked(h, kernel[0], name, axes), False
        return marked(h, kernel, name, (_STACKED if kernel_is else _SHARED) + axes), True

    return layer(h, kernel)


def is_layer(returned: Any) -> bool:
    """Whether it is what can be marked: a floating-point array of examples and features."""
    return (
        isinstance(returned, jax.Array)
        and jnp.issubdtype(returned.dtype, jnp.floating)
        and returned.ndim > 0
    )


def check_returned(names: Sequence[str]) -> None:
    """ValueError where modules that own a kernel returned something else than an array.

    Args:
      names: of those modules.
    """
    if names:
        raise ValueError(
            f"forward's {', '.join(names)} returns no floating-point array: allowed is a module "
            "with a kernel that returns its pre-activations; give the kernel a module of its own, "
            "such as Dense"
        )


def trace_layers(
    forward: Forward, params: Any, batch: Any, *, axis_name: str | None = None
) -> Program:
    """Traces forward(params, batch), without computing anything.

    Raises:
      ValueError: forward does not return an output and a mapping of arrays, an intermediate is
        not a floating-point array with the batch's examples on its first axis, or a marked layer
        lies where it cannot be found.
    """
    axis_env = None if axis_name is None else [(axis_name, 1)]
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

    closed, shapes = jax.make_jaxpr(flat, axis_env=axis_env, return_shape=True)(params, batch)
    names, tree = found
    leaves = jax.tree.leaves((params, batch))
    examples = jnp.shape(jax.tree.leaves(batch)[0])[0]

    def called(*args: Any) -> list[Any]:
        marks: list[tuple[str, Any]] = []
        results = _inlined(closed.jaxpr, closed.consts, *args, marks=marks, examples=examples)
        found[:] = [name for name, _ in marks]
        return results + [value for _, value in marks]

    traced, results = jax.make_jaxpr(called, axis_env=axis_env, return_shape=True)(*leaves)
    names = (*names, *_numbered(found))
    hidden = sorted({name for equation in traced.jaxpr.eqns for name in _marks_in(equation)})
    if hidden:
        raise ValueError(
            f"forward computes {', '.join(hidden)} inside a loop without end, a branch or a "
            "function with a derivative rule of its own, where the probe cannot see: allowed are "
            "scan, vmap, remat and jit; call the layer outside"
        )
    shapes = (shapes[0], results[tree.num_leaves :])
    _check_layers(names, shapes[1], examples)
    # Constants become arguments: compiled into a program they would be copied for each.
    jaxpr = traced.jaxpr.replace(
        constvars=[], invars=[*traced.jaxpr.constvars, *traced.jaxpr.invars]
    )
    outvars, layervars = jaxpr.outvars[: tree.num_leaves], jaxpr.outvars[tree.num_leaves :]

    first, num_inputs = len(traced.consts), len(jax.tree.leaves(batch))
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
        param_args=range(first, first + len(leaves) - num_inputs),
        batch_args=range(first + len(leaves) - num_inputs, first + len(leaves)),
        sources=tuple(sources),
        reaches_output=tuple(source is not None and source in needed for source in sources),
        paths=tuple(paths),
        _jaxpr=jaxpr,
        _outvars=tuple(outvars),
        _layervars=tuple(layervars),
        _axis_name=axis_name,
    )


def first_uses(function: Callable[[Any], Any], tree: Any) -> list[int]:
    """For each leaf when it first meets something else in function(tree), as a number that ascends.

    A cast or another change of the leaf alone is no use: all of them may come first. Leaves that
    are not used have the largest number.
    """
    leaves, treedef = jax.tree.flatten(tree)
    closed = jax.make_jaxpr(lambda *leaves: function(jax.tree.unflatten(treedef, leaves)))(*leaves)
    uses: dict[int, int] = {}
    _note_uses(closed.jaxpr, {v: i for i, v in enumerate(closed.jaxpr.invars)}, uses)
    return [uses.get(i, len(leaves)) for i in range(len(leaves))]


def _note_uses(jaxpr: core.Jaxpr, alone: dict[Any, int], uses: dict[int, int]) -> None:
    """Numbers the leaves by their first use, inside called functions too.

    Args:
      jaxpr: of a function.
      alone: its variables that depend on one leaf and nothing else; gets more.
      uses: gets the numbers.
    """
    for equation in jaxpr.eqns:
        called = [
            inner
            for inner in core.jaxprs_in_params(equation.params)
            if len(inner.invars) == len(equation.invars)
            and len(inner.outvars) == len(equation.outvars)
        ]
        if len(called) == 1:
            pairs = zip(called[0].invars, equation.invars, strict=True)
            inside = {v: alone[w] for v, w in pairs if not _is_literal(w) and w in alone}
            _note_uses(called[0], inside, uses)
            results = zip(called[0].outvars, equation.outvars, strict=True)
            alone.update({w: inside[v] for v, w in results if not _is_literal(v) and v in inside})
            continue
        operands = _operands(equation)
        owners = {alone[variable]: None for variable in operands if variable in alone}
        if len(owners) == 1 and all(variable in alone for variable in operands):
            alone.update(dict.fromkeys(_results(equation), *owners))
            continue
        for i in owners:
            uses.setdefault(i, len(uses))


def _numbered(names: Sequence[str]) -> Iterator[str]:
    """Names as they are for the first of a name, and with a number for those after it."""
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        yield name if seen[name] == 1 else f"{name}#{seen[name]}"


def _check_layers(names: Sequence[str], shapes: Sequence[Any], examples: int) -> None:
    if not names:
        raise ValueError(
            "forward returns no intermediates, so there is no layer to probe: return the "
            "pre-activations of at least one layer by name"
        )
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


def _inlined(
    jaxpr: core.Jaxpr,
    consts: Sequence[Any],
    *args: Any,
    marks: list[tuple[str, Any]],
    examples: int,
) -> list[Any]:
    """Evaluates a jaxpr with the equations of called jaxprs in the place of the calls.

    Args:
      jaxpr: of a function.
      consts: that it holds.
      *args: of the function.
      marks: gets the names and values of the layers that are marked in it.
      examples: in the batch.
    """
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    inline = functools.partial(_inlined, marks=marks, examples=examples)
    for equation in jaxpr.eqns:
        called = _CALLS.get(equation.primitive.name)
        values = [_read(env, variable) for variable in equation.invars]
        mark = _mark_of(equation)
        if mark is not None:
            axes, name = mark.split(":", 1)
            results = [_taken_apart(values[0], axes, name, marks, examples)]
        elif called is not None:
            inner = equation.params[called]
            closed = inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, [])
            results = inline(closed.jaxpr, closed.consts, *values)
        elif equation.primitive.name == "scan" and _marks_in(equation):
            results = _unrolled(equation, values, inline)
        else:
            env.update(zip(_results(equation), _apply(jaxpr, equation, env), strict=True))
            continue
        env.update(zip(equation.outvars, results, strict=True))
    return [_read(env, variable) for variable in jaxpr.outvars]


def _unrolled(equation: Any, values: Sequence[Any], inline: Callable[..., list[Any]]) -> list[Any]:
    """Results of a scan, turn by turn."""
    params = equation.params
    closed, length = params["jaxpr"], params["length"]
    first, carried = params["num_consts"], params["num_carry"]
    fixed, carry, xs = values[:first], values[first : first + carried], values[first + carried :]
    ys: list[Any] = [None] * length
    for turn in reversed(range(length)) if params["reverse"] else range(length):
        at = [jax.lax.index_in_dim(x, turn, keepdims=False) for x in xs]
        results = inline(closed.jaxpr, closed.consts, *fixed, *carry, *at)
        carry, ys[turn] = results[:carried], results[carried:]
    return [*carry, *(jnp.stack(y) for y in zip(*ys, strict=True))]


def _taken_apart(
    h: Array, axes: str, name: str, marks: list[tuple[str, Any]], examples: int
) -> Array:
    """Adds to marks the layers, examples first, that vmap put into h; h put together of them."""
    stacked = axes.find(_STACKED)
    if stacked >= 0:
        rest = axes[:stacked] + axes[stacked + 1 :]
        parts = [
            _taken_apart(
                jax.lax.index_in_dim(h, i, stacked, keepdims=False),
                rest,
                f"{name}[{i}]",
                marks,
                examples,
            )
            for i in range(h.shape[stacked])
        ]
        return jnp.stack(parts, stacked)
    places = [i for i in range(min(len(axes) + 1, h.ndim)) if h.shape[i] == examples]
    if axes and len(places) > 1:
        raise ValueError(
            f"forward maps {name} over an axis as long as the batch, {examples}: give a batch of "
            "another size, so that examples can be told from it"
        )
    place = places[0] if axes and places else 0
    layer = jnp.moveaxis(h, place, 0)
    marks.append((name, layer))
    return jnp.moveaxis(layer, 0, place)


def _mark_of(equation: Any) -> str | None:
    """Axes and name of a layer, if the equation marks one."""
    name = equation.params.get("name", "") if equation.primitive.name == "name" else ""
    return name.removeprefix(_MARK) if name.startswith(_MARK) else None


def _marks_in(equation: Any) -> set[str]:
    """Names of the layers that are marked in it."""
    mark = _mark_of(equation)
    found = set() if mark is None else {mark.split(":", 1)[1]}
    for inner in core.jaxprs_in_params(equation.params):
        for step in inner.eqns:
            found |= _marks_in(step)
    return found


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
