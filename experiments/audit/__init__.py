"""Which weights of a network are scale-invariant, and why are the others not?

BN divides by the size of what it is given, and so takes the scale of the weights in front of it
away (Ioffe & Szegedy 2015, section 3.3). In a whole network that is true of some parameters, of
others only together, and of the head not at all. This experiment audits the project's own models by
`bn_research.probes.scale_invariance`, with BN and without, at a random initialization on real
images, and says of every parameter why it is invariant or not.

    python -m experiments.audit --config.model=cnn|mlp|resnet|preactivation_resnet|inception

    smoke     a small MLP on digits, 2 seeds
    quick     a small ResNet on digits, 3 seeds: 90 s on 2 CPU cores
    standard  ResNet-20 on Fashion-MNIST, 5 seeds: within 40 min on 2 CPU cores

Of Inception XLA compiles for minutes: one of the six audits at quick took three on 2 CPU cores, and
with --config.seeds=1 --config.width=0.0625 --config.batch_size=32 both together 2.5.

Whether BN comes after a parameter is measured too: then, and only then, some layer's batch
statistics change when the parameter is replaced by random numbers.

| claim | expected |
|---|---|
| bn-makes-kernels-invariant | each kernel with BN after it, alone or in a group; nothing else |
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from bn_research.claims import atomic
from bn_research.claims.claim import Claim
from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED, Finding
from bn_research.lab.compiler import compiler_options
from bn_research.lab.experiment import Experiment
from bn_research.lab.images import Images, load_images
from bn_research.lab.workdir import Ledger
from bn_research.layers.linen import BatchNorm
from bn_research.models.cnn import CNN, DEFAULT_SPEC
from bn_research.models.inception import SMALLEST, Inception
from bn_research.models.mlp import MLP
from bn_research.models.resnet import ResNet
from bn_research.models.spec import num_logits
from bn_research.probes.scale_invariance import Audit, Row, audit
from bn_research.training.preemption import Preemption, Stopped

MODELS = ("cnn", "mlp", "resnet", "preactivation_resnet", "inception")
ARMS = ("BN", "no BN")
_SPECS = {"cnn": DEFAULT_SPEC, "mlp": MLP.spec}
_RESNET_WIDTH = 16  # of ResNet-20
_LISTED = 6  # paths of one reason that are printed

CLAIMS = (
    Claim(
        id="bn-makes-kernels-invariant",
        statement="In a whole network BN makes the weights in front of it scale-invariant, and "
        "nothing else does",
        source="Ioffe & Szegedy (2015), section 3.3; van Laarhoven (2017), arXiv 1706.05350",
        criterion="Reproduced if for every seed, with BN, each kernel with BN after it is "
        "invariant, alone or in a group, and no parameter without BN after it is, and if without "
        "BN none is; not reproduced if of any of the three it is more than half the other way",
        expected="all; none; none",
    ),
)

WHY = {
    "invariant": "invariant: BN after it divides its scale out, and weight decay only sets its "
    "learning rate",
    "no effect": "without effect: BN after it subtracts all that it adds",
    "unused": "without effect on this loss",
    "group": "invariant only together: BN after it sees it added to others, and scaling one alone "
    "changes their proportion",
    "around": "not invariant, though BN comes after it: part of what it does goes around BN, or "
    "the variance there is not large beside ε",
    "kernel": "not invariant: no BN comes after it, and it scales the logits",
    "bias": "not invariant: no BN comes after it, and the shift that it adds to the logits grows "
    "with it",
    "last": "not invariant: no BN comes after it, and the head passes its scale on to the logits",
    "nothing": "not invariant: there is no BN",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run."""

    seeds: int = 3
    dataset: str = "digits"
    data_dir: str = ""  # where tfds keeps prepared sets; "" is its default
    manual_dir: str = ""  # where source files lie; "" is the set's default
    image_size: int = 0  # height and width of the images; 0: theirs, and 32 for inception
    model: str = "resnet"
    network: str = ""  # spec of cnn and mlp; "" is their default
    blocks: int = 1  # in each of the ResNet's three stages; 3 is ResNet-20
    width: float = 0.25  # of ResNet and Inception, multiplies their numbers of channels
    epsilon: float = 1e-6  # of BN; 1e-5 already shows where a variance is small
    batch_size: int = 64
    tolerance: float = 1e-4
    learning_rate: float = 0.1  # for the effective learning rates


PRESETS = {
    "smoke": Config(seeds=2, model="mlp", network="f8 f8 f10"),
    "quick": Config(),
    "standard": Config(
        seeds=5, dataset="fashion_mnist", image_size=14, blocks=3, width=1.0, batch_size=128
    ),
}


