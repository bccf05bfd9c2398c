"""Augmented images per second of a CPU core (python -m benchmarks.input_pipeline).

Sets are written on the spot, smooth pictures with noise: 32x32 as PNG under the name of tfds's
cifar10, the same pixels as raw bytes, and JPEGs of about 500x375 under the name of its
imagenet2012. 32x32 are padded, cropped and flipped, JPEGs get GoogLeNet's crops to 224x224, a flip
and Howard's distortions. Programs take turns of a second, in a new order every round; what they
give per second of CPU time counts the time of this process and of its workers. Batches have 128
images of 32x32, or 32 photographs.

The second table is the time of each part by itself, for an image of 32x32.
"""

import argparse
import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from bn_research.claims import atomic
from bn_research.data import Examples, data_source, training_batches
from bn_research.data.augment import Transform, cifar_augmentation, imagenet_augmentation
from bn_research.data.builders import _ImageBuilder
from bn_research.data.quiet import quiet
from bn_research.data.records import RecordDecoder, as_array

TABLE = Path(__file__).parents[1] / "docs" / "benchmarks" / "input_pipeline.md"
ROUNDS = 9
SECONDS = 1.0  # of a turn
SMALL, LARGE = 10_000, 400  # images of a set
WORKERS = (0, 1, 2)


class Set(NamedTuple):
    """A set on disk, and how its images are augmented."""

    builder: tfds.core.DatasetBuilder
    transform: Transform
    batch_size: int


class Rates(NamedTuple):
    """Images per second, one figure a round."""

    cpu: list[float]
    wall: list[float]


