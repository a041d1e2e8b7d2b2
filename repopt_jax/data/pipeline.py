"""Batches for training and evaluation, read through Grain.

What batch k holds is a function of (seed, batch size, k) alone: the order of the images and the random
numbers of every row are drawn for the *global* batch, and a process then reads only its own rows. The same
run on one process or eight, with worker processes or without, resumed or unbroken, sees the same images.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from repopt_jax.data.annotated import AnnotatedSource
from repopt_jax.data.images import Source
from repopt_jax.data.reading import Cache, make_reader
from repopt_jax.data.transforms import DRAWS, Transform, augment, normalise

if TYPE_CHECKING:  # imports Grain, which takes a second
    from repopt_jax.data.batches import Batches

# `limit` takes the first images of this fixed order, which does not depend on the seed of the run.
LIMIT_SEED = 20480


def train_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    limit: int | None = None,
    workers: int = 0,
    prefetch: int = 2,
    cache: Cache = "auto",
) -> "Batches":
    """Training batches without end: each epoch in a new order, without its last partial batch.

    Args:
      source: its `train` split is read.
      transform: fitting, augmentation and normalisation.
      batch_size: images in a batch, over all processes.
      seed: of the order and the augmentation, in [0, 2**32).
      process_index: which `batch_size // process_count` rows of each batch to read.
      process_count: processes that share each batch; their rows are disjoint and make it up.
      limit: use only this many images, the same whatever the seed. None: all.
      workers: processes that read and decode; 0: threads of this process do. The batches are the same.
      prefetch: batches made ahead, by a thread each (with workers: by each worker); 0: made when asked for.
      cache: keep images in memory, decoded and fitted, once they have been read. "auto": where the split's
        images take at most CACHE_BYTES in all, `transform.area` is not used (it needs whole images), and
        there are no worker processes (each would keep its own). The images live as long as `source`.

    Returns:
      An iterable; `iter` of it has `get_state()` and `set_state(state)` (JSON-able, exact). Each element is
      {"image": float32 (batch_size // process_count, size, size, channels), "label": int32 (the same
      batch,)}. An image that cannot be read raises ValueError from `next`, naming it.

    Raises:
      ValueError: sizes, counts or `cache` that do not fit together or the source.
    """
    read = make_reader(source, "train", transform, workers=workers, cache=cache)

    def load(rows: np.ndarray, draws: np.ndarray) -> dict[str, np.ndarray]:
        images, labels = read(rows, draws)
        return {"image": normalise(augment(images, draws, transform), transform), "label": labels}

    return training(
        source,
        transform,
        load,
        len(DRAWS),
        batch_size=batch_size,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
        limit=limit,
        workers=workers,
        prefetch=prefetch,
    )


def eval_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    limit: int | None = None,
    workers: int = 0,
    prefetch: int = 2,
    cache: Cache = "auto",
) -> "Batches":
    """The eval split once, every image in exactly one row of one process; `iter` starts it again.

    Arguments, errors and elements are those of `train_batches`, and each element also has "mask", float32
    (batch,): 1 for an image, 0 for a row that fills up the last batch (black before normalisation, label
    0). Every process gets the same number of batches.
    """
    read = make_reader(source, "eval", transform, workers=workers, cache=cache)

    def load(rows: np.ndarray, count: int) -> dict[str, np.ndarray]:
        images, labels = (filled(array, count) for array in read(rows, None))
        return {"image": normalise(images, transform), "label": labels}

    return evaluation(
        source,
        transform,
        load,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
        limit=limit,
        workers=workers,
        prefetch=prefetch,
    )


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


def training(
    source: Any,
    transform: Any,
    load: Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]],
    num_draws: int,
    *,
    batch_size: int,
    seed: int,
    process_index: int,
    process_count: int,
    limit: int | None,
    workers: int,
    prefetch: int,
) -> "Batches":
    """What `train_batches` promises, for any source and kind of batch.

    Args:
      source: its `info` has `num_train` and `channels`.
      transform: has `check_channels`.
      load: (rows of the split, uniform numbers (len(rows), `num_draws`)) -> batch.
      num_draws: random numbers that a row needs.
    """
    import grain

    from repopt_jax.data.batches import Batches

    _check(source, transform, batch_size, process_index, process_count, workers, prefetch)
    if not 0 <= seed < 2**32:
        raise ValueError(f"`seed` is {seed}; it must be in [0, 2**32)")
    steps_per_epoch(source, batch_size, limit=limit)
    used = subset(source.info.num_train, limit, "train")
    local = _local_rows(batch_size, process_index, process_count)

    def draw(rows: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"rows": used[rows], "draws": rng.random((batch_size, num_draws))}

    batches = (
        grain.MapDataset.range(len(used))
        .seed(seed)
        .shuffle()
        .batch(batch_size, drop_remainder=True)
        .repeat()
        .random_map(draw)
        .map(lambda plan: load(plan["rows"][local], plan["draws"][local]))
    )
    return Batches(batches, workers=workers, prefetch=prefetch)


def evaluation(
    source: Any,
    transform: Any,
    load: Callable[[np.ndarray, int], dict[str, np.ndarray]],
    *,
    batch_size: int,
    process_index: int,
    process_count: int,
    limit: int | None,
    workers: int,
    prefetch: int,
) -> "Batches":
    """What `eval_batches` promises, for any source and kind of batch.

    Args:
      source: its `info` has `num_eval` and `channels`.
      transform: has `check_channels`.
      load: (rows of the split, count) -> batch of `count` rows, of which the first len(rows) are those.
    """
    import grain

    from repopt_jax.data.batches import Batches

    _check(source, transform, batch_size, process_index, process_count, workers, prefetch)
    used = subset(source.info.num_eval, limit, "eval")
    local = _local_rows(batch_size, process_index, process_count)
    count = local.stop - local.start

    def masked(rows: np.ndarray) -> dict[str, np.ndarray]:
        rows = used[rows][local]
        return {**load(rows, count), "mask": (np.arange(count) < len(rows)).astype(np.float32)}

    batches = grain.MapDataset.range(len(used)).batch(batch_size).map(masked)
    return Batches(batches, workers=workers, prefetch=prefetch)


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


def _local_rows(batch_size: int, process_index: int, process_count: int) -> slice:
    rows = batch_size // process_count
    return slice(process_index * rows, (process_index + 1) * rows)


def _check(source, transform, batch_size, process_index, process_count, workers, prefetch) -> None:
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("process_count", process_count, 1),
        ("workers", workers, 0),
        ("prefetch", prefetch, 0),
    ):
        if value < least:
            raise ValueError(f"`{name}` is {value}; it must be at least {least}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"`process_index` is {process_index}; it must be in [0, {process_count})")
    if batch_size % process_count:
        raise ValueError(f"`batch_size` {batch_size} is not divisible by {process_count} processes")
    transform.check_channels(source.info.channels)
