"""Evaluation of a set that lives on the devices, as one program."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bn_research.training.metrics import Metrics
from bn_research.training.step import Batch

_AXIS = "batches"


class EvaluationSet(NamedTuple):
    """A whole set in batches that are shared out over devices; make it with `place_batches`."""

    batches: Batch  # leaves [batches, batch_size, ...]; padding is masked
    mesh: Mesh


def place_batches(
    examples: Batch, *, batch_size: int, devices: Sequence[jax.Device] | None = None
) -> EvaluationSet:
    """The set cut into batches, padded to as many for each device.

    Args:
      examples: of the whole set.
      batch_size: small ones are faster on a CPU, whose large fresh buffers cost page faults.
      devices: None is all of this process.

    Raises:
      ValueError: no examples, or a batch size below 1.
    """
    count = len(examples.label)
    if count < 1 or batch_size < 1:
        raise ValueError(
            f"batch_size={batch_size} of {count} examples is not allowed: both must be at least 1"
        )
    devices = list(devices or jax.local_devices())
    where = np.ones(count, bool) if examples.where is None else np.asarray(examples.where)
    missing = -count % (batch_size * len(devices))

    def cut(leaf):
        leaf = np.pad(np.asarray(leaf), [(0, missing)] + [(0, 0)] * (leaf.ndim - 1))
        return leaf.reshape(-1, batch_size, *leaf.shape[1:])

    batches = Batch(cut(examples.image), cut(examples.label), cut(where))
    mesh = Mesh(np.array(devices), (_AXIS,))
    return EvaluationSet(jax.device_put(batches, NamedSharding(mesh, PartitionSpec(_AXIS))), mesh)


def make_evaluation(
    eval_step: Callable[..., Metrics],
    mesh: Mesh,
    *,
    compiler_options: dict[str, Any] | None = None,
) -> Callable[..., dict[str, float]]:
    """Evaluation over a whole set, compiled once: (batches, *args) -> mean loss and accuracy.

    The sums of each batch are added up on the host, in float64 and in the order of the set, so the
    numbers do not depend on the number of devices.

    Args:
      eval_step: (batch, *args) -> Metrics of the batch; pure.
      mesh: of the `EvaluationSet`.
      compiler_options: XLA's.
    """
    cut, whole = PartitionSpec(_AXIS), PartitionSpec()

    def sums(batches, args):
        return jax.lax.map(lambda batch: eval_step(batch, *args), batches)

    program = jax.jit(
        jax.shard_map(sums, mesh=mesh, in_specs=(cut, whole), out_specs=cut, check_vma=False),
        compiler_options=compiler_options,
    )

    def evaluation(batches: Batch, *args: Any) -> dict[str, float]:
        args = jax.device_put(args, NamedSharding(mesh, whole))
        total = jax.tree.map(
            lambda leaf: np.sum(np.asarray(leaf, np.float64)), program(batches, args)
        )
        if not total.count:
            raise ValueError("every example is masked: evaluation needs at least one")
        return {
            "loss": float(total.loss / total.count),
            "accuracy": float(total.correct / total.count),
            "count": int(total.count),
        }

    return evaluation
