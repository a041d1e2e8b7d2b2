"""The preprocessing of labelled images: its settings, and the part of it that is not random.

An image is *fitted* to a square (a plain function of the image) or a random part of it is cut out, then
augmented (`repopt_jax.data.augment`), then normalised, then boxes are erased and images mixed in pairs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from repopt_jax.data.images import resize

# The largest magnitude of RandAugment, three times the customary range: beyond it hardly an operation leaves
# anything of an image.
MAX_MAGNITUDE = 30


@dataclass(frozen=True)
class Transform:
    """The settings of preprocessing. Evaluation uses `image_size`, `resize`, `mean` and `std` only.

    The order in training: cut out (`area`, or `resize` and `crop_padding`), `flip`, `randaugment`, `jitter`,
    normalise, `erasing`, and `mixup` or `cutmix`. Everything but `image_size` is off by default. Images may
    be grey or of any size; strengths that are given in pixels elsewhere are shares of the image here.

    Attributes:
      image_size: height and width of the network's input, in pixels. Images of another size are resized, the
        shorter side to `image_size` (bilinear), and the centre is cut out.
      crop_padding: in training, pad with this many black pixels on each side and cut out a random square.
      flip: in training, mirror images with probability 1/2.
      area: in training, instead of fitting the whole image, resize a random part of it: the part's share of
        the image's area is drawn from this range and its aspect from [3/4, 4/3] (the crop of ImageNet
        recipes, which use (0.08, 1.0); see `augment.random_resized_crop`).
      resize: resize the shorter side to this instead of `image_size` before the centre is cut out, as in 256
        for an `image_size` of 224, in evaluation, and in training where `area` is None. With it sizes are
        rounded as torchvision's Resize and CenterCrop do; without, to the nearest pixel.
      randaugment: in training, two random operations of magnitudes below this one, in [1, 30]; see
        `repopt_jax.data.randaugment`. The "raug15" of the RepVGG and RepOptimizers recipes is 15.
      jitter: in training, change brightness, contrast and saturation, in random order, each by a factor in
        [1 - jitter, 1 + jitter].
      erasing: in training, the probability that a random box (0.02 to 1/3 of the area) of an image is set to
        0 after normalisation.
      mixup: in training, mix images in pairs, by shares drawn from Beta(mixup, mixup).
      cutmix: in training, paste a box of one image of a pair into the other, of an area drawn from
        Beta(cutmix, cutmix). Where both are given, each pair takes one of them, with equal probability.
      mean: subtracted from pixel values that are scaled to [0, 1]; one number, or one for each channel.
      std: what the difference is divided by; one number, or one for each channel.

    Raises:
      ValueError: values out of their ranges; it lists all of them.
    """

    image_size: int
    crop_padding: int = 0
    flip: bool = False
    area: tuple[float, ...] | None = None
    resize: int | None = None
    randaugment: int | None = None
    jitter: float = 0.0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        rules = (
            ("image_size", self.image_size >= 1, "at least 1"),
            ("crop_padding", self.crop_padding >= 0, "at least 0"),
            ("area", self.area is None or _is_share_range(self.area), "(low, high), 0 < low <= high <= 1"),
            (
                "resize",
                self.resize is None or self.resize >= self.image_size,
                f"None or at least `image_size`, {self.image_size}",
            ),
            (
                "randaugment",
                self.randaugment is None or _is_magnitude(self.randaugment),
                f"None or an integer in [1, {MAX_MAGNITUDE}]",
            ),
            ("jitter", 0 <= self.jitter < math.inf, "finite and at least 0"),
            ("erasing", 0 <= self.erasing <= 1, "in [0, 1]"),
            ("mixup", 0 <= self.mixup < math.inf, "finite and at least 0"),
            ("cutmix", 0 <= self.cutmix < math.inf, "finite and at least 0"),
            ("mean", all(math.isfinite(v) for v in self.mean), "finite"),
            ("std", all(math.isfinite(v) and v > 0 for v in self.std), "positive and finite"),
        )
        wrong = [f"`{n}` is {getattr(self, n)}; it must be {rule}" for n, holds, rule in rules if not holds]
        if wrong:
            raise ValueError(", and ".join(wrong))

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return bool(self.mixup or self.cutmix)

    def check_channels(self, channels: int) -> None:
        """Raises ValueError if `mean` or `std` does not fit images of `channels` channels."""
        for name in ("mean", "std"):
            value = getattr(self, name)
            if len(value) not in (1, channels):
                raise ValueError(
                    f"`{name}` has {len(value)} numbers, but the images have {channels} channels; "
                    f"give one number or {channels}"
                )


def normalise(images: np.ndarray, transform: Transform) -> np.ndarray:
    """(images / 255 - mean) / std, as float32, of uint8 (batch, height, width, channels)."""
    count, height, width, channels = images.shape
    # Whole rows of pixels, image by image: NumPy is slow where the last axis is three channels, and a batch
    # does not stay in the processor's cache from the product to the difference.
    scale, shift = (np.resize(v, width * channels) for v in scale_and_shift(transform.mean, transform.std))
    out = np.empty(images.shape, np.float32)
    rows = (count, height, width * channels)
    for image, result in zip(images.reshape(rows), out.reshape(rows), strict=True):
        np.multiply(image, scale, out=result)
        result -= shift
    return out


def scale_and_shift(mean: Sequence[float], std: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """float32 a, b with (x / 255 - mean) / std = a x - b, of 1 or `channels` numbers each."""
    count = max(len(mean), len(std))
    mean64, std64 = (np.resize(np.asarray(v, np.float64), count) for v in (mean, std))
    return (1 / (255 * std64)).astype(np.float32), (mean64 / std64).astype(np.float32)


def fit(image: np.ndarray, size: int, resized: int | None = None) -> np.ndarray:
    """Resizes the shorter side of a uint8 (height, width, channels) image, and cuts out the centre.

    Args:
      image: one that is `size` by `size` is returned unchanged, unless `resized` is given.
      size: height and width of the result.
      resized: length of the shorter side after resizing, at least `size`; the longer side is rounded down,
        and the position of the centre to the nearest even pixel, as in torchvision. None: the shorter side
        becomes `size`, the longer one is rounded to the nearest pixel and the position of the centre down.
    """
    height, width, _ = image.shape
    if resized is None:
        if (height, width) == (size, size):
            return image
        scale = size / min(height, width)
        height, width = max(size, round(height * scale)), max(size, round(width * scale))
        top, left = (height - size) // 2, (width - size) // 2
    else:
        shorter = min(height, width)
        height, width = (int(resized * side / shorter) for side in (height, width))
        top, left = round((height - size) / 2), round((width - size) / 2)
    return resize(image, (height, width))[top : top + size, left : left + size]


def _is_share_range(area: tuple[float, ...]) -> bool:
    return len(area) == 2 and 0 < area[0] <= area[1] <= 1


def _is_magnitude(value: int) -> bool:
    return isinstance(value, int | np.integer) and 1 <= value <= MAX_MAGNITUDE
