"""A Flax linen model as a function whose layers are marked, for the probe of the signal."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bn_research.probes.perturbation import check_returned, is_layer, marked

Path = tuple[str, ...]

_numbers = itertools.count()


def library_of(model: Any, library: str, otherwise: str) -> Any:
    """The library of Flax that a model is a module of; whoever has a model has loaded it.

    Raises:
      ValueError: a model of another library.
    """
    loaded = sys.modules.get(library)
    if loaded is None or not isinstance(model, loaded.Module):
        raise ValueError(
            f"model is a {type(model).__name__}: allowed are modules of {library}; {otherwise}, "
            "and a function probe_signal"
        )
    return loaded


class ApplyError(Exception):
    """`model.apply` failed; not a ValueError, so that nobody takes it for one of the probe's."""


class LinenForward:
    """(variables, batch) -> (output, {}), with layers marked where they are computed.

    Attributes:
      left_out: after a call, the kernels that no layer stands for, in words.
    """

    def __init__(self, model: Any, variables: Any, options: Mapping[str, Any]):
        """Looks for the modules that own a kernel.

        Raises:
          ValueError: a model of another library; variables without params or without a kernel;
            apply options that the probe sets.
        """
        self._linen = library_of(model, "flax.linen", "one of nnx takes probe_nnx")
        for name in ("mutable", "capture_intermediates"):
            if name in options:
                raise ValueError(f"{name} is not allowed: the probe sets it")
        if not isinstance(variables, Mapping) or "params" not in variables:
            raise ValueError("variables has no 'params': give what model.init returned")
        owners = dict(_owners(variables["params"], ()))
        if not owners:
            raise ValueError(
                f"{type(model).__name__} has no layer to probe: none of its parameters is a kernel,"
                " named so or of two or more axes"
            )
        self._model, self._options = model, options
        # What a module returns that has layers inside is not what its own kernel makes.
        around = [path for path in owners if any(_within(other, path) for other in owners)]
        self._beside = [f"{'/'.join((*path, owners[path]))} (beside layers)" for path in around]
        self._owners = {path: name for path, name in owners.items() if path not in around}
        self._collections = [name for name in variables if name not in ("params", "intermediates")]
        self.left_out: tuple[str, ...] = ()

    def __call__(self, variables: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        """Applies the model.

        Raises:
          ApplyError: the model does.
          ValueError: a layer returns something else than an array.
        """
        kept = {name: tree for name, tree in variables.items() if name != "intermediates"}
        returned: dict[Path, bool] = {}  # whether it is an array

        def mark(call: Any, args: Any, options: Any, context: Any) -> Any:
            result = call(*args, **options)
            scope = context.module.scope
            path = None if scope is None else tuple(scope.path)
            if path not in self._owners or context.method_name != "__call__":
                return result
            returned[path] = is_layer(result) and returned.get(path, True)
            if not returned[path]:
                return result
            kernel = jax.tree.leaves(context.module.variables["params"][self._owners[path]])[0]
            return marked(result, kernel, self._name(path))

        # A function that nn.jit compiled for the same collections before would not be called.
        collections = [*self._collections, f"probe{next(_numbers)}"]
        try:
            with self._linen.intercept_methods(mark):
                output, _ = self._model.apply(kept, batch, mutable=collections, **self._options)
        except Exception as error:  # Flax's own are no ValueErrors
            raise ApplyError(_first(error)) from error
        check_returned([self._name(path) for path, array in returned.items() if not array])
        idle = [f"{self._name(path)} (not called)" for path in self._owners if path not in returned]
        self.left_out = (*self._beside, *idle)
        return output, {}

    def _name(self, path: Path) -> str:
        return "/".join(path) or type(self._model).__name__


def mismatch(model: Any, variables: Any, batch: Any, options: Mapping[str, Any]) -> str | None:
    """The first parameter that the batch needs in another shape, in words; None without one."""
    options = {name: value for name, value in options.items() if name != "rngs"}
    try:
        needed = jax.eval_shape(lambda: model.init(jax.random.key(0), batch, **options))
    except Exception:  # the batch fits no parameters at all: what apply said has to do
        return None
    given = dict(_leaves(variables["params"]))
    for path, leaf in _leaves(needed["params"]):
        shape = jnp.shape(given[path]) if path in given else None
        if shape != leaf.shape:
            return (
                f"params{path} has shape {shape} and would need {leaf.shape}; give a batch like "
                "the one that model.init was given"
            )
    return None


def _leaves(params: Any) -> list[tuple[str, Any]]:
    named = jax.tree_util.tree_leaves_with_path(params)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in named]


def _owners(params: Any, path: Path) -> Iterator[tuple[Path, str]]:
    """Paths of the modules that own a kernel, and its name."""
    for name, tree in params.items():
        if isinstance(tree, Mapping):
            yield from _owners(tree, (*path, name))
        elif name == "kernel" or any(jnp.ndim(leaf) > 1 for leaf in jax.tree.leaves(tree)):
            yield path, name


def _first(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _within(inner: Path, outer: Path) -> bool:
    return len(inner) > len(outer) and inner[: len(outer)] == outer
