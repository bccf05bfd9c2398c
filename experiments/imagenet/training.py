"""The job of `experiments.imagenet`: its config checked, every seed trained and evaluated."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from bn_research import data
from bn_research.lab import Ledger
from bn_research.models.spec import num_logits
from bn_research.training.checkpoint import Checkpointer
from bn_research.training.loop import streamed, train
from bn_research.training.parallel import create_parallel
from bn_research.training.preemption import Preemption
from bn_research.training.state import TrainState, digest
from experiments.imagenet import Config
from experiments.imagenet.programs import INCEPTION, Programs

Keep = Callable[[str, Callable[[], dict[str, Any]]], None]  # by name, what is measured now


def prepare(config: Config) -> Any:
    """The builder of the data set, for a config that fits it and the devices."""
    devices, together = jax.device_count(), config.batch_size // config.microbatches
    if together % devices:
        raise ValueError(
            f"batch_size={config.batch_size} does not divide over {devices} devices: allowed are "
            f"multiples of {devices * config.microbatches}"
        )
    group, each = config.group_size or together, together // devices
    if together % group or (group % each and each % group):
        raise ValueError(
            f"group_size={config.group_size} does not divide the {together} examples that "
            f"{devices} devices take at once: it must divide the {each} on each, or be those of a "
            f"divisor of {devices} devices; 0 is all"
        )
    builder = data.prepare(
        config.dataset, data_dir=config.data_dir or None, manual_dir=config.manual_dir or None
    )
    classes = builder.info.features["label"].num_classes
    if config.network != INCEPTION and num_logits(config.network) != classes:
        raise ValueError(
            f"network {config.network!r} ends in {num_logits(config.network)} units but "
            f"{config.dataset} has {classes} classes: end it in f{classes}"
        )
    if config.augmentation != "imagenet" and None in builder.info.features["image"].shape:
        raise ValueError(
            f"augmentation={config.augmentation!r} is not allowed for {config.dataset}, whose "
            "images differ in size: give 'imagenet' and an image_size"
        )
    return builder


def measure(config: Config, builder: Any, path: Path, *, parallel: str) -> list[dict[str, Any]]:
    """A record of each seed, with the curve of its evaluations; none but on process 0.

    Training goes on from the newest checkpoint. A curve is shorter than planned where its run
    diverged.
    """
    programs = Programs(config, builder, create_parallel(parallel))
    ledger = Ledger(path / "metrics.jsonl") if jax.process_index() == 0 else None
    saver = Checkpointer(path / "checkpoints", max_to_keep=config.keep_checkpoints)

    def keep(name: str, measured: Callable[[], dict[str, Any]]) -> None:
        if ledger is not None:
            ledger.get(name, measured)

    with Preemption() as preemption, contextlib.closing(saver):
        newest = saver.newest()
        first = int(newest[1]["name"].removeprefix("seed=")) if newest else 0
        done, total = first * config.num_steps, config.seeds * config.num_steps
        look = dict(unit="step", dynamic_ncols=True, smoothing=0.05, disable=ledger is None)
        with tqdm(total=total, initial=done, **look) as bar:
            for seed in range(first, config.seeds):
                bar.set_description(f"{config.setting}, seed {seed}")
                loop = dict(saver=saver, preempted=preemption.requested)
                _train(config, programs, seed, keep, bar.update, **loop)
    if ledger is None:
        return []
    steps = range(config.evaluate_every, config.num_steps + 1, config.evaluate_every)
    records = []
    for seed in range(config.seeds):
        names = [f"evaluation/seed={seed} step={step}" for step in steps]
        curve = [ledger.get(name, dict) for name in names if name in ledger]
        records.append({**ledger.get(f"run/seed={seed}", dict), "curve": curve})
    return records


def _train(
    config: Config, programs: Programs, seed: int, keep: Keep, on_steps: Any, **loop: Any
) -> None:
    taken = 0

    def on_dispatch(state: TrainState, steps: int) -> None:
        nonlocal taken
        taken += steps
        on_steps(steps)
        if taken % config.evaluate_every == 0:
            scores = programs.evaluate(state)
            keep(f"evaluation/seed={seed} step={taken}", lambda: {"step": taken, **scores})

    with programs.stream(seed) as open_stream:
        state, history = train(
            streamed(programs.train_step, open_stream, num_steps=config.steps_per_dispatch),
            lambda: programs.create_state(seed),
            name=f"seed={seed}",
            num_steps=config.num_steps,
            steps_per_dispatch=config.steps_per_dispatch,
            losses_per_dispatch=1,
            save_when=lambda: taken % config.checkpoint_every == 0 or taken == config.num_steps,
            on_dispatch=on_dispatch,
            **loop,
        )
    found = {"loss": history.loss, "diverged": history.diverged}
    keep(f"run/seed={seed}", lambda: {**found, "digest": digest(state)})
