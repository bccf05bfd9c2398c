"""Members of the ensembles of `experiments.ensemble`: their training and their predictions."""

import functools
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from bn_research.claims import atomic
from bn_research.lab.images import Images
from bn_research.lab.runner import Runner
from bn_research.lab.workdir import WorkdirError
from bn_research.training.evaluation import place_batches
from bn_research.training.sweep import Member
from experiments.ensemble.networks import (
    Network,
    Run,
    create_program,
    hyper,
    prediction_program,
    statistics_program,
    sweep_program,
)
from experiments.ensemble.scores import average, by_size, disagreement, scores

_EVAL_BATCH = 32


class Trainer:
    """Trains networks, each once in the life of a workdir, and keeps what they predict.

    Args:
      runner: of the experiment.
      network: what all have in common.
      images: training set, and the test set as far as it is used.
      folder: for predictions, which are too many numbers for the ledger.
      draws: numbers of batches of MC-BN, from few to many; algorithm 2 takes the most.
    """

    def __init__(
        self, runner: Runner, network: Network, images: Images, folder: Path, draws: Sequence[int]
    ):
        """Places the test set on the devices."""
        self._runner, self._network, self._folder = runner, network, folder
        self._train, self._draws = images.train, sorted(draws)
        self._label = np.asarray(images.test.label)
        self._test = place_batches(images.test, batch_size=_EVAL_BATCH)

    def train(self, runs: Sequence[Run], *, sampled: Sequence[Run]) -> list[dict[str, Any]]:
        """Records of the runs, in their order.

        Args:
          runs: the networks.
          sampled: those of them that predict by MC-BN too.
        """
        records: dict[str, dict[str, Any]] = {}
        for per_activation in sorted({run.setting.per_activation for run in runs}):
            group = {run.name: run for run in runs if run.setting.per_activation == per_activation}
            self._runner.describe("BN per activation" if per_activation else "BN per channel")
            sweep = sweep_program(self._network, per_activation)
            members = [
                Member(name, run.seed, hyper(run.setting), self._network.num_steps)
                for name, run in group.items()
            ]
            found = self._runner.train(
                create_program(self._network, per_activation),
                sweep,
                members,
                self._train,
                record=functools.partial(self._record, group, sweep, sampled),
            )
            records.update(zip(group, found, strict=True))
        return [records[run.name] for run in runs]

    def _record(self, group: Mapping[str, Run], sweep, sampled, member, state, history):
        run, every = group[member.name], self._network.steps_per_dispatch
        per_activation = run.setting.per_activation
        population, of_batches = statistics_program(self._network, per_activation)(
            state.params, state.batch_stats, self._batches(run.seed)
        )
        predicted = self._predict(state.params, population, per_activation)
        record = {
            **run.setting._asdict(),
            "seed": run.seed,
            "strategy": sweep.choice.strategy,
            "loss": history.loss.reshape(-1, every).mean(axis=1),
            "diverged": history.diverged,
            "scores": scores(average([predicted]), self._label),
            "predictions": self._keep(predicted),
        }
        if run in sampled:
            record["mc_bn"] = self._sample(state.params, of_batches, per_activation)
        return record

    def _batches(self, seed: int) -> Array:
        """Training images of an epoch's first batches, [batches, examples, …]; its order is new."""
        size, count = self._network.batch_size, self._draws[-1]
        rows = np.random.default_rng(seed).permutation(len(self._train.label))[: count * size]
        return self._train.image[rows].reshape(count, size, *self._network.image_shape)

    def _predict(self, params: Any, batch_stats: Any, per_activation: bool) -> np.ndarray:
        program = prediction_program(self._network, per_activation, self._test.mesh)
        whole = NamedSharding(self._test.mesh, PartitionSpec())
        placed = jax.device_put((params, batch_stats), whole)
        found = np.asarray(program(*placed, self._test.batches.image))
        found = found.reshape(-1, found.shape[-1])[: len(self._label)]
        # A network that was lost predicts nothing: all classes alike, which counts as an error.
        sound = np.all(np.isfinite(found), axis=1, keepdims=True)
        return np.where(sound, found, -np.log(np.float32(found.shape[-1])))

    def _sample(self, params: Any, of_batches: Any, per_activation: bool) -> dict[str, Any]:
        """Scores by number of draws: the mean over draws of probabilities by a batch's statistics.

        A draw serves the whole test set; each draw is another batch.
        """
        of_batches = jax.device_get(of_batches)  # slicing it compiles nothing then
        predicted = [
            self._predict(
                params, jax.tree.map(lambda leaf, i=i: leaf[i], of_batches), per_activation
            )
            for i in range(self._draws[-1])
        ]
        return {str(n): scores(average(predicted[:n]), self._label) for n in self._draws}

    def _keep(self, predicted: np.ndarray) -> str:
        """Writes predictions, before the ledger tells of them; their name is their digest."""
        buffer = io.BytesIO()
        np.save(buffer, predicted, allow_pickle=False)
        name = f"{hashlib.sha256(buffer.getvalue()).hexdigest()}.npy"
        atomic.write_bytes(self._folder / name, buffer.getvalue())
        return name

    def combine(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What an ensemble of these networks measures; needs their predictions.

        Raises:
          WorkdirError: those of a network are not there, or are not what was written.
        """
        predicted = [load_predictions(self._folder, record) for record in records]
        return {
            "scores": scores(average(predicted), self._label),
            "sizes": by_size(predicted, self._label),
            "disagreement": disagreement(predicted),
        }


def load_predictions(folder: Path, record: Mapping[str, Any]) -> np.ndarray:
    """Logarithms of class probabilities of a network; WorkdirError unless they are as written."""
    path = folder / record["predictions"]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WorkdirError(
            f"predictions of the network {record['name']!r} cannot be read ({error}): give another "
            "--workdir"
        ) from error
    if hashlib.sha256(content).hexdigest() != path.stem:
        raise WorkdirError(
            f"{path} is damaged: it is not what was predicted; give another --workdir"
        )
    return np.load(io.BytesIO(content), allow_pickle=False)
