"""Measures how many images a second one core reads, decodes and augments, on generated photographs."""

import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from repopt_jax.data.classification import train_batches
from repopt_jax.data.dataset import Example, RandomAccess, Source
from repopt_jax.data.transforms import Transform

# A smaller split is read again and again, as if it had this many images: the order of the first epochs costs
# Grain more time for few images than for many.
MIN_IMAGES = 2**17
# Batches that are made before the clock starts, for imports and first allocations of memory.
WARM_UP = 1
# A photograph: side in pixels and strength of its smooth noise, number of its shapes with edges, standard
# deviation of its grain, and the quality of its JPEG file.
OCTAVES = ((256, 60.0), (96, 40.0), (32, 25.0), (12, 15.0), (4, 12.0), (2, 12.0))
SHAPES = 12
GRAIN = 6.5
QUALITY = 95


def input_throughput(
    source: Source, transform: Transform, *, batch_size: int, images: int, seed: int = 0
) -> dict[str, float]:
    """Makes training batches in the calling thread only, and measures how fast.

    Nothing is cached, and no other thread works on the batches, so that `images_per_s` is the rate of a
    worker process that has a core of its own. It counts the processor's time, which other programs do not
    change; waiting for the disk is in `wall_images_per_s` only.

    Args:
      source: its `train` split is read.
      transform: the preprocessing; with mixing, `batch_size` is even.
      batch_size: images in a batch.
      images: number of images to measure, rounded up to whole batches.
      seed: of the order and the augmentation.

    Returns:
      images: number of images measured.
      images_per_s: images a second of this thread's processor time.
      wall_images_per_s: images a second of the clock.
      decode_ms: milliseconds of processor time an image for reading and decoding.
      augment_ms: the same for everything after it.

    Raises:
      ValueError: `images` is less than 1, or as in `train_batches`.
    """
    if images < 1:
        raise ValueError(f"`images` is {images}; it must be at least 1")
    timed = _Timed(source.train, max(source.info.num_train, batch_size, MIN_IMAGES))
    batches = train_batches(
        Source(replace(source.info, num_train=len(timed)), timed, source.eval),
        transform,
        batch_size=batch_size,
        seed=seed,
        prefetch=0,
        cache=False,
    )
    count = -(-images // batch_size)
    iterator = iter(batches)
    for _ in itertools.islice(iterator, WARM_UP):
        pass
    timed.seconds = 0.0
    processor, clock = time.thread_time(), time.perf_counter()
    for _ in itertools.islice(iterator, count):
        pass
    processor, clock = time.thread_time() - processor, time.perf_counter() - clock
    iterator.close()
    done = count * batch_size
    return {
        "images": float(done),
        "images_per_s": done / processor,
        "wall_images_per_s": done / clock,
        "decode_ms": 1e3 * timed.seconds / done,
        "augment_ms": 1e3 * (processor - timed.seconds) / done,
    }


def photographs(
    folder: str | os.PathLike[str], count: int, *, size: tuple[int, int] = (500, 375), seed: int = 0
) -> Path:
    """Writes JPEG files that cost as much to decode as photographs do, for `open_source("folder", ...)`.

    Light and colour change smoothly at several scales; there are shapes with edges, and grain. At 500 x 375
    pixels a file has about the size of an image of ImageNet, 110 kB. The two classes have no meaning.

    Args:
      folder: created if it does not exist; `train/` and `test/` in it must not exist.
      count: training images, at least 2; an eighth as many, but at least 2, are test images.
      size: (width, height) in pixels.
      seed: of the images.

    Returns:
      `folder`.

    Raises:
      ValueError: `count` is less than 2, or a side less than 1.
      FileExistsError: there are images already.
    """
    if count < 2 or min(size) < 1:
        raise ValueError(f"`count` is {count} and `size` {size}; they must be at least 2 and (1, 1)")
    root = Path(folder)
    rng = np.random.default_rng(seed)
    for split, number in (("train", count), ("test", max(2, count // 8))):
        for name in ("one", "other"):
            (root / split / name).mkdir(parents=True)
        for i in range(number):
            path = root / split / ("one", "other")[i % 2] / f"{i:06}.jpg"
            photograph(size, rng).save(path, quality=QUALITY)
    return root


def photograph(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Makes one RGB image of `size`, (width, height), as `photographs` describes them."""
    light = np.full((size[1], size[0], 3), 128, np.float32)
    for side, strength in OCTAVES:
        # More variation of light than of colour, as in photographs.
        cells = (size[1] // side + 2, size[0] // side + 2)
        noise = 0.8 * rng.normal(size=(*cells, 1)) + 0.4 * rng.normal(size=(*cells, 3))
        light += strength * _smooth(noise.astype(np.float32), size)
    image = Image.fromarray(np.clip(light, 0, 255).astype(np.uint8))
    shapes = ImageDraw.Draw(image, "RGBA")
    for _ in range(SHAPES):
        corners = rng.uniform(-0.1, 1.1, (int(rng.integers(3, 8)), 2)) * size
        colour = (*rng.integers(0, 256, 3).tolist(), int(rng.integers(60, 200)))
        shapes.polygon([tuple(c) for c in corners.tolist()], fill=colour)
    grain = GRAIN * rng.normal(size=(size[1], size[0], 1))
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))


def _smooth(noise: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """float32 (rows, columns, 3) -> (size[1], size[0], 3), bicubic."""
    channels = [
        Image.fromarray(np.ascontiguousarray(noise[..., c])).resize(size, Image.Resampling.BICUBIC)
        for c in range(3)
    ]
    return np.stack([np.asarray(channel) for channel in channels], -1)


class _Timed(RandomAccess[Example]):
    """The examples of `examples`, again and again, and the processor time that reading them has taken."""

    def __init__(self, examples: Sequence[Example], count: int):
        self.examples = examples
        self.length = count
        self.seconds = 0.0

    def __len__(self) -> int:
        return self.length

    def example(self, index: int) -> Example:
        start = time.thread_time()
        example = self.examples[index % len(self.examples)]
        self.seconds += time.thread_time() - start
        return example
