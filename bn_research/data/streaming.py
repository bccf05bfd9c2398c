"""Sets that do not fit the device: batches that are read, decoded and augmented as they are needed.

The stream is a function of a step: step t of a training stream holds the positions t B ... t B +
B - 1 of an endless sequence of examples, epoch after epoch, each a new permutation of the whole
split; a batch may span two epochs, and nothing is dropped. An example's augmentation draws from a
generator of its own, seeded by (seed, position). So a batch depends on the seed and the step alone,
not on how many processes or workers make it, and a stream opens at any step without replay: a
checkpoint that holds the step holds the position.

grain calls that function ahead of time, in threads or worker processes, and keeps the order. Its
own `shuffle` is not used: its permutations of successive epochs are correlated (by 0.09 for 50,000
examples, 20 standard deviations of what chance gives).
"""

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np

from bn_research.data.augment import AnyImage, Transform
from bn_research.data.datasets import data_source
from bn_research.data.errors import DataError
from bn_research.data.in_memory import Examples
from bn_research.data.quiet import quiet
from bn_research.data.records import RecordDecoder, stack

if TYPE_CHECKING:  # grain imports JAX, a second
    import tensorflow_datasets as tfds

_ORDER, _AUGMENTATION = 0, 1  # keep the generators of the two apart
_THREADS = 1  # without workers; more get in each other's way, and cost CPU time
_AHEAD = 2  # batches that this thread makes before they are asked for


class MaskedExamples(NamedTuple):
    """Rows of an evaluation batch."""

    image: np.ndarray  # uint8 [rows, height, width, channels]
    label: np.ndarray  # int32 [rows]
    where: np.ndarray  # bool [rows]: False marks padding


T = TypeVar("T", Examples, MaskedExamples)


class Batches(Iterator[T], contextlib.AbstractContextManager["Batches[T]"], Generic[T]):
    """An iterator over batches; `close` it, or leave its `with` block, to end its workers."""

    def __init__(self, dataset: Any, count: int, folder: str) -> None:
        """Start to make the `count` batches of a grain dataset, of the records in `folder`."""
        self._left = count
        self._folder = folder
        self._iterators = [iter(dataset)]  # none when closed
        self._iterators[0].start_prefetch()
        # On close, when this is collected, or at exit; there before multiprocessing ends the
        # thread that frees the memory shared with workers.
        self._finalizer = Finalize(self, _close, (self._iterators,), exitpriority=100)

    def __next__(self) -> T:
        """Return the next batch; after the last, close.

        Raises:
          DataError: a record is damaged, or a worker process was lost.
          ValueError: the stream is closed.
        """
        if not self._left:
            self.close()
            raise StopIteration
        if not self._iterators:
            raise ValueError("the stream of batches is closed")
        self._left -= 1
        try:
            return next(self._iterators[0])
        except RuntimeError as error:
            if "Worker process" not in str(error):
                raise
            why = str(error).split(".")[0]
            raise DataError(
                f"a worker that reads {self._folder} was lost ({why}); the memory of this machine "
                "or of its /dev/shm may be too small: give fewer workers"
            ) from error

    def close(self) -> None:
        """End the threads and worker processes; a second time does nothing."""
        self._finalizer()

    def __exit__(self, *exception: object) -> None:
        self.close()


def _close(iterators: list[Any]) -> None:
    # Emptied: at the end of the program grain's iterator would close itself again, too late.
    iterators.pop().close()
    # A thread frees the memory that was shared with workers; wait until it has.
    from grain.multiprocessing import SharedMemoryArray

    if pool := getattr(SharedMemoryArray, "_del_thread_pool", None):
        pool.apply(int)


