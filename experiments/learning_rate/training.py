"""What `experiments.learning_rate` trains: searches, three rates compared, networks of sigmoids."""

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from bn_research.claims.judging import Record, choose
from bn_research.lab.arms import Arm, Trainer
from bn_research.lab.fields import at_most
from bn_research.lab.images import Images, check_network, images_of
from bn_research.lab.runner import Runner
from bn_research.lab.workdir import Ledger
from bn_research.training.cores import use_cpu_cores
from experiments.learning_rate import PUBLISHED_BATCH, PUBLISHED_FACTOR, Config, Placement
from experiments.learning_rate.search import Searches, Setting, arm_of, final_loss, find_limits

BOOSTED = ("plain at its best rate", "BN at 30× that", "BN at its best rate")
_SEARCH_STEPS = 7  # about, of a search; for the progress bar
_Key = TypeVar("_Key", bound=Hashable)
Boosted = Mapping[str, list[Record]]  # by the names of BOOSTED; of the CNN at the paper's batch
Sigmoids = Mapping[tuple[str, Placement], list[Record]]  # (network, placement) at its best rate


class Records(NamedTuple):
    """What the verdicts rest on; records of one arm are in the order of seeds."""

    searches: Searches
    boosted: Boosted
    sigmoid: Sigmoids
    num_classes: int


def prepare(config: Config) -> Images:
    """The images; each core becomes a device, for the sweeps."""
    use_cpu_cores()
    images = images_of(config, scale="standardized", limit=config.examples)
    for network in (config.cnn, config.mlp, *config.sigmoid_networks):
        check_network(network, images, config.dataset)
    sizes = ("cnn_batch_sizes", "mlp_batch_sizes", "sigmoid_batch_size")
    at_most(config, len(images.train.label), "the training set", *sizes)
    return images


def settings(config: Config) -> list[Setting]:
    """What the largest stable rate is asked of."""
    return [
        Setting(network, placement, size)
        for network, sizes in config.batch_sizes.items()
        for size in sizes
        for placement in config.placements
    ]


def boosted_arms(config: Config, searches: Searches) -> dict[str, Arm]:
    """Plain at its best rate, BN at 30 times that and at its own best; CNN, the paper's batch."""
    plain = Setting(config.cnn, "none", PUBLISHED_BATCH)
    bn = plain._replace(placement="all")
    best = searches[plain].best
    chosen = (plain, best), (bn, PUBLISHED_FACTOR * best), (bn, searches[bn].best)
    return {name: arm_of(config, *of) for name, of in zip(BOOSTED, chosen, strict=True)}


def sigmoid_arms(config: Config, trainer: Trainer) -> dict[tuple[str, Placement], Arm]:
    """Each network of sigmoids, plain and with BN, at the best rate of the grid."""
    placements: tuple[Placement, ...] = ("none", "all")
    arms = {
        (network, placement): Arm(
            network,
            placement,
            optimizer="momentum",
            initializer="glorot",
            use_bias=True,
            activation="sigmoid",
            batch_size=config.sigmoid_batch_size,
            num_steps=config.sigmoid_steps,
        )
        for network in config.sigmoid_networks
        for placement in placements
    }
    rates = config.sigmoid_rates
    trials = [(arm.replace(learning_rate=r), config.seeds) for arm in arms.values() for r in rates]
    tried = iter(trainer.tune(trials))
    for key, arm in arms.items():
        best = choose([next(tried) for _ in rates], final_loss)
        arms[key] = arm.replace(learning_rate=best["learning_rate"])
    return arms


def measure(config: Config, images: Images, path: Path) -> Records:
    """All trainings that are not yet in the workdir; rates are chosen on a seed of their own."""
    seeds = range(config.seeds)
    asked = settings(config)
    places = (config.highest_log2_rate - config.lowest_log2_rate) * config.rates_per_octave
    tuned = places // config.tuning_stride + 1
    total = config.num_steps * (
        len(asked) * (tuned + _SEARCH_STEPS * config.seeds) + len(BOOSTED) * config.seeds
    )
    sigmoids = 2 * len(config.sigmoid_networks)
    total += config.sigmoid_steps * sigmoids * (len(config.sigmoid_rates) + config.seeds)
    ledger = Ledger(path / "metrics.jsonl")
    with Runner(path, ledger, total_steps=total, strategy=config.strategy) as runner:
        trainer = Trainer(images, runner, steps_per_dispatch=config.steps_per_dispatch)

        def trained(arms: Mapping[_Key, Arm]) -> dict[_Key, list[Record]]:
            records = iter(trainer.train([(arm, seed) for arm in arms.values() for seed in seeds]))
            return {key: [next(records) for _ in seeds] for key in arms}

        searches = find_limits(config, asked, trainer, images.num_classes)
        boosted = trained(boosted_arms(config, searches))
        sigmoid = trained(sigmoid_arms(config, trainer))
    return Records(searches, boosted, sigmoid, images.num_classes)
