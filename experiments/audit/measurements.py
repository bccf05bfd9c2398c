"""What `experiments.audit` measures: the audit of a model, and which parameters BN comes after."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import optax

from bn_research.lab.fields import at_most
from bn_research.lab.images import Images, images_of
from bn_research.lab.workdir import Ledger
from bn_research.layers.linen import BatchNorm
from bn_research.models import cnn, inception, mlp, resnet, spec
from bn_research.probes.dependence import leaves_seen_by
from bn_research.probes.scale_invariance import audit
from bn_research.training.compiler import compiler_options
from experiments.audit import Config
from experiments.audit.verdicts import ARMS, Records

_SPECS = {"cnn": cnn.DEFAULT_SPEC, "mlp": mlp.MLP.spec}
_RESNET_WIDTH = 16  # of ResNet-20


def prepare(config: Config) -> Images:
    """A batch of training images, standardized, which both models can take."""
    size = config.image_size or (inception.SMALLEST if config.model == "inception" else 0)
    images = images_of(config, scale="standardized", size=size, limit=config.batch_size)
    at_most(config, len(images.train.label), "the training set", "batch_size")
    for arm in ARMS:
        init = functools.partial(create_model(config, arm, images.num_classes).init, train=False)
        jax.eval_shape(init, jax.random.key(0), images.train.image[:1])
    return images


def measure(config: Config, data: Images, path: Path) -> Records:
    """An audit of each arm for each seed."""
    plan = itertools.product(ARMS, range(config.seeds))
    audits = {f"{arm} seed={s}": functools.partial(_audit, config, data, arm, s) for arm, s in plan}
    records = iter(Ledger(path / "metrics.jsonl").get_all(audits, unit="audit"))
    return {arm: [next(records) for _ in range(config.seeds)] for arm in ARMS}


def create_model(config: Config, arm: str, num_classes: int) -> Any:
    """The model of an arm, with BN behind every hidden kernel or without any."""
    norm = functools.partial(BatchNorm, epsilon=config.epsilon) if arm == "BN" else None
    if config.model in _SPECS:
        network = config.network or _SPECS[config.model]
        if (logits := spec.num_logits(network)) != num_classes:
            raise ValueError(
                f"network {network!r} has {logits} logits: {config.dataset} has {num_classes} "
                "classes"
            )
        placement: Any = "none" if norm is None else "hidden"
        return (cnn.CNN if config.model == "cnn" else mlp.MLP)(network, norm, placement)
    if config.model == "inception":
        return inception.Inception(num_classes, norm, width=config.width)
    return resnet.ResNet(
        (config.blocks,) * 3,
        num_classes,
        max(1, round(_RESNET_WIDTH * config.width)),
        norm,
        preactivation=config.model == "preactivation_resnet",
    )


def _audit(config: Config, data: Images, arm: str, seed: int) -> dict[str, Any]:
    """The rows, the groups, and the paths that BN comes after."""
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
