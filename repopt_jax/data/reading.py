"""Rows of a split -> fitted images, decoded each time or kept in memory once they have been read."""

from collections.abc import Callable
from typing import Literal

import numpy as np

from repopt_jax.data.images import DatasetInfo, Source
from repopt_jax.data.transforms import Transform, fit, random_part

Cache = Literal["auto"] | bool
# With `cache="auto"` a split's images are kept in memory if they take no more than this, fitted, as uint8.
CACHE_BYTES = 512 * 2**20
# (rows, draws or None) -> images uint8 (len(rows), size, size, channels), labels int32 (len(rows),)
Reader = Callable[[np.ndarray, np.ndarray | None], tuple[np.ndarray, np.ndarray]]


def make_reader(source: Source, split: str, transform: Transform, *, workers: int, cache: Cache) -> Reader:
    """A reader of `split` ("train" or "eval") that keeps images as `cache` says; see `train_batches`.

    Raises:
      ValueError: `cache` is True where images cannot be kept, or is none of its values.
    """
    if not _keeps(source.info, split, transform, workers, cache):
        return _Decoding(source, split, transform)
    # Held by the source, so that evaluating again does not decode again.
    key = split, transform.image_size
    if key not in source.kept:
        source.kept[key] = _Keeping(source, split, transform)
    return source.kept[key]


class _Decoding:
    """Reads, decodes and fits images each time they are asked for."""

    def __init__(self, source: Source, split: str, transform: Transform):
        self.examples = getattr(source, split)
        self.channels = source.info.channels
        self.size = transform.image_size
        self.area = transform.area if split == "train" else None

    def __call__(self, rows, draws):
        images = np.empty((len(rows), self.size, self.size, self.channels), np.uint8)
        labels = np.empty(len(rows), np.int32)
        for i, row in enumerate(rows):
            example = self.examples[int(row)]
            image = example["image"]
            self._check(image, row)
            if self.area is None:
                images[i] = fit(image, self.size)
            else:
                images[i] = random_part(image, self.size, draws[i], self.area)
            labels[i] = example["label"]
        return images, labels

    def _check(self, image: np.ndarray, row: int) -> None:
        if image.ndim != 3 or image.shape[-1] != self.channels or image.dtype != np.uint8:
            raise ValueError(
                f"image {row} is {image.dtype} {image.shape}; "
                f"it must be uint8 (height, width, {self.channels})"
            )


class _Keeping:
    """Decodes an image the first time it is asked for, and keeps it fitted."""

    def __init__(self, source: Source, split: str, transform: Transform):
        self.decode = _Decoding(source, split, transform)
        count = len(getattr(source, split))
        # Not touched before it is written, so that it takes real memory only for images that are read.
        self.images = np.empty((count, *(transform.image_size,) * 2, source.info.channels), np.uint8)
        self.labels = np.empty(count, np.int32)
        self.have = np.zeros(count, bool)

    def __call__(self, rows, draws):
        missing = rows[~self.have[rows]]
        if len(missing):
            # Two threads may decode the same image: they write the same bytes, and `have` last.
            self.images[missing], self.labels[missing] = self.decode(missing, None)
            self.have[missing] = True
        return self.images[rows], self.labels[rows]


def _keeps(info: DatasetInfo, split: str, transform: Transform, workers: int, cache: Cache) -> bool:
    """The documented rule of `cache`."""
    whole = split == "train" and transform.area is not None
    if cache is True and (whole or workers):
        reason = "`area`, which needs whole images" if whole else f"{workers} worker processes"
        raise ValueError(f"`cache` is True, but images cannot be kept with {reason}; use 'auto'")
    if cache not in ("auto", True, False):
        raise ValueError(f"`cache` is {cache!r}; it must be 'auto', True or False")
    if cache != "auto":
        return cache
    count = info.num_train if split == "train" else info.num_eval
    return not (whole or workers) and count * transform.image_size**2 * info.channels <= CACHE_BYTES
