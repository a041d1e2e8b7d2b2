"""From a source to batches, for any kind of data: the order of the images, sharding, resuming and caching.

What batch k holds is a function of (seed, batch size, k) alone: the order of the images and the random
numbers of every row are drawn for the *global* batch, and a process then reads only its own rows. The same
run on one process or eight, with worker processes or without, resumed or not, sees the same images. (The rows
of the array that several processes make of them are in the order of the mesh's devices.)
"""

import numbers
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict

import numpy as np

from repopt_jax.arguments import check_count, check_kind
from repopt_jax.data.dataset import AnnotatedSource, Source, check_source
from repopt_jax.data.rng import RowRng, batch_rng

if TYPE_CHECKING:  # imports Grain, which takes a second
    from repopt_jax.data.batches import Batches

Cache = Literal["auto"] | bool
# With `cache="auto"` the images of a split are kept in memory if they take no more than this, fitted, as
# uint8.
CACHE_BYTES = 512 * 2**20
# `limit` takes the first images of this fixed order, which does not depend on the seed of the run.
LIMIT_SEED = 20480


class Options(TypedDict, total=False):
    """Keyword arguments of `train_batches`, `eval_batches` and their like; `train_batches` describes them."""

    process_index: int
    process_count: int
    limit: int | None
    workers: int
    prefetch: int
    cache: Cache


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How batches are divided among processes and read: `batch_size` and `Options`, checked.

    Raises:
      ValueError: numbers that are too small or do not fit together; it lists all problems.
    """

    batch_size: int
    process_index: int = 0
    process_count: int = 1
    limit: int | None = None
    workers: int = 0
    prefetch: int = 2
    cache: Cache = "auto"

    def __post_init__(self) -> None:
        problems = [
            f"`{name}` is {getattr(self, name)}; it must be at least {least}"
            for name, least in (("batch_size", 1), ("process_count", 1), ("workers", 0), ("prefetch", 0))
            if getattr(self, name) < least
        ]
        if not problems and not 0 <= self.process_index < self.process_count:
            problems.append(
                f"`process_index` is {self.process_index}; it must be in [0, {self.process_count})"
            )
        if not problems and self.batch_size % self.process_count:
            problems.append(
                f"`batch_size` {self.batch_size} is not divisible by {self.process_count} processes"
            )
        if self.cache not in ("auto", True, False):
            problems.append(f"`cache` is {self.cache!r}; it must be 'auto', True or False")
        if problems:
            raise ValueError(", and ".join(problems))

    @property
    def rows(self) -> int:
        """Number of rows of a batch that each process reads."""
        return self.batch_size // self.process_count

    @property
    def local(self) -> slice:
        """Which rows of a batch this process reads."""
        return slice(self.process_index * self.rows, (self.process_index + 1) * self.rows)


class Reader(Protocol):
    """Reads rows of one split: (rows, their random numbers) -> arrays, an element for each row, images first.

    Without random numbers what it gives is a plain function of the row, so that it can be cached.

    Attributes:
      split: "train" or "eval".
      size: side of the images that it gives.
      cache_key: together with the split, all that decides what it gives without random numbers.
      needs_whole_images: the setting of the transform, if any, that cuts another part out of an image each
        time, so that nothing can be cached.
    """

    split: str
    size: int
    needs_whole_images: str | None

    @property
    def cache_key(self) -> Hashable: ...

    def __call__(self, rows: np.ndarray, rng: RowRng | None) -> tuple[np.ndarray, ...]: ...


def endless_batches(
    source: Any,
    transform: Any,
    reader: Reader,
    finish: Callable[[tuple[np.ndarray, ...], RowRng], dict[str, np.ndarray]],
    *,
    seed: int,
    sharding: Sharding,
) -> "Batches":
    """Makes training batches as `train_batches` documents them, for any source and kind of batch.

    Args:
      source: its `info` has `num_train` and `channels`.
      transform: has `check_channels`.
      reader: reads the `train` split.
      finish: (arrays of `reader`, random numbers of the rows) -> batch.
      seed: of the order and the augmentation.
      sharding: batch size, processes, workers.
    """
    import grain

    from repopt_jax.data.batches import Batches

    transform.check_channels(source.info.channels)
    if not 0 <= seed < 2**32:
        raise ValueError(f"`seed` is {seed}; it must be in [0, 2**32)")
    batch_size, local = sharding.batch_size, sharding.local
    steps = steps_per_epoch(source, batch_size, limit=sharding.limit)
    used = subset(source.info.num_train, sharding.limit, "train")
    read = cached(reader, source, sharding)
    order = grain.MapDataset.range(len(used)).seed(seed).shuffle()

    def make(index: int, _: int) -> dict[str, np.ndarray]:
        # Random numbers are drawn for the whole batch, which is quick. In the order of the epoch only the
        # rows of this process are looked up: each takes Grain 20 microseconds.
        epoch, batch = divmod(index, steps)
        first = epoch * len(used) + batch * batch_size
        rows = np.array([order[first + row] for row in range(local.start, local.stop)])
        rng = batch_rng(seed, index, batch_size).rows(local)
        return finish(read(used[rows], rng), rng)

    # The index counts on from one epoch to the next.
    batches = grain.MapDataset.range(steps).repeat().map_with_index(make)
    return Batches(batches, workers=sharding.workers, prefetch=sharding.prefetch)


def one_epoch(
    source: Any,
    transform: Any,
    reader: Reader,
    finish: Callable[[tuple[np.ndarray, ...], np.ndarray], dict[str, np.ndarray]],
    *,
    sharding: Sharding,
) -> "Batches":
    """Makes evaluation batches as `eval_batches` documents them, for any source and kind of batch.

    Args:
      source: its `info` has `num_eval` and `channels`.
      transform: has `check_channels`.
      reader: reads the `eval` split.
      finish: (arrays of `reader`, the rows of the split) -> batch of `sharding.rows` rows, of which the first
        len(rows) are those and the others padding.
      sharding: batch size, processes, workers.
    """
    import grain

    from repopt_jax.data.batches import Batches

    transform.check_channels(source.info.channels)
    used = subset(source.info.num_eval, sharding.limit, "eval")
    read = cached(reader, source, sharding)

    def make(batch: int) -> dict[str, np.ndarray]:
        rows = used[batch * sharding.batch_size : (batch + 1) * sharding.batch_size][sharding.local]
        mask = (np.arange(sharding.rows) < len(rows)).astype(np.float32)
        return {**finish(read(rows, None), rows), "mask": mask}

    steps = eval_steps(source, sharding.batch_size, limit=sharding.limit)
    batches = grain.MapDataset.range(steps).map(make)
    return Batches(batches, workers=sharding.workers, prefetch=sharding.prefetch)


def steps_per_epoch(source: Source | AnnotatedSource, batch_size: int, *, limit: int | None = None) -> int:
    """Number of training batches in an epoch.

    Raises:
      ValueError: not even one batch, or a `limit` that the source does not have.
    """
    check_source(source)
    check_kind("batch_size", batch_size, numbers.Integral, "a whole number")
    count = len(subset(source.info.num_train, limit, "train"))
    if not 1 <= batch_size <= count:
        raise ValueError(f"`batch_size` is {batch_size}; it must be in [1, {count}], the images of an epoch")
    return count // batch_size


def eval_steps(source: Source | AnnotatedSource, batch_size: int, *, limit: int | None = None) -> int:
    """Number of batches that `eval_batches` gives, the padded one included."""
    check_source(source)
    check_count("batch_size", batch_size)
    return -(-len(subset(source.info.num_eval, limit, "eval")) // batch_size)


def subset(count: int, limit: int | None, split: str) -> np.ndarray:
    """The images of a split that are used: all, or the first `limit` in an order that mixes the classes.

    Raises:
      ValueError: `limit` is not in [1, count].
    """
    if limit is None:
        return np.arange(count)
    if not 1 <= limit <= count:
        raise ValueError(
            f"`limit` is {limit}, but the {split} split has {count} images; it must be in [1, {count}] "
            f"(--config.data.{split}_limit)"
        )
    return np.random.default_rng(LIMIT_SEED).permutation(count)[:limit]


def pad_rows(array: np.ndarray, count: int, value: int = 0) -> np.ndarray:
    """Appends rows of `value` to `array` until it has `count` rows."""
    missing = np.full((count - len(array), *array.shape[1:]), value, array.dtype)
    return np.concatenate([array, missing]) if len(missing) else array


def check_image(image: np.ndarray, channels: int, row: int) -> None:
    """Raises ValueError if an image of a split is not uint8 (height, width, `channels`)."""
    if image.ndim != 3 or image.shape[-1] != channels or image.dtype != np.uint8:
        raise ValueError(
            f"image {row} is {image.dtype} {image.shape}; it must be uint8 (height, width, {channels})"
        )


# -- caching ---------------------------------------------------------------------------------------


def cached(
    reader: Reader, source: Any, sharding: Sharding
) -> Callable[[np.ndarray, RowRng | None], tuple[np.ndarray, ...]]:
    """`reader`, or one that keeps in `source.cache` what it has read; see `train_batches` for the rule.

    Raises:
      ValueError: `sharding.cache` is True where images cannot be cached.
    """
    setting, workers, cache = reader.needs_whole_images, sharding.workers, sharding.cache
    if cache is True and (setting or workers):
        reason = f"`{setting}`, which needs whole images" if setting else f"{workers} worker processes"
        raise ValueError(f"`cache` is True, but images cannot be cached with {reason}; use 'auto'")
    info, count = source.info, len(getattr(source, reader.split))
    if cache == "auto":
        fits = count * reader.size**2 * info.channels <= CACHE_BYTES
        cache = fits and not setting and not workers
    if not cache:
        return reader
    key = reader.split, reader.cache_key
    if key not in source.cache:
        source.cache[key] = CachedReader(reader, count)
    return source.cache[key]


class CachedReader:
    """Reads a row the first time it is asked for, and keeps it in memory."""

    def __init__(self, reader: Reader, count: int):
        self.reader = reader
        # Untouched until they are written, so that only rows that are read take real memory.
        empty = reader(np.zeros(0, int), None)
        self.arrays: tuple[np.ndarray, ...] = tuple(
            np.empty((count, *array.shape[1:]), array.dtype) for array in empty
        )
        self.present: np.ndarray = np.zeros(count, bool)

    def __call__(self, rows: np.ndarray, rng: RowRng | None) -> tuple[np.ndarray, ...]:
        missing = rows[~self.present[rows]]
        if len(missing):
            # Two threads may decode the same image: they write the same bytes, and `present` last.
            for array, read in zip(self.arrays, self.reader(missing, None), strict=True):
                array[missing] = read
            self.present[missing] = True
        return tuple(array[rows] for array in self.arrays)