def create_model(config: Config, arm: str, num_classes: int) -> Any:
    """The model of an arm, with BN behind every hidden kernel or without any."""
    norm = functools.partial(BatchNorm, epsilon=config.epsilon) if arm == "BN" else None
    if config.model in _SPECS:
        network = config.network or _SPECS[config.model]
        if num_logits(network) != num_classes:
            raise ValueError(
                f"network {network!r} has {num_logits(network)} logits: {config.dataset} has "
                f"{num_classes} classes"
            )
        placement: Any = "none" if norm is None else "hidden"
        return (CNN if config.model == "cnn" else MLP)(network, norm, placement)
    if config.model == "inception":
        return Inception(num_classes, norm, width=config.width)
    return ResNet(
        (config.blocks,) * 3,
        num_classes,
        max(1, round(_RESNET_WIDTH * config.width)),
        norm,
        preactivation=config.model == "preactivation_resnet",
    )


def prepare(config: Config) -> Images:
    """Checks the config and loads a batch of training images, standardized."""
    if config.model not in MODELS:
        raise ValueError(f"model={config.model!r} is unknown: allowed are {', '.join(MODELS)}")
    if config.network and config.model not in _SPECS:
        raise ValueError(
            f"network={config.network!r} is the spec of cnn and mlp: {config.model} has blocks "
            "and width"
        )
    for name, least in (("seeds", 1), ("blocks", 1), ("batch_size", 2)):
        if getattr(config, name) < least:
            raise ValueError(
                f"{name}={getattr(config, name)} is not allowed: at least {least} is needed"
            )
    for name in ("width", "epsilon", "learning_rate"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name}={getattr(config, name)} is not allowed: it must be positive")
    if not 0 < config.tolerance < 1:
        raise ValueError(
            f"tolerance={config.tolerance} is not allowed: it must lie between 0 and 1"
        )
    size = config.image_size or (SMALLEST if config.model == "inception" else 0)
    images = load_images(
        config.dataset,
        data_dir=config.data_dir,
        manual_dir=config.manual_dir,
        scale="standardized",
        size=size,
        limit=config.batch_size,
    )
    if len(images.train.label) < config.batch_size:
        raise ValueError(
            f"batch_size={config.batch_size} is not allowed: {config.dataset} has only "
            f"{len(images.train.label)} training examples"
        )
    for arm in ARMS:
        model = create_model(config, arm, images.num_classes)
        init = functools.partial(model.init, train=False)
        jax.eval_shape(init, jax.random.key(0), images.train.image[:1])
    return images


# --- measurements ---


def measure(config: Config, data: Images, arm: str, seed: int) -> dict[str, Any]:
    """Record of an audit: the rows, the groups, and the paths that BN comes after."""
    model = create_model(config, arm, data.num_classes)
    image, label = data.train.image, data.train.label
    init = functools.partial(model.init, train=False)
    create = jax.jit(init, compiler_options=compiler_options(0))
    variables = create(jax.random.key(seed), image[:1])

    def forward(params):
        given = {**variables, "params": params}
        return model.apply(given, image, train=True, mutable=["batch_stats"])

    def loss_fn(params):
        logits, _ = forward(params)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    def batch_stats(params):
        return forward(params)[1].get("batch_stats", {})

    found = audit(loss_fn, variables["params"], tolerance=config.tolerance)
    return {
        "rows": [dataclasses.asdict(row) for row in found.values()],
        "groups": found.groups,
        "loss": found.loss,
        "scales": found.scales,
        "normalized": leaves_seen_by(batch_stats, variables["params"]),
    }


def leaves_seen_by(outputs_fn: Callable[[Any], Any], params: Any) -> list[str]:
    """Paths of the leaves of params that some output of a function depends on.

    Each leaf in turn is replaced by random numbers, all in one compiled program.
    """
    named, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in named]
    rng = np.random.default_rng(0)
    random = [rng.standard_normal(leaf.shape).astype(leaf.dtype) for leaf in leaves]

    @jax.jit
    def outputs():
        def replaced(chosen):
            mixed = [
                jnp.where(chosen == i, r, leaf)
                for i, (leaf, r) in enumerate(zip(leaves, random, strict=True))
            ]
            return outputs_fn(jax.tree.unflatten(treedef, mixed))

        return jax.lax.map(replaced, jnp.arange(-1, len(leaves)))

    seen = np.zeros(len(leaves), bool)
    for output in jax.tree.leaves(jax.device_get(outputs())):
        rows = output.reshape(len(output), -1)
        seen |= np.any(rows[1:] != rows[0], axis=1)
    return [jax.tree_util.keystr(path) for (path, _), at in zip(named, seen, strict=True) if at]


