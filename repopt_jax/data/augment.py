"""Random changes of training images: crops, flips, colours, erasing and mixing in pairs.

The random numbers are arguments: the same images and numbers always give the same result.
"""

import math
from typing import TYPE_CHECKING

import numpy as np

from repopt_jax.data.images import from_pillow, resize, to_pillow
from repopt_jax.data.rng import ERASING, JITTER, MIXING, RANDAUGMENT, RowRng, stream

if TYPE_CHECKING:
    from PIL import Image

# torchvision's RandomResizedCrop: the range of the aspect (width / height), and the number of attempts.
CROP_ASPECT = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
# timm's random erasing: ranges of the share of the area and of the aspect (height / width), and attempts.
ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)
ERASING_ATTEMPTS = 10


# -- crops and flips -------------------------------------------------------------------------------


def crop_and_flip(images: np.ndarray, rng: RowRng, *, padding: int, flip: bool) -> np.ndarray:
    """Random crop after padding with zeros, and random flip from left to right.

    Args:
      images: uint8 (rows, size, size, channels).
      rng: its `y` and `x` place the crops, its `flip` decides which images are mirrored.
      padding: zeros on each side; 0 for no crop.
      flip: whether images are mirrored, with probability 1/2.

    Returns:
      uint8, the shape of `images`; `images` itself if nothing is to be done.
    """
    if not padding and not flip:
        return images
    size = images.shape[1]
    padded = images
    if padding:
        padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    tops, lefts = (np.floor(u * (2 * padding + 1)).astype(int) for u in (rng.y, rng.x))
    flips = (rng.flip < 0.5) & flip
    out = np.empty_like(images)
    for row, (top, left, flipped) in enumerate(zip(tops, lefts, flips, strict=True)):
        window = padded[row, top : top + size, left : left + size]
        if flipped:
            for channel in range(images.shape[-1]):  # six times as fast as all of them at once
                out[row, ..., channel] = window[:, ::-1, channel]
        else:
            out[row] = window
    return out


def random_resized_crop(
    image: np.ndarray, size: int, area: tuple[float, ...], rng: np.random.Generator
) -> np.ndarray:
    """Resizes a random part of a uint8 (height, width, channels) image to (size, size, channels).

    The rule of torchvision's RandomResizedCrop: the part's share of the area is uniform in `area` and the
    logarithm of width/height uniform in log [3/4, 4/3]; a part that does not fit into the image is drawn
    again, up to ten attempts in all. After those the central part is taken: the whole image, but for what
    makes it wider or higher than these aspects.
    """
    top, left, height, width = _crop_box(image.shape[0], image.shape[1], area, rng)
    return resize(image[top : top + height, left : left + width], (size, size))