def training_batches(
    builder: "tfds.core.DatasetBuilder",
    split: str,
    *,
    batch_size: int,
    seed: int,
    transform: Transform | None = None,
    process_index: int = 0,
    process_count: int = 1,
    start_step: int = 0,
    num_workers: int = 0,
) -> Batches[Examples]:
    """Open the endless stream of a split, shuffled anew each epoch, at a step.

    Args:
      builder: from `datasets.prepare`.
      split: "train", or a slice such as "train[:80%]".
      batch_size: examples of a step over all processes; process p gets its rows
        [p batch_size / process_count, (p + 1) batch_size / process_count).
      seed: of the order and the augmentation.
      transform: (image, generator) -> image, see `augment`; can be pickled. Must make images
        equal in shape where they are not. None leaves them as they are.
      process_index: which process this is.
      process_count: how many share a batch.
      start_step: number of the first batch.
      num_workers: processes that make the batches, the same ones however many; 0 makes them in
        a thread of this process. A worker takes seconds to start, and up to four batches of
        /dev/shm.

    Returns:
      Examples, image uint8 [rows, height, width, channels] and label int32 [rows].

    Raises:
      DataError: there is no such split, or it is empty.
      ValueError: an argument out of range.
    """
    for name, value in (("seed", seed), ("start_step", start_step)):
        if value < 0:
            raise ValueError(f"{name} is {value}; allowed: an integer of at least 0")
    rows = _rows(batch_size, process_index, process_count)
    reader = _Reader.open(builder, split)
    make = _TrainingBatch(reader, rows, batch_size, seed, transform)
    return _open(make, range(start_step, sys.maxsize), num_workers, reader.folder)


