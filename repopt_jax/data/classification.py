"""Batches of labelled images. Their order, sharding and caching are those of `repopt_jax.data.pipeline`."""

import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

import numpy as np

from repopt_jax.arguments import check_kind
from repopt_jax.data.augment import crop_and_flip, distort, erase, mix, random_resized_crop
from repopt_jax.data.dataset import Example, Source, check_source
from repopt_jax.data.pipeline import Options, Sharding, check_image, endless_batches, one_epoch, pad_rows
from repopt_jax.data.rng import CROP, RowRng, stream
from repopt_jax.data.transforms import Transform, fit, normalise

if TYPE_CHECKING:  # imports Grain, which takes a second
    from repopt_jax.data.batches import Batches


def train_batches(
    source: Source, transform: Transform, *, batch_size: int, seed: int, **options: Unpack[Options]
) -> "Batches":
    """Makes training batches without end: each epoch in a new order, without its last partial batch.

    Args:
      source: its `train` split is read.
      transform: the settings of fitting, augmentation, normalisation and mixing.
      batch_size: images in a batch, over all processes.
      seed: of the order and the augmentation, in [0, 2**32).
      **options:
        process_index: which `batch_size // process_count` rows of each batch to read. By default 0.
        process_count: number of processes that share each batch; their rows are disjoint and make it up. By
          default 1.
        limit: use only this many images, the same whatever the seed. None, the default: all.
        workers: processes that read and decode; 0, the default: threads of this process do. The batches are
          the same.
        prefetch: batches made ahead, by a thread each (with workers: by each worker); 0: made when asked
          for. By default 2.
        cache: whether images are kept in memory, decoded and fitted, once they have been read. "auto", the
          default: where the images of the split take at most CACHE_BYTES in all, `transform.area` is not used
          (it needs whole images), and there are no worker processes (each would have a cache of its own).
          The cache lives as long as `source`.

    Returns:
      An iterable; `iter` of it has `get_state()` and `set_state(state)` (JSON-able, exact). Each element is
      {"image": float32 (batch_size // process_count, size, size, channels), "label": int32
      (the same batch,)}; where `transform` mixes images also "other", int32 (batch,), the label of the second
      image in the mixture, and "share", float32 (batch,), the share of the first, in [0, 1]. An image that
      cannot be read raises ValueError from `next`, naming it.

    Raises:
      ValueError: sizes, counts or `cache` that do not fit together or the source; an odd number of rows a
        process where images are mixed in pairs.
    """
    check_source(source, Source)
    check_kind("transform", transform, Transform, "a `Transform`")
    check_kind("batch_size", batch_size, numbers.Integral, "a whole number")
    check_kind("seed", seed, numbers.Integral, "a whole number")
    sharding = Sharding(batch_size=batch_size, **options)
    if transform.mixes and sharding.rows % 2:
        raise ValueError(
            f"`mixup` and `cutmix` mix images in pairs, but `batch_size` {batch_size} leaves each of "
            f"{sharding.process_count} processes {sharding.rows} rows; it must be an even number"
        )

    def finish(arrays: tuple[np.ndarray, ...], rng: RowRng) -> dict[str, np.ndarray]:
        images, labels = arrays
        images = crop_and_flip(images, rng, padding=transform.crop_padding, flip=transform.flip)
        images = distort(images, rng.seeds, transform.randaugment, transform.jitter)
        batch = {"image": normalise(images, transform), "label": labels}
        erase(batch["image"], rng.seeds, transform.erasing)
        return mix(batch, rng.seeds, transform.mixup, transform.cutmix) if transform.mixes else batch

    reader = LabelledReader(source, "train", transform)
    return endless_batches(source, transform, reader, finish, seed=seed, sharding=sharding)


def eval_batches(
    source: Source, transform: Transform, *, batch_size: int, **options: Unpack[Options]
) -> "Batches":
    """Reads the eval split once, every image in exactly one row of one process; `iter` starts it again.

    Arguments and errors are those of `train_batches`. Elements hold "image" and "label", and also "mask",
    float32 (batch,): 1 for an image, 0 for a row that pads the last batch (black before normalisation, label
    0). Every process gets the same number of batches.
    """
    check_source(source, Source)
    check_kind("transform", transform, Transform, "a `Transform`")
    check_kind("batch_size", batch_size, numbers.Integral, "a whole number")
    sharding = Sharding(batch_size=batch_size, **options)

    def finish(arrays: tuple[np.ndarray, ...], rows: np.ndarray) -> dict[str, np.ndarray]:
        images, labels = (pad_rows(array, sharding.rows) for array in arrays)
        return {"image": normalise(images, transform), "label": labels}

    return one_epoch(source, transform, LabelledReader(source, "eval", transform), finish, sharding=sharding)


class LabelledReader:
    """Reads and decodes labelled images, and fits them or cuts random parts out of them.

    A `pipeline.Reader` of images, uint8 (rows, size, size, channels), and labels, int32 (rows,).
    """

    def __init__(self, source: Source, split: str, transform: Transform):
        self.split = split
        self.size: int = transform.image_size
        self.resized: int | None = transform.resize
        self.cache_key: tuple[int, int | None] = (self.size, self.resized)
        self.area: tuple[float, ...] | None = transform.area if split == "train" else None
        self.needs_whole_images = None if self.area is None else "area"
        self.examples: Sequence[Example] = getattr(source, split)
        self.channels: int = source.info.channels

    def __call__(self, rows: np.ndarray, rng: RowRng | None) -> tuple[np.ndarray, ...]:
        images = np.empty((len(rows), self.size, self.size, self.channels), np.uint8)
        labels = np.empty(len(rows), np.int32)
        for i, row in enumerate(rows):
            example = self.examples[int(row)]
            image = example["image"]
            check_image(image, self.channels, row)
            if self.area is None or rng is None:
                images[i] = fit(image, self.size, self.resized)
            else:
                images[i] = random_resized_crop(image, self.size, self.area, stream(rng.seeds[i], CROP))
            labels[i] = example["label"]
        return images, labels
