"""Rows of a split -> fitted images, decoded each time or kept in memory once they have been read."""

from collections.abc import Hashable
from typing import Any, Literal, Protocol

import numpy as np

from repopt_jax.data.chance import CROP, Chance, generator
from repopt_jax.data.images import Source
from repopt_jax.data.transforms import Transform, fit, random_part

Cache = Literal["auto"] | bool
# With `cache="auto"` a split's images are kept in memory if they take no more than this, fitted, as uint8.
CACHE_BYTES = 512 * 2**20


class Reader(Protocol):
    """(rows, their random numbers) -> arrays with an element for each row, the images first.

    Without random numbers the images are fitted, a plain function of the row.
    """

    def __call__(self, rows: np.ndarray, chance: Chance | None) -> tuple[np.ndarray, ...]: ...


class Decoding(Reader, Protocol):
    """A reader of one split of a source that decodes each time.

    Attributes:
      split: "train" or "eval".
      size: side of the images that it gives.
      fitting: what, with the split, decides what it gives: where this is equal, kept images may be shared.
      whole: the setting of the transform, if there is one, that needs whole images, so that none is kept.
    """

    split: str
    size: int
    whole: str | None

    @property
    def fitting(self) -> Hashable: ...


def keeping(decode: Decoding, source: Any, *, workers: int, cache: Cache) -> Reader:
    """`decode`, or a reader that keeps in `source.kept` what it has given, as `cache` says.

    Args:
      decode: reads a split of `source`.
      source: a `Source`, or another with `info` and `kept`.
      workers: worker processes.
      cache: True, False or "auto"; see `train_batches`.

    Raises:
      ValueError: `cache` is True where images cannot be kept, or is none of its values.
    """
    if not _keeps(source.info, decode, workers, cache):
        return decode
    # Held by the source, so that evaluating again does not decode again.
    key = decode.split, decode.fitting
    if key not in source.kept:
        source.kept[key] = _Keeping(decode, len(getattr(source, decode.split)))
    return source.kept[key]


class ImageDecoding:
    """Reads, decodes and fits labelled images, or cuts random parts out of them, each time anew.

    It gives uint8 (rows, size, size, channels) and labels, int32 (rows,).
    """

    def __init__(self, source: Source, split: str, transform: Transform):
        self.split = split
        self.size = transform.image_size
        self.resized = transform.resize
        self.fitting = (self.size, self.resized)
        self.area = transform.area if split == "train" else None
        self.whole = None if self.area is None else "area"
        self.examples = getattr(source, split)
        self.channels = source.info.channels

    def __call__(self, rows: np.ndarray, chance: Chance | None) -> tuple[np.ndarray, ...]:
        images = np.empty((len(rows), self.size, self.size, self.channels), np.uint8)
        labels = np.empty(len(rows), np.int32)
        for i, row in enumerate(rows):
            example = self.examples[int(row)]
            image = example["image"]
            check_image(image, self.channels, row)
            if self.area is None or chance is None:
                images[i] = fit(image, self.size, self.resized)
            else:
                images[i] = random_part(image, self.size, self.area, generator(chance.seeds[i], CROP))
            labels[i] = example["label"]
        return images, labels


def check_image(image: np.ndarray, channels: int, row: int) -> None:
    """Raises ValueError where an image of a split is not uint8 (height, width, `channels`)."""
    if image.ndim != 3 or image.shape[-1] != channels or image.dtype != np.uint8:
        raise ValueError(
            f"image {row} is {image.dtype} {image.shape}; it must be uint8 (height, width, {channels})"
        )


class _Keeping:
    """Reads a row the first time it is asked for, and keeps what was read."""

    def __init__(self, decode: Decoding, count: int):
        self.decode = decode
        # Not touched before they are written, so that they take real memory only for rows that are read.
        nothing = decode(np.zeros(0, int), None)
        self.arrays = tuple(np.empty((count, *array.shape[1:]), array.dtype) for array in nothing)
        self.have = np.zeros(count, bool)

    def __call__(self, rows, chance):
        missing = rows[~self.have[rows]]
        if len(missing):
            # Two threads may decode the same image: they write the same bytes, and `have` last.
            for array, read in zip(self.arrays, self.decode(missing, None), strict=True):
                array[missing] = read
            self.have[missing] = True
        return tuple(array[rows] for array in self.arrays)


def _keeps(info: Any, decode: Decoding, workers: int, cache: Cache) -> bool:
    """The documented rule of `cache`."""
    whole = decode.whole
    if cache is True and (whole or workers):
        reason = f"`{whole}`, which needs whole images" if whole else f"{workers} worker processes"
        raise ValueError(f"`cache` is True, but images cannot be kept with {reason}; use 'auto'")
    if cache not in ("auto", True, False):
        raise ValueError(f"`cache` is {cache!r}; it must be 'auto', True or False")
    if cache != "auto":
        return cache
    count = info.num_train if decode.split == "train" else info.num_eval
    return not (whole or workers) and count * decode.size**2 * info.channels <= CACHE_BYTES