def evaluation_batches(
    builder: "tfds.core.DatasetBuilder",
    split: str,
    *,
    batch_size: int,
    transform: Callable[[AnyImage], AnyImage] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
) -> Batches[MaskedExamples]:
    """Open a split once, in order, padded with zeros so that all processes get equal batches.

    Args:
      builder: from `datasets.prepare`.
      split: "test" (of imagenet2012 "validation"), or a slice of it.
      batch_size: examples of a step over all processes, divided as in `training_batches`.
      transform: image -> image; otherwise as in `training_batches`.
      process_index: which process this is.
      process_count: how many share a batch.
      num_workers: as in `training_batches`.

    Returns:
      ceil(examples / batch_size) times MaskedExamples, whose `where` is False on padding.

    Raises:
      DataError: there is no such split, or it is empty.
      ValueError: an argument out of range.
    """
    rows = _rows(batch_size, process_index, process_count)
    reader = _Reader.open(builder, split)
    make = _EvaluationBatch(reader, rows, batch_size, transform)
    return _open(make, range(-(-len(reader.source) // batch_size)), num_workers, reader.folder)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Records by index."""

    source: Sequence[bytes]
    decoder: RecordDecoder
    folder: str

    @classmethod
    def open(cls, builder: "tfds.core.DatasetBuilder", split: str) -> "_Reader":
        # array_record's own source, without tfds around it: a worker needs no builder.
        source = data_source(builder, split, serialized=True).data_source  # type: ignore[attr-defined]
        return cls(source, RecordDecoder.of(builder), str(builder.data_dir))

    def __call__(
        self, indices: list[int], length: int, transform: Callable[[int, AnyImage], AnyImage]
    ) -> Examples:
        """Read examples; transform(i, image) is called of the i-th; zeros up to `length`."""
        label = np.zeros(length, np.int32)
        images = []
        with self._damage((Exception,)):  # array_record and protobuf each raise their own
            # All at once: array_record takes four times as long to give them one by one.
            records = self.source.__getitems__(indices)  # type: ignore[attr-defined]
            for i, record in enumerate(records):
                stored, label[i] = self.decoder.parse(record)
                images.append(self.decoder.image(stored))
        # A JPEG is decoded where it is transformed or stacked.
        with self._damage((OSError, SyntaxError)):
            images = [transform(i, image) for i, image in enumerate(images)]
            image = stack(images, length)
        return Examples(image, label)

    @contextlib.contextmanager
    def _damage(self, kinds: tuple[type[Exception], ...]) -> Iterator[None]:
        """Say of an exception of these kinds that the records are damaged."""
        try:
            yield
        except kinds as error:
            raise DataError(
                f"{self.folder} is damaged ({type(error).__name__}: {error}); move it away or "
                "give another --config.data_dir=DIR"
            ) from error


@dataclasses.dataclass(frozen=True)
class _TrainingBatch:
    """Makes this process's rows of a step."""

    reader: _Reader
    rows: range
    batch_size: int
    seed: int
    transform: Transform | None

    def __call__(self, step: int) -> Examples:
        positions = [step * self.batch_size + row for row in self.rows]
        count = len(self.reader.source)
        places = [divmod(position, count) for position in positions]
        indices = [int(_permutation(self.seed, epoch, count)[place]) for epoch, place in places]

        def transform(i: int, image: AnyImage) -> AnyImage:
            if self.transform is None:
                return image
            rng = np.random.default_rng((self.seed, _AUGMENTATION, positions[i]))
            return self.transform(image, rng)

        return self.reader(indices, len(positions), transform)


@dataclasses.dataclass(frozen=True)
class _EvaluationBatch:
    """Makes this process's rows of a step, in the order of the records."""

    reader: _Reader
    rows: range
    batch_size: int
    transform: Callable[[AnyImage], AnyImage] | None

    def __call__(self, step: int) -> MaskedExamples:
        count = len(self.reader.source)
        if step * self.batch_size >= count:
            # Made ahead of time and never given out. Were there an end, grain would keep memory
            # shared with workers in the traceback of its StopIteration.
            return MaskedExamples(*(np.zeros(0) for _ in MaskedExamples._fields))
        indices = [step * self.batch_size + row for row in self.rows]
        valid = [index for index in indices if index < count]

        def transform(i: int, image: AnyImage) -> AnyImage:
            return image if self.transform is None else self.transform(image)

        # Where all is padding, an example tells the shape of the zeros.
        image, label = self.reader(valid or [count - 1], len(indices), transform)
        where = np.arange(len(indices)) < len(valid)
        if not valid:
            image[0], label[0] = 0, 0
        return MaskedExamples(image, label, where)


@functools.lru_cache(maxsize=2)  # a batch may span two epochs
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of an epoch."""
    return np.random.default_rng((seed, _ORDER, epoch)).permutation(count)


def _rows(batch_size: int, process_index: int, process_count: int) -> range:
    """The rows of a batch that are this process's."""
    if process_count < 1:
        raise ValueError(f"process_count is {process_count}; allowed: an integer of at least 1")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index is {process_index}; allowed: 0 to {process_count - 1}")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size is {batch_size}; allowed: a positive multiple of the {process_count} "
            "processes"
        )
    share = batch_size // process_count
    return range(process_index * share, (process_index + 1) * share)


def _open(make: Callable[[int], Any], steps: range, num_workers: int, folder: str) -> Batches[Any]:
    """Let grain call `make` of steps, ahead of time and in order: of more than are given out."""
    if num_workers < 0:
        raise ValueError(f"num_workers is {num_workers}; allowed: an integer of at least 0")
    grain = _import_grain()
    dataset = grain.MapDataset.range(steps.start, sys.maxsize).map(make)
    if not num_workers:
        return Batches(
            dataset.to_iter_dataset(
                grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
            ),
            len(steps),
            folder,
        )
    alone = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1)
    in_workers = dataset.to_iter_dataset(alone).mp_prefetch(options, _begin_worker)
    # A thread of this process takes what the workers made, and so starts them at once.
    ahead = grain.experimental.ThreadPrefetchIterDataset(
        in_workers.map(_own), prefetch_buffer_size=1
    )
    return Batches(ahead, len(steps), folder)


def _import_grain() -> Any:
    """Import grain, for programs without command-line flags too."""
    with quiet():
        import grain
    # It asks absl for this flag of its own when it starts workers, and absl tells no flag's value,
    # not even a default, before a command line is parsed: not in a notebook, not in a test.
    flags, name = sys.modules["absl.flags"].FLAGS, "grain_enable_multiprocess_worker_profiling"
    if name in flags and not flags.is_parsed():
        flags[name].present = 1
    return grain


def _own(batch: T) -> T:
    """Copy a batch out of the memory shared with a worker, which is unmapped under its views."""
    return type(batch)(*(np.array(leaf, subok=False) for leaf in batch))


def _begin_worker(index: int, count: int) -> None:
    """Tie a worker's life to its parent's, and to nothing else.

    grain's workers would run on for ever after a parent that was killed. Signals that a terminal
    or a scheduler sends to the whole group are for the parent, which may still want batches.
    """
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
