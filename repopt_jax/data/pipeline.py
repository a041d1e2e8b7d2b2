"""Batches for training and evaluation, read through Grain.

What batch k holds is a function of (seed, batch size, k) alone: the order of the images and the random
numbers of every row are drawn for the *global* batch, and a process then reads only its own rows. The same
run on one process or eight, with worker processes or without, resumed or unbroken, sees the same images. (The
rows of the array that several processes make of them are in the order of the mesh's devices.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np

from repopt_jax.data import chance
from repopt_jax.data.annotated import AnnotatedSource
from repopt_jax.data.chance import Chance
from repopt_jax.data.distortion import distort, erase
from repopt_jax.data.images import Source
from repopt_jax.data.mixing import mix
from repopt_jax.data.reading import Cache, Decoding, ImageDecoding, keeping
from repopt_jax.data.transforms import NUM_DRAWS, Transform, augment, normalise

if TYPE_CHECKING:  # imports Grain, which takes a second
    from repopt_jax.data.batches import Batches

# `limit` takes the first images of this fixed order, which does not depend on the seed of the run.
LIMIT_SEED = 20480


class Options(TypedDict, total=False):
    """Keyword arguments of `train_batches`, `eval_batches` and their like, which describe them."""

    process_index: int
    process_count: int
    limit: int | None
    workers: int
    prefetch: int
    cache: Cache


def train_batches(
    source: Source, transform: Transform, *, batch_size: int, seed: int, **options: Unpack[Options]
) -> "Batches":
    """Training batches without end: each epoch in a new order, without its last partial batch.

    Args:
      source: its `train` split is read.
      transform: fitting, augmentation, normalisation and mixing.
      batch_size: images in a batch, over all processes.
      seed: of the order and the augmentation, in [0, 2**32).
      **options:
        process_index: which `batch_size // process_count` rows of each batch to read. By default 0.
        process_count: processes that share each batch; their rows are disjoint and make it up. By default 1.
        limit: use only this many images, the same whatever the seed. None, the default: all.
        workers: processes that read and decode; 0, the default: threads of this process do. The batches are
          the same.
        prefetch: batches made ahead, by a thread each (with workers: by each worker); 0: made when asked
          for. By default 2.
        cache: keep images in memory, decoded and fitted, once they have been read. "auto", the default:
          where the split's images take at most CACHE_BYTES in all, `transform.area` is not used (it needs
          whole images), and there are no worker processes (each would keep its own). The images live as long
          as `source`.

    Returns:
      An iterable; `iter` of it has `get_state()` and `set_state(state)` (JSON-able, exact). Each element is
      {"image": float32 (batch_size // process_count, size, size, channels), "label": int32 (the same
      batch,)}; where `transform` mixes images also "other", int32 (batch,), the label of the second image
      in the mixture, and "share", float32 (batch,), the share of the first, in [0, 1]. An image that cannot
      be read raises ValueError from `next`, naming it.

    Raises:
      ValueError: sizes, counts or `cache` that do not fit together or the source; an odd number of rows a
        process where images are mixed in pairs.
    """
    sharing = Sharing(batch_size=batch_size, **options)
    if transform.mixes and sharing.rows % 2:
        raise ValueError(
            f"`mixup` and `cutmix` mix images in pairs, but `batch_size` {batch_size} leaves each of "
            f"{sharing.process_count} processes {sharing.rows} rows; it must be an even number"
        )

    def finish(read: tuple[np.ndarray, ...], chance: Chance) -> dict[str, np.ndarray]:
        images, labels = read
        images = augment(images, chance.draws, transform)
        images = distort(images, chance.seeds, transform.randaugment, transform.jitter)
        batch = {"image": normalise(images, transform), "label": labels}
        erase(batch["image"], chance.seeds, transform.erasing)
        return mix(batch, chance.seeds, transform.mixup, transform.cutmix) if transform.mixes else batch

    decode = ImageDecoding(source, "train", transform)
    return training(source, transform, decode, finish, num_draws=NUM_DRAWS, seed=seed, sharing=sharing)


def eval_batches(
    source: Source, transform: Transform, *, batch_size: int, **options: Unpack[Options]
) -> "Batches":
    """The eval split once, every image in exactly one row of one process; `iter` starts it again.

    Arguments and errors are those of `train_batches`. Elements hold "image" and "label", and also "mask",
    float32 (batch,): 1 for an image, 0 for a row that fills up the last batch (black before normalisation,
    label 0). Every process gets the same number of batches.
    """
    sharing = Sharing(batch_size=batch_size, **options)

    def finish(read: tuple[np.ndarray, ...], rows: np.ndarray) -> dict[str, np.ndarray]:
        images, labels = (filled(array, sharing.rows) for array in read)
        return {"image": normalise(images, transform), "label": labels}

    return evaluation(source, transform, ImageDecoding(source, "eval", transform), finish, sharing=sharing)


def steps_per_epoch(source: Source | AnnotatedSource, batch_size: int, *, limit: int | None = None) -> int:
    """Training batches in an epoch.

    Raises:
      ValueError: not even one batch, or a `limit` that the source does not have.
    """
    count = len(subset(source.info.num_train, limit, "train"))
    if not 1 <= batch_size <= count:
        raise ValueError(f"`batch_size` is {batch_size}; it must be in [1, {count}], the images of an epoch")
    return count // batch_size


def eval_steps(source: Source | AnnotatedSource, batch_size: int, *, limit: int | None = None) -> int:
    """Batches that `eval_batches` gives, the padded one included."""
    return -(-len(subset(source.info.num_eval, limit, "eval")) // batch_size)


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How the batches of a source are shared out and read: `batch_size` and `Options`, checked.

    Raises:
      ValueError: numbers that are too small or do not fit together.
    """

    batch_size: int
    process_index: int = 0
    process_count: int = 1
    limit: int | None = None
    workers: int = 0
    prefetch: int = 2
    cache: Cache = "auto"

    def __post_init__(self):
        for name, least in (("batch_size", 1), ("process_count", 1), ("workers", 0), ("prefetch", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"`{name}` is {value}; it must be at least {least}")
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(
                f"`process_index` is {self.process_index}; it must be in [0, {self.process_count})"
            )
        if self.batch_size % self.process_count:
            raise ValueError(
                f"`batch_size` {self.batch_size} is not divisible by {self.process_count} processes"
            )

    @property
    def rows(self) -> int:
        """Rows of a batch that a process has."""
        return self.batch_size // self.process_count

    @property
    def local(self) -> slice:
        """Which rows of a batch this process has."""
        return slice(self.process_index * self.rows, (self.process_index + 1) * self.rows)


def training(
    source: Any,
    transform: Any,
    decode: Decoding,
    finish: Callable[[tuple[np.ndarray, ...], Chance], dict[str, np.ndarray]],
    *,
    num_draws: int,
    seed: int,
    sharing: Sharing,
) -> "Batches":
    """What `train_batches` promises, for any source and kind of batch.

    Args:
      source: its `info` has `num_train` and `channels`.
      transform: has `check_channels`.
      decode: reads its `train` split.
      finish: (what `decode` gave, the rows' random numbers) -> batch.
      num_draws: uniform random numbers that a row needs.
      seed: of the order and the augmentation.
      sharing: batch size, processes, workers.
    """
    import grain

    from repopt_jax.data.batches import Batches

    transform.check_channels(source.info.channels)
    if not 0 <= seed < 2**32:
        raise ValueError(f"`seed` is {seed}; it must be in [0, 2**32)")
    batch_size, local = sharing.batch_size, sharing.local
    steps = steps_per_epoch(source, batch_size, limit=sharing.limit)
    used = subset(source.info.num_train, sharing.limit, "train")
    read = keeping(decode, source, workers=sharing.workers, cache=sharing.cache)
    order = grain.MapDataset.range(len(used)).seed(seed).shuffle()

    def plan(index: int, rng: np.random.Generator) -> tuple[np.ndarray, Chance]:
        # Random numbers are drawn for the whole batch, which is quick. In the order of the epoch only this
        # process's rows are looked up: each takes Grain 20 microseconds.
        epoch, batch = divmod(index, steps)
        first = epoch * len(used) + batch * batch_size
        rows = np.array([order[first + row] for row in range(local.start, local.stop)])
        draws, seeds = chance.draw(rng, batch_size, num_draws)
        return used[rows], Chance(draws[local], seeds[local])

    def load(planned: tuple[np.ndarray, Chance]) -> dict[str, np.ndarray]:
        return finish(read(*planned), planned[1])

    # Grain derives the seed of `random_map` from its place in the chain: a step more or less here, and every
    # run would see other images.
    batches = (
        grain.MapDataset.range(steps)
        .seed(seed)
        .map_with_index(lambda index, _: index)  # counts on from one epoch to the next
        .map(int)
        .repeat()
        .random_map(plan)
        .map(load)
    )
    return Batches(batches, workers=sharing.workers, prefetch=sharing.prefetch)


def evaluation(
    source: Any,
    transform: Any,
    decode: Decoding,
    finish: Callable[[tuple[np.ndarray, ...], np.ndarray], dict[str, np.ndarray]],
    *,
    sharing: Sharing,
) -> "Batches":
    """What `eval_batches` promises, for any source and kind of batch.

    Args:
      source: its `info` has `num_eval` and `channels`.
      transform: has `check_channels`.
      decode: reads its `eval` split.
      finish: (what `decode` gave, the rows of the split) -> batch of `sharing.rows` rows, of which the first
        len(rows) are those.
      sharing: batch size, processes, workers.
    """
    import grain

    from repopt_jax.data.batches import Batches

    transform.check_channels(source.info.channels)
    used = subset(source.info.num_eval, sharing.limit, "eval")
    read = keeping(decode, source, workers=sharing.workers, cache=sharing.cache)

    def load(batch: int) -> dict[str, np.ndarray]:
        whole = used[batch * sharing.batch_size : (batch + 1) * sharing.batch_size]
        rows = whole[sharing.local]
        mask = (np.arange(sharing.rows) < len(rows)).astype(np.float32)
        return {**finish(read(rows, None), rows), "mask": mask}

    steps = eval_steps(source, sharing.batch_size, limit=sharing.limit)
    batches = grain.MapDataset.range(steps).map(load)
    return Batches(batches, workers=sharing.workers, prefetch=sharing.prefetch)


def filled(array: np.ndarray, count: int, value: int = 0) -> np.ndarray:
    """`array` with rows of `value` added up to `count` rows."""
    missing = np.full((count - len(array), *array.shape[1:]), value, array.dtype)
    return np.concatenate([array, missing]) if len(missing) else array


def subset(count: int, limit: int | None, split: str) -> np.ndarray:
    """Which images of a split are used: all, or the first `limit` in an order that mixes the classes."""
    if limit is None:
        return np.arange(count)
    if not 1 <= limit <= count:
        raise ValueError(
            f"`limit` is {limit}, but the {split} split has {count} images; it must be in [1, {count}]"
        )
    return np.random.default_rng(LIMIT_SEED).permutation(count)[:limit]
