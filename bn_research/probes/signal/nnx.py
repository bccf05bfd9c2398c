"""A Flax nnx model as a function whose layers are marked, for the probe of the signal."""

import types
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from bn_research.probes.perturbation import check_returned, is_layer, marked
from bn_research.probes.signal.linen import library_of

Path = tuple[Any, ...]


class NnxForward:
    """(state, batch) -> (output, {}), like `linen.LinenForward`.

    Attributes:
      state: all variables of the model.
      left_out: after a call, the kernels that no layer stands for, in words.
    """

    def __init__(self, model: Any, options: Mapping[str, Any]):
        """Looks for the modules that own a kernel.

        Raises:
          ValueError: a model of another library, or one without a kernel.
        """
        nnx = self._nnx = library_of(model, "flax.nnx", "one of linen takes probe_linen")
        self._graph, self.state = nnx.split(model)
        self._options = options
        owners = {
            path: name
            for path, module in nnx.iter_modules(model)
            for name in self._kernels(module)[:1]
        }
        if not owners:
            raise ValueError(
                f"{type(model).__name__} has no layer to probe: none of its parameters is a kernel,"
                " named so or of two or more axes"
            )
        # What a module returns that has layers inside is not what its own kernel makes.
        around = [k for k in owners if any(len(p) > len(k) and p[: len(k)] == k for p in owners)]
        self._beside = [f"{_joined((*path, owners[path]))} (beside layers)" for path in around]
        self._owners = {path: name for path, name in owners.items() if path not in around}
        self.left_out: tuple[str, ...] = ()

    def __call__(self, state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        """Calls a copy of the model.

        Raises:
          ValueError: a layer returns something else than an array.
        """
        model = self._nnx.merge(self._graph, state)
        returned: dict[Path, bool] = {}  # whether it is an array
        for path, module in self._nnx.iter_modules(model):
            if path in self._owners:
                name = _joined(path) or type(model).__name__
                object.__setattr__(
                    module, "__class__", _marking(module, path, name, self._owners[path], returned)
                )
        output = model(batch, **self._options)
        check_returned([_joined(path) for path, array in returned.items() if not array])
        idle = [f"{_joined(path)} (not called)" for path in self._owners if path not in returned]
        self.left_out = (*self._beside, *idle)
        return output, {}

    def _kernels(self, module: Any) -> list[str]:
        """Names of the parameters that make a module a layer."""
        return [
            name
            for name, value in vars(module).items()
            if isinstance(value, self._nnx.Param) and (name == "kernel" or jnp.ndim(value[...]) > 1)
        ]


def _marking(module: Any, path: Path, name: str, kernel: str, returned: dict[Path, bool]) -> type:
    """A class like the module's, of that module alone, whose call marks what it returns."""
    cls = type(module)

    def call(self: Any, *args: Any, **options: Any) -> Any:
        result = cls.__call__(self, *args, **options)  # type: ignore[operator]
        returned[path] = is_layer(result) and returned.get(path, True)
        return marked(result, getattr(self, kernel)[...], name) if returned[path] else result

    return types.new_class(cls.__name__, (cls,), exec_body=lambda body: body.update(__call__=call))


def _joined(path: Path) -> str:
    return "/".join(map(str, path))