def picture(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Smooth colors with a little noise."""
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    noisy = smooth + rng.integers(-6, 7, (height, width, 1))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str) -> io.BytesIO:
    """A file of the image, at its start."""
    file = io.BytesIO()
    image.save(file, kind, quality=90)
    file.seek(0)
    return file


def write_tfds_set(name: str, data_dir: str, files: list[io.BytesIO]) -> Any:
    """Write files under tfds's own name and version; without TensorFlow."""
    own = tfds.builder_cls(name)

    class Small(own, skip_registration=True):  # type: ignore[misc, valid-type, call-arg]
        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for key, file in enumerate(files):
                example = {"image": file, "label": key % 10}
                yield key, {k: example.get(k, str(key)) for k in self.info.features}

    Small.name = own.name
    builder = Small(data_dir=data_dir, file_format="array_record")
    with quiet():
        builder.download_and_prepare()
    return builder


class Raw(_ImageBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Pixels as they are."""

    DESCRIPTION = "Pixels as they are."
    IMAGE_SHAPE = (32, 32, 3)
    CLASS_NAMES = tuple("0123456789")
    images: np.ndarray

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        label = np.arange(len(self.images)) % 10
        return {"train": self._generate_examples(self.images, label)}


def make_sets(data_dir: str) -> dict[str, Set]:
    """All three."""
    rng = np.random.default_rng(0)
    small = [picture(rng, 32, 32) for _ in range(SMALL)]
    large = [
        encoded(picture(rng, *(int(side) for side in rng.integers((330, 450), (420, 550)))), "jpeg")
        for _ in range(LARGE)
    ]
    Raw.images = np.stack([np.asarray(image) for image in small])
    raw = Raw(data_dir=data_dir)
    with quiet():
        raw.download_and_prepare()
    png = write_tfds_set("cifar10", data_dir, [encoded(image, "png") for image in small])
    jpeg = write_tfds_set("imagenet2012", data_dir, large)
    return {
        "32×32, PNG": Set(png, cifar_augmentation(), 128),
        "32×32, raw": Set(raw, cifar_augmentation(), 128),
        "JPEG to 224×224": Set(jpeg, imagenet_augmentation(224), 32),
    }


def by_tfds(one: Set, *, augmented: bool) -> Iterator[Examples]:
    """Batches of what as_data_source gives for shuffled indices."""
    source = data_source(one.builder, "train")
    rng = np.random.default_rng(0)
    while True:
        images = []
        labels = np.empty(one.batch_size, np.int32)
        for i, index in enumerate(rng.integers(len(source), size=one.batch_size)):
            record = source[int(index)]
            image, labels[i] = record["image"], record["label"]
            images.append(as_array(one.transform(image, rng)) if augmented else image)
        yield Examples(np.stack(images) if augmented else images[0], labels)


def cpu_seconds() -> float:
    """Of this process and its living workers."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # in user and in kernel mode
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def settle() -> None:
    """Wait until the streams of others have filled their buffers."""
    before = -1.0
    while cpu_seconds() > before + 0.015:
        before = cpu_seconds()
        time.sleep(0.1)


def turn(batches: Iterator[Any], ahead: int, seconds: float) -> tuple[float, float]:
    """Images per second of CPU time and of the clock, once `ahead` batches are used up."""
    settle()
    for _ in range(ahead):
        next(batches)
    images, start, cpu = 0, time.perf_counter(), cpu_seconds()
    while time.perf_counter() < start + seconds:
        batch = next(batches)
        images += len(batch.label)
    return images / (cpu_seconds() - cpu), images / (time.perf_counter() - start)


def measure(one: Set, rounds: int, seconds: float) -> dict[str, Rates]:
    """Rates of every program."""
    with ExitStack() as stack, quiet():
        programs: dict[str, tuple[Iterator[Any], int]] = {
            "tfds, decoded": (by_tfds(one, augmented=False), 1),
            "tfds, decoded and augmented": (by_tfds(one, augmented=True), 1),
        }
        for workers in WORKERS:
            stream = training_batches(
                one.builder,
                "train",
                batch_size=one.batch_size,
                seed=0,
                transform=one.transform,
                num_workers=workers,
            )
            name = f"bn_research, {workers or 'no'} worker{'s' * (workers != 1)}"
            programs[name] = stack.enter_context(stream), 4 * max(workers, 1)
        for batches, ahead in programs.values():
            turn(batches, ahead, 0.1)
        rates = {name: Rates([], []) for name in programs}
        order = list(programs)
        for _ in range(rounds):
            random.shuffle(order)
            for name in order:
                for figures, figure in zip(
                    rates[name], turn(*programs[name], seconds), strict=True
                ):
                    figures.append(figure)
    return rates


def parts(sets: dict[str, Set], rounds: int) -> dict[str, list[float]]:
    """Microseconds of CPU time per image of each part, one figure a round."""
    count, batch_size = 1024, 128
    png, raw = sets["32×32, PNG"], sets["32×32, raw"]
    rng = np.random.default_rng(0)
    order = rng.permutation(SMALL)[:count].tolist()
    records, sources = {}, {}
    for name, one in (("PNG", png), ("raw", raw)):
        sources[name] = data_source(one.builder, "train", serialized=True).data_source  # type: ignore[attr-defined]
        records[name] = sources[name].__getitems__(order)
    features = {"PNG": png.builder.info.features, "raw": raw.builder.info.features}
    decoders = {"PNG": RecordDecoder.of(png.builder), "raw": RecordDecoder.of(raw.builder)}
    stored = {k: [decoders[k].parse(record)[0] for record in records[k]] for k in records}
    images = [np.asarray(decoders["raw"].image(data)) for data in stored["raw"]]
    steps: dict[str, Callable[[], Any]] = {
        "read a record, one by one": lambda: [sources["PNG"][i] for i in order],
        f"read a record, {batch_size} at once": lambda: [
            sources["PNG"].__getitems__(order[start : start + batch_size])
            for start in range(0, count, batch_size)
        ],
        "tfds: parse and decode, PNG": lambda: [
            features["PNG"].deserialize_example_np(record) for record in records["PNG"]
        ],
        "tfds: parse and decode, raw": lambda: [
            features["raw"].deserialize_example_np(record) for record in records["raw"]
        ],
        "bn_research: parse": lambda: [decoders["PNG"].parse(record) for record in records["PNG"]],
        "bn_research: decode, PNG": lambda: [decoders["PNG"].image(data) for data in stored["PNG"]],
        "bn_research: decode, raw": lambda: [decoders["raw"].image(data) for data in stored["raw"]],
        "a random generator": lambda: [np.random.default_rng((0, 1, i)) for i in range(count)],
        "augment": lambda: [raw.transform(image, rng) for image in images],
    }
    with quiet():
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name in random.sample(list(steps), len(steps)):
                start = time.process_time()
                steps[name]()
                times[name].append((time.process_time() - start) / count * 1e6)
    return times


def versions() -> str:
    """Versions of the libraries, for the line below the tables."""
    packages = ("grain", "tensorflow-datasets", "array_record", "pillow", "numpy")
    found = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    return ", ".join([*found, platform.machine()])


def quartiles(figures: list[float]) -> str:
    """Median and quartiles, as text."""
    low, middle, high = np.quantile(figures, (0.25, 0.5, 0.75))
    return f"{middle:,.0f} [{low:,.0f}, {high:,.0f}]"


def markdown(measured: dict[str, dict[str, Rates]], times: dict[str, list[float]]) -> str:
    """Programs as rows, sets as columns; then the parts."""
    lines = ["| images per second of CPU time | " + " | ".join(measured) + " |"]
    lines.append("|---" * (len(measured) + 1) + "|")
    for name in next(iter(measured.values())):
        cells = [
            f"{quartiles(rates[name].cpu)}; {np.median(rates[name].wall):,.0f} by the clock"
            for rates in measured.values()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| part, of a 32×32 image | µs of CPU time |", "|---|---|"]
    lines += [f"| {name} | {quartiles(figures)} |" for name, figures in times.items()]
    return "\n".join(lines)


def main() -> None:
    """Prints the tables; --write keeps them for the README."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of every program")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a turn")
    parser.add_argument("--json", action="store_true", help="print every figure")
    parser.add_argument("--write", action="store_true", help=f"also write {TABLE.name}")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as data_dir:
        sets = make_sets(data_dir)
        measured = {
            name: measure(one, arguments.rounds, arguments.seconds) for name, one in sets.items()
        }
        times = parts(sets, arguments.rounds)
    if arguments.json:
        rates = {s: {k: r._asdict() for k, r in found.items()} for s, found in measured.items()}
        print(json.dumps({"images per second": rates, "µs of CPU time per image": times}))
        return
    text = (
        f"{markdown(measured, times)}\n\nMeasured with `python -m benchmarks.input_pipeline`: "
        f"medians with quartiles, {os.cpu_count()} cores; {versions()}."
    )
    print(text)
    if arguments.write:
        atomic.write_bytes(TABLE, f"{text}\n".encode())


if __name__ == "__main__":
    main()