def _crop_box(
    height: int, width: int, area: tuple[float, ...], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draws top, left, height and width of `random_resized_crop`."""
    (low, high), (narrowest, widest) = area, CROP_ASPECT
    for _ in range(CROP_ATTEMPTS):
        pixels = height * width * rng.uniform(low, high)
        aspect = math.exp(rng.uniform(math.log(narrowest), math.log(widest)))
        part_height, part_width = round(math.sqrt(pixels / aspect)), round(math.sqrt(pixels * aspect))
        if 0 < part_height <= height and 0 < part_width <= width:
            top, left = rng.integers((height - part_height + 1, width - part_width + 1))
            return int(top), int(left), part_height, part_width
    part_height = min(height, round(width / narrowest))
    part_width = min(width, round(height * widest))
    return (height - part_height) // 2, (width - part_width) // 2, part_height, part_width


# -- colours ---------------------------------------------------------------------------------------


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
    from repopt_jax.data.randaugment import randaugment  # imports Pillow

    out = np.empty_like(images)
    for i, seed in enumerate(seeds):
        image = to_pillow(images[i])
        if magnitude is not None:
            image = randaugment(image, magnitude, stream(seed, RANDAUGMENT))
        if jitter:
            image = color_jitter(image, jitter, stream(seed, JITTER))
        out[i] = from_pillow(image)
    return out


def color_jitter(image: "Image.Image", strength: float, rng: np.random.Generator) -> "Image.Image":
    """Changes brightness, contrast and saturation, in random order, each by a random factor.

    The factors are uniform in [1 - strength, 1 + strength], from 0 on where that is negative. This is what
    torchvision's ColorJitter(strength, strength, strength) does, which is also timm's colour jitter. The
    saturation of a grey image cannot change.
    """
    from PIL import ImageEnhance

    changes = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
    for i in rng.permutation(len(changes)):
        image = changes[i](image).enhance(rng.uniform(max(0.0, 1 - strength), 1 + strength))
    return image


# -- erasing ---------------------------------------------------------------------------------------


def erase(images: np.ndarray, seeds: np.ndarray, probability: float) -> None:
    """Sets a random box of some of the images to 0, in place: random erasing (arXiv:1708.04896).

    The rule is that of timm with mode "const": on normalised images, so that 0 is the mean colour. The box's
    share of the area is uniform in [0.02, 1/3] and the logarithm of its aspect uniform in log [0.3, 1/0.3]; a
    box that is not smaller than the image on both sides is drawn again, up to ten attempts in all.

    Args:
      images: float32 (rows, height, width, channels), overwritten.
      seeds: int64 (rows,).
      probability: that a box of an image is erased, in [0, 1].
    """
    if not probability:
        return
    for image, seed in zip(images, seeds, strict=True):
        rng = stream(seed, ERASING)
        if rng.random() < probability:
            _erase_box(image, rng)


def _erase_box(image: np.ndarray, rng: np.random.Generator) -> None:
    height, width, _ = image.shape
    low, high = np.log(ERASED_ASPECT)
    for _ in range(ERASING_ATTEMPTS):
        pixels = height * width * rng.uniform(*ERASED_AREA)
        aspect = math.exp(rng.uniform(low, high))
        rows, columns = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if rows < height and columns < width:
            top, left = rng.integers((height - rows + 1, width - columns + 1))
            image[top : top + rows, left : left + columns] = 0
            return


# -- mixing ----------------------------------------------------------------------------------------


def mix(
    batch: dict[str, np.ndarray], seeds: np.ndarray, mixup: float, cutmix: float
) -> dict[str, np.ndarray]:
    """Mixes the images of each pair of rows by mixup or CutMix; where both are given, by one at random.

    Row 2i is mixed with row 2i + 1, each with the other and in the same proportion. The order of the images
    is random, so that this is a random partner, and a process needs no rows but its own. (timm's `Mixup`,
    which the recipes use, mixes row i with the i-th from the end, by default in the same proportion for the
    whole batch; its mode "pair" draws one for each pair, as here.)

    mixup (arXiv:1710.09412, ICLR 2018): share * image + (1 - share) * other, share ~ Beta(mixup, mixup).
    CutMix (arXiv:1905.04899, ICCV 2019): a box of the image is replaced by that of the other. Its centre is
    uniform and its sides are sqrt(1 - l) times those of the image, l ~ Beta(cutmix, cutmix), cut at the
    border; the share is that of the pixels that are left.

    Args:
      batch: "image": float32 (rows, height, width, channels), rows even; it may be overwritten; "label":
        int32 (rows,).
      seeds: int64 (rows,); that of the first row of a pair is used.
      mixup: Beta parameter, 0: no mixup.
      cutmix: Beta parameter, 0: no CutMix.

    Returns:
      "image" and "label" as given, "other": int32 (rows,), label of the partner, "share": float32 (rows,), in
      [0, 1], how much of the image is its own: the loss is share * loss(label) + (1 - share) * loss(other).
    """
    images, labels = batch["image"], batch["label"]
    shares = np.empty(len(images), np.float32)
    for first in range(0, len(images), 2):
        pair = images[first : first + 2]
        shares[first : first + 2] = _mix_pair(pair, stream(seeds[first], MIXING), mixup, cutmix)
    other = labels.reshape(-1, 2)[:, ::-1].reshape(-1)
    return {"image": images, "label": labels, "other": other, "share": shares}


def _mix_pair(pair: np.ndarray, rng: np.random.Generator, mixup: float, cutmix: float) -> float:
    """Mixes two images in place, and returns the share of each that is its own."""
    if mixup and not (cutmix and rng.random() < 0.5):
        share = rng.beta(mixup, mixup)
        pair[:] = share * pair + (1 - share) * pair[::-1]
        return share
    top, bottom, left, right = random_box(pair.shape[1:3], rng.beta(cutmix, cutmix), rng)
    box = pair[:, top:bottom, left:right]
    box[:] = box[::-1].copy()
    height, width = pair.shape[1:3]
    return 1 - (bottom - top) * (right - left) / (height * width)


def random_box(shape: tuple[int, int], share: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draws CutMix's box (top, bottom, left, right) in an image of which about `share` is to remain."""
    edges = []
    for length in shape:
        half = int(length * np.sqrt(1 - share)) // 2
        centre = int(rng.integers(length))
        edges += [max(0, centre - half), min(length, centre + half)]
    return edges[0], edges[1], edges[2], edges[3]
