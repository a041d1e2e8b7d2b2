"""RandAugment as the recipes of RepVGG and RepOptimizers use it: two random operations on an image.

RandAugment is arXiv:1909.13719 (CVPR Workshops 2020). Those recipes (their preset "raug15" is magnitude 15)
depart from the paper, and this module follows their code, `train/randaug.py` and `train/cutout.py` of
github.com/DingXiaoH/RepVGG:

- The magnitude of an operation is not fixed: it is drawn anew, an integer in [0, M).
- An operation is always applied, and a level is magnitude / 10, so that M = 15 goes beyond the customary
  range of 1 (a brightness of up to 2.6 times, rotations of up to 42 degrees).
- Of the operations that have a strength some do most at level 0: solarize inverts everything, posterize
  makes the image black, and colour, contrast, brightness and sharpness leave a tenth.

One thing differs. Their cutout is given in pixels of images of 224, up to 4 * magnitude of them; here it
grows and shrinks with the image, as every other operation does, so that it does not black out small images.
At 224 it is the same.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

OPERATIONS_PER_IMAGE = 2
# The colours of the area that a moved image leaves empty, and of the area that cutout fills.
FILL = {"L": 128, "RGB": (128, 128, 128)}
CUTOUT_FILL = {"L": 122, "RGB": (125, 122, 113)}
# Side of the images for which the published code gives the side of the cutout.
CUTOUT_AT = 224
# An operation that moves an image uses one of these, at random.
INTERPOLATIONS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


def randaugment(image: Image.Image, magnitude: int, rng: np.random.Generator) -> Image.Image:
    """Applies two operations, drawn with replacement, each of its own strength.

    Args:
      image: mode L or RGB. Grey images have no colour to strengthen, so `color` leaves them as they are.
      magnitude: in [1, `transforms.MAX_MAGNITUDE`]; strengths are integers in [0, `magnitude`).
      rng: draws the operations, their strengths and what else is random.

    Returns:
      An image of the same mode and size.
    """
    for _ in range(OPERATIONS_PER_IMAGE):
        name = NAMES[rng.integers(len(NAMES))]
        image = apply(image, name, int(rng.integers(magnitude)), rng)
    return image


def apply(image: Image.Image, name: str, magnitude: int, rng: np.random.Generator) -> Image.Image:
    """Applies the operation `name` at `magnitude`; `rng` draws what is random in it."""
    operation = OPERATIONS[name]
    amount = operation.amount(magnitude / 10)
    if operation.signed and rng.random() < 0.5:
        amount = -amount
    return operation.change(image, amount, rng)


class Operation(NamedTuple):
    """A change of an image, and how strong it is at a level (magnitude / 10)."""

    change: Callable[[Image.Image, float, np.random.Generator], Image.Image]
    amount: Callable[[float], float] = float
    signed: bool = False


def _autocontrast(image, amount, rng):
    return ImageOps.autocontrast(image)


def _equalize(image, amount, rng):
    return ImageOps.equalize(image)


def _invert(image, amount, rng):
    return ImageOps.invert(image)


def _rotate(image, degrees, rng):
    return image.rotate(degrees, resample=_interpolation(rng), fillcolor=FILL[image.mode])


def _posterize(image, bits, rng):
    """Keeps the `bits` highest bits of every value; with 0 bits the image becomes black."""
    lost = 2 ** max(0, 8 - int(bits)) - 1
    return _mapped(image, [value & ~lost for value in range(256)])


def _solarize(image, threshold, rng):
    """Inverts values from `threshold` on."""
    return ImageOps.solarize(image, int(threshold))


def _solarize_add(image, amount, rng):
    """Makes values below 128 larger by `amount`, up to 255."""
    return _mapped(image, [min(255, v + int(amount)) if v < 128 else v for v in range(256)])


def _color(image, factor, rng):
    return ImageEnhance.Color(image).enhance(factor)


def _contrast(image, factor, rng):
    return ImageEnhance.Contrast(image).enhance(factor)


def _brightness(image, factor, rng):
    return ImageEnhance.Brightness(image).enhance(factor)


def _sharpness(image, factor, rng):
    return ImageEnhance.Sharpness(image).enhance(factor)


def _shear_x(image, factor, rng):
    return _affine(image, (1, factor, 0, 0, 1, 0), rng)


def _shear_y(image, factor, rng):
    return _affine(image, (1, 0, 0, factor, 1, 0), rng)


def _translate_x(image, share, rng):
    return _affine(image, (1, 0, share * image.width, 0, 1, 0), rng)


def _translate_y(image, share, rng):
    return _affine(image, (1, 0, 0, 0, 1, share * image.height), rng)


def _cutout(image, side, rng):
    """Fills a square around a random pixel, as far as it lies in the image."""
    x, y = int(rng.integers(image.width)), int(rng.integers(image.height))
    half = [int(side * length / CUTOUT_AT) // 2 for length in image.size]
    image = image.copy()
    # Pillow cuts the square at the border of the image.
    image.paste(CUTOUT_FILL[image.mode], (x - half[0], y - half[1], x + half[0], y + half[1]))
    return image


def _mapped(image, table):
    """Replaces every value v by table[v]."""
    return image.point(table * len(image.getbands()))


def _affine(image, matrix, rng):
    """Pixel (x, y) is taken from (a x + b y + c, d x + e y + f) of the image; `matrix` is (a, ..., f)."""
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix,
        resample=_interpolation(rng),
        fillcolor=FILL[image.mode],
    )


def _interpolation(rng):
    return INTERPOLATIONS[rng.integers(len(INTERPOLATIONS))]


def _enhanced(level):
    return 0.1 + 1.8 * level


OPERATIONS = {
    "autocontrast": Operation(_autocontrast),
    "equalize": Operation(_equalize),
    "invert": Operation(_invert),
    "rotate": Operation(_rotate, lambda level: 30 * level, signed=True),
    "posterize": Operation(_posterize, lambda level: int(4 * level)),
    "solarize": Operation(_solarize, lambda level: int(256 * level)),
    "solarize_add": Operation(_solarize_add, lambda level: int(110 * level)),
    "color": Operation(_color, _enhanced),
    "contrast": Operation(_contrast, _enhanced),
    "brightness": Operation(_brightness, _enhanced),
    "sharpness": Operation(_sharpness, _enhanced),
    "shear_x": Operation(_shear_x, lambda level: 0.3 * level, signed=True),
    "shear_y": Operation(_shear_y, lambda level: 0.3 * level, signed=True),
    "translate_x": Operation(_translate_x, lambda level: 0.45 * level, signed=True),
    "translate_y": Operation(_translate_y, lambda level: 0.45 * level, signed=True),
    "cutout": Operation(_cutout, lambda level: max(2, 40 * level)),
}
NAMES = tuple(OPERATIONS)