def restored(config: Config, record: Mapping[str, Any]) -> Audit:
    """The audit of a record."""
    rows = [
        Row(**{**row, "degree": math.nan if row["degree"] is None else row["degree"]})
        for row in record["rows"]
    ]
    return Audit(
        rows,
        [tuple(group) for group in record["groups"]],
        loss=record["loss"],
        scales=record["scales"],
        tolerance=config.tolerance,
    )


# --- what it says ---


def why(found: Audit, normalized: Sequence[str], path: str) -> str:
    """A key of WHY.

    Args:
      found: the audit.
      normalized: paths of the leaves that BN comes after.
      path: of the leaf.
    """
    row = found[path]
    if row.kind == "invariant":
        return "invariant"
    if row.kind == "no effect":
        return "no effect" if path in normalized else "unused"
    if any(path in group for group in found.groups):
        return "group"
    if path in normalized:
        return "around"
    if not normalized:
        return "nothing"
    # What no BN comes after is the head's, or the last BN's own.
    if path.endswith("['kernel']"):
        return "kernel"
    norm = path.rpartition("[")[0] + "['scale']" in found
    return "last" if norm else "bias"


def explained(found: Audit, normalized: Sequence[str]) -> str:
    """Every reason with the parameters it holds for, as text for a terminal."""
    chosen: dict[str, list[str]] = {key: [] for key in WHY}
    for path in found:
        chosen[why(found, normalized, path)].append(path)
    lines = []
    for key, paths in chosen.items():
        if not paths:
            continue
        more = f", and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
        lines.append(f"{len(paths)} {WHY[key]}:")
        lines.append(f"    {', '.join(paths[:_LISTED])}{more}")
    return "\n".join(lines)


def judge(config: Config, records: Mapping[str, Sequence[Mapping[str, Any]]]) -> Finding:
    """bn-makes-kernels-invariant."""
    before = alone = together = after = wrong = 0
    for record in records["BN"]:
        found = restored(config, record)
        grouped = {path for group in found.groups for path in group}
        for path, row in found.items():
            invariant = row.kind == "invariant"
            if path not in record["normalized"]:
                after += 1
                wrong += invariant or path in grouped
            elif path.endswith("['kernel']"):
                before += 1
                alone += invariant
                together += not invariant and path in grouped
    plain = [restored(config, record) for record in records["no BN"]]
    total = sum(map(len, plain))
    control = sum(
        sum(row.kind == "invariant" for row in found.values()) + len(found.groups)
        for found in plain
    )
    if alone + together == before > 0 and wrong == control == 0:
        verdict = REPRODUCED
    elif 2 * (alone + together) < before or 2 * wrong > after or 2 * control > total:
        verdict = NOT_REPRODUCED
    else:
        verdict = INCONCLUSIVE
    return Finding(
        CLAIMS[0],
        {
            "kernels with BN after them": before,
            "of them, invariant alone": alone,
            "of them, only in a group": together,
            "parameters without BN after them": after,
            "of them, invariant": wrong,
            "parameters without any BN": total,
            "of them, invariant, no BN": control,
        },
        None,
        verdict,
        note=f"numbers of parameters of {config.model}, over all {config.seeds} seeds",
    )


def run(config: Config, data: Images, path: Path):
    """Audits what is not yet in the workdir, explains the first seed, decides, and draws."""
    ledger = Ledger(path / "metrics.jsonl")
    plan = list(itertools.product(ARMS, range(config.seeds)))
    records: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    with Preemption() as preemption, tqdm(total=len(plan), unit="audit", dynamic_ncols=True) as bar:
        for number, (arm, seed) in enumerate(plan, start=1):
            name = f"{arm} seed={seed}"
            bar.set_description(name)
            records[arm].append(
                ledger.get(name, functools.partial(measure, config, data, arm, seed))
            )
            bar.update()
            if preemption.requested(number):
                raise Stopped(number)
    texts, figures = [], []
    for arm in ARMS:
        record = records[arm][0]
        found = restored(config, record)
        reasons = explained(found, record["normalized"])
        texts.append(f"{config.model}, {arm}\n\n{found.table(config.learning_rate)}\n\n{reasons}\n")
        file = path / "figures" / f"audit_{arm.lower().replace(' ', '_')}.png"
        figure = found.figure(file, config.learning_rate)
        title = f"{figure.title}: {config.model}, {arm}"
        figures.append(dataclasses.replace(figure, title=title, claims=(CLAIMS[0].id,)))
    atomic.write_bytes(path / "audit.txt", "\n".join(texts).encode())
    print(texts[0])
    return [judge(config, records)], figures


EXPERIMENT = Experiment(
    __name__,
    title="Which weights of a network are scale-invariant?",
    presets=PRESETS,
)
