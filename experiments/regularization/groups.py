r"""Is the noise of a batch why BN regularizes? Part of `regularization`.

One network, one SGD batch, one stream of examples. What changes is the noise in x̂ alone:

  - how many examples share statistics, from a few to the whole SGD batch, whose noise is least;
  - whether an example meets other examples in each epoch, or always those it met first;
  - whether the noise is BN's, or there is none (population statistics), or it is drawn: by the
    measured law, from another group of the batch, or, as the wrong law of the same power, for
    each element alone; see `bn_research.layers.stochastic_norm`.

The generalization gap, training less test accuracy in inference mode, also closes when training
gets worse, so test accuracy is judged beside it. All arms with BN share one learning rate, chosen
for statistics of the whole batch: the end of the ladder that has least noise. The network without
BN has its own.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

from bn_research.lab.runner import Runner
from bn_research.models.spec import num_logits
from experiments.regularization.arms import Setting
from experiments.regularization.data import Data
from experiments.regularization.groups_dose import dose
from experiments.regularization.groups_figures import draw
from experiments.regularization.groups_verdicts import (
    CLAIMS,
    FROZEN,
    INJECTED,
    PLAIN,
    PLAIN_FROZEN,
    POPULATION,
    judge,
    ladder_arm,
)
from experiments.regularization.training import Run, choose, trainer_of

__all__ = ["CLAIMS", "check", "draw", "judge", "measure", "total_steps"]

_WHOLE = {  # fields that hold whole numbers: the least allowed
    "groups_seeds": 1,
    "groups_tuning_seeds": 1,
    "groups_examples": 4,
    "groups_size": 2,
    "groups_steps": 1,
    "groups_steps_per_dispatch": 1,
}


def check(config: Any) -> None:
    """ValueError, in one line, unless every field named groups_… can be used."""
    for name, least in _WHOLE.items():
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r} is not allowed: a whole number from {least} up")
    sizes = config.groups_sizes
    whole = all(isinstance(size, int) and size > 1 for size in sizes)
    if not whole or len(sizes) < 2 or list(sizes) != sorted(set(sizes)):
        raise ValueError(
            f"groups_sizes={sizes!r} is not allowed: two or more whole numbers above 1, ascending; "
            "the last is the SGD batch"
        )
    batch = sizes[-1]
    if any(batch % size for size in sizes):
        raise ValueError(f"groups_sizes={sizes!r} is not allowed: each must divide the last")
    if config.groups_size not in sizes[:-1]:
        raise ValueError(
            f"groups_size={config.groups_size} is not allowed: one of groups_sizes={sizes!r} but "
            "the last"
        )
    if config.groups_examples < batch:
        raise ValueError(
            f"groups_examples={config.groups_examples} is not allowed: at least the SGD batch, "
            f"{batch}"
        )
    if config.groups_steps % config.groups_steps_per_dispatch:
        raise ValueError(
            f"groups_steps={config.groups_steps} is not allowed: it must be a multiple of "
            f"groups_steps_per_dispatch={config.groups_steps_per_dispatch}"
        )
    rates = config.groups_rates
    sound = all(isinstance(rate, int | float) and 0 < rate < math.inf for rate in rates)
    if not rates or not sound or len(set(rates)) < len(rates):
        raise ValueError(
            f"groups_rates={rates!r} is not allowed: one or more positive numbers, all different"
        )
    slower = config.groups_slower
    if not isinstance(slower, int | float) or not (slower == 0 or 1 < slower < math.inf):
        raise ValueError(
            f"groups_slower={slower!r} is not allowed: above 1, what the rate of a second ladder "
            "is divided by, or 0 for none"
        )
    num_logits(config.groups_network)


def total_steps(config: Any) -> int:
    """Of all trainings."""
    tuning = 2 * len(config.groups_rates) * config.groups_tuning_seeds
    main = len(_main_settings(config, 1.0, 2.0)) * config.groups_seeds
    slower = len(config.groups_sizes) * config.seeds if config.groups_slower else 0
    return (tuning + main + slower) * config.groups_steps


def measure(config: Any, data: Data, runner: Runner) -> dict[str, list[dict[str, Any]]]:
    """Records of the trainings, by kind: tuning, main, slower; each once in a workdir's life.

    Args:
      config: of the run.
      data: of its training set, the first config.groups_examples are used.
      runner: of the run.
    """
    trainer = trainer_of("groups", config, data, runner)
    measured = functools.partial(dose, trainer)
    tuning = trainer.train(_tuning_runs(config), measure=measured)
    rates = {norm: best_rate(tuning, norm) for norm in ("batch", "none")}
    main = _main_settings(config, rates["batch"], rates["none"])
    slower = _ladder(config, rates["batch"] / config.groups_slower) if config.groups_slower else {}
    return {
        "tuning": tuning,
        "main": trainer.train(_for_each_seed(main, range(config.groups_seeds)), measure=measured),
        "slower": trainer.train(_for_each_seed(slower, range(config.seeds)), measure=measured),
    }


def best_rate(tuning: Sequence[dict[str, Any]], norm: str) -> float:
    """The rate with the highest accuracy on the validation set, mean over the tuning's seeds."""
    records = [
        {**record, "error": 1 - record["validation_accuracy"]}
        for record in tuning
        if record["norm"] == norm
    ]
    return choose(records, "error")["rate"]


def _for_each_seed(settings: dict[str, Setting], seeds: range) -> list[Run]:
    return [Run(arm, setting, seed) for arm, setting in settings.items() for seed in seeds]


def _tuning_runs(config: Any) -> list[Run]:
    """Every rate, with statistics of the whole batch and without BN; on seeds of no verdict."""
    first = max(config.seeds, config.groups_seeds)
    seeds = range(first, first + config.groups_tuning_seeds)
    batch = config.groups_sizes[-1]
    settings = {
        ladder_arm(batch): _setting(config, "batch", batch),
        PLAIN: _setting(config, "none", config.groups_size),
    }
    return [
        Run(arm, setting._replace(rate=rate), seed)
        for arm, setting in settings.items()
        for rate in config.groups_rates
        for seed in seeds
    ]


def _main_settings(config: Any, rate: float, plain_rate: float) -> dict[str, Setting]:
    """Every arm and its setting."""
    size = config.groups_size
    frozen = dict(regrouped=False)
    return {
        **_ladder(config, rate),
        FROZEN: _setting(config, "batch", size, rate=rate, **frozen),
        POPULATION: _setting(config, "population", 0, rate=rate),
        **{noise: _setting(config, noise, size, rate=rate) for noise in INJECTED},
        # Without BN the group decides the order of the examples alone, and only where it is frozen:
        # given all the same, so that both are one program.
        PLAIN: _setting(config, "none", size, rate=plain_rate),
        PLAIN_FROZEN: _setting(config, "none", size, rate=plain_rate, **frozen),
    }


def _ladder(config: Any, rate: float) -> dict[str, Setting]:
    """BN by groups of every size."""
    return {
        ladder_arm(size): _setting(config, "batch", size, rate=rate) for size in config.groups_sizes
    }


def _setting(config: Any, norm: str, group_size: int, **options: Any) -> Setting:
    return Setting(
        config.groups_network,
        norm,
        group_size=group_size,
        batch_size=config.groups_sizes[-1],
        **options,
    )
