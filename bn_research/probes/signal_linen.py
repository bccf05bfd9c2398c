"""A Flax linen model as a function that returns its pre-activations; by its methods alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bn_research.probes.perturbation import Forward


class ApplyError(Exception):
    """`model.apply` failed; not a ValueError, so that nobody takes it for one of the probe's."""


def forward_of(model: Any, variables: Any, options: Mapping[str, Any]) -> Forward:
    """(variables, batch) -> (output, what every layer returned, by name).

    Raises:
      ValueError: variables without params or without a kernel; apply options that the probe sets.
    """
    for name in ("mutable", "capture_intermediates"):
        if name in options:
            raise ValueError(f"{name} is not allowed: the probe sets it")
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise ValueError("variables has no 'params': give what model.init returned")
    owners = set(_owners(variables["params"], ()))
    owners = {path for path in owners if not any(_within(other, path) for other in owners)}
    if not owners:
        raise ValueError(
            f"{type(model).__name__} has no layer to probe: none of its parameters is a kernel, "
            "named so or of two or more axes"
        )
    collections = [name for name in variables if name not in ("params", "intermediates")]

    def is_layer(module: Any, method: str) -> bool:
        return method == "__call__" and tuple(module.path) in owners

    def forward(variables: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        kept = {name: tree for name, tree in variables.items() if name != "intermediates"}
        try:
            output, state = model.apply(
                kept,
                batch,
                capture_intermediates=is_layer,
                mutable=[*collections, "intermediates"],
                **options,
            )
        except Exception as error:  # Flax's own are no ValueErrors
            raise ApplyError(str(error).strip().split("\n")[0]) from error
        layers = {}
        for path in sorted(owners):
            found: Any = state.get("intermediates", {})
            for part in (*path, "__call__"):
                found = found.get(part, {}) if isinstance(found, Mapping) else {}
            name = "/".join(path) or type(model).__name__
            for number, value in enumerate(found, start=1):
                layers[name if number == 1 else f"{name}#{number}"] = value
        return output, layers

    return forward


def mismatch(model: Any, variables: Any, batch: Any, options: Mapping[str, Any]) -> str | None:
    """The first parameter that this batch would need in another shape, in words."""
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


def _owners(params: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Paths of the modules that own a kernel."""
    inner = {name: tree for name, tree in params.items() if isinstance(tree, Mapping)}
    for name, tree in params.items():
        if name in inner:
            yield from _owners(tree, (*path, name))
        elif name == "kernel" or any(jnp.ndim(leaf) > 1 for leaf in jax.tree.leaves(tree)):
            yield path


def _within(inner: tuple[str, ...], outer: tuple[str, ...]) -> bool:
    return len(inner) > len(outer) and inner[: len(outer)] == outer
