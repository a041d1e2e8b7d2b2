"""What changes the pixels of training images that are cut out and turned already: colours, and erasing."""

import math

import numpy as np
from PIL import Image, ImageEnhance

from repopt_jax.data.chance import ERASING, JITTER, RANDAUGMENT, generator
from repopt_jax.data.randaugment import randaugment

# timm's random erasing: share of the area, its aspect (height / width), tries to place it.
ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)
ERASING_TRIES = 10
ENHANCED = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def distort(images: np.ndarray, seeds: np.ndarray, magnitude: int | None, jitter: float) -> np.ndarray:
    """RandAugment at `magnitude` (None: none), then colour jitter of strength `jitter` (0: none).

    Args:
      images: uint8 (rows, height, width, 1 or 3).
      seeds: int64 (rows,).
      magnitude: see `randaugment`.
      jitter: see `color_jitter`.

    Returns:
      uint8, the shape of `images`.
    """
    if magnitude is None and not jitter:
        return images
    out = np.empty_like(images)
    for i, seed in enumerate(seeds):
        picture = to_picture(images[i])
        if magnitude is not None:
            picture = randaugment(picture, magnitude, generator(seed, RANDAUGMENT))
        if jitter:
            picture = color_jitter(picture, jitter, generator(seed, JITTER))
        out[i] = to_array(picture)
    return out


def color_jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation, in random order, each by a factor in [1 - strength, 1 + strength].

    Factors below 0 are not drawn. This is what torchvision's ColorJitter(strength, strength, strength) does,
    which is also timm's colour jitter. The saturation of a grey image cannot change.
    """
    for i in rng.permutation(len(ENHANCED)):
        image = ENHANCED[i](image).enhance(rng.uniform(max(0.0, 1 - strength), 1 + strength))
    return image


def erase(images: np.ndarray, seeds: np.ndarray, probability: float) -> None:
    """Random erasing (arXiv:1708.04896) in place: a random box of an image becomes 0, at `probability`.

    As timm's with mode "const": on normalised images, so that 0 is the mean colour; the box's share of the
    area is uniform in [0.02, 1/3], the logarithm of its aspect uniform in log [0.3, 1/0.3], both drawn again
    up to ten times while it is not smaller than the image on both sides.

    Args:
      images: float32 (rows, height, width, channels), overwritten.
      seeds: int64 (rows,).
      probability: of an image to be erased from, in [0, 1].
    """
    if not probability:
        return
    for image, seed in zip(images, seeds, strict=True):
        rng = generator(seed, ERASING)
        if rng.random() < probability:
            _erase_box(image, rng)


def _erase_box(image: np.ndarray, rng: np.random.Generator) -> None:
    height, width, _ = image.shape
    low, high = np.log(ERASED_ASPECT)
    for _ in range(ERASING_TRIES):
        pixels = height * width * rng.uniform(*ERASED_AREA)
        aspect = math.exp(rng.uniform(low, high))
        rows, columns = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if rows < height and columns < width:
            top, left = rng.integers((height - rows + 1, width - columns + 1))
            image[top : top + rows, left : left + columns] = 0
            return


def to_picture(image: np.ndarray) -> Image.Image:
    """A uint8 (height, width, 1 or 3) array as a Pillow image, mode L or RGB."""
    return Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image))


def to_array(picture: Image.Image) -> np.ndarray:
    """A Pillow image, mode L or RGB, as a uint8 (height, width, 1 or 3) array."""
    array = np.asarray(picture)
    return array[..., None] if picture.mode == "L" else array
