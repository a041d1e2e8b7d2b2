"""What is done to images between decoding and the network, in numpy.

An image is *fitted* to a square (a plain function of the image) or a random part of it is cut out, then
augmented, then normalised, then erased from and mixed with another. The random numbers come from outside:
an image and its numbers always give the same result.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from repopt_jax.data.distortion import to_array, to_picture
from repopt_jax.data.randaugment import LARGEST_MAGNITUDE

# Uniform numbers in [0, 1) of one image: those of the top and the left of the crop, of the flip, and four
# that are not used any more. They are still drawn, for with fewer every crop of a run would be another one.
NUM_DRAWS = 7
# The random part of `area`, as torchvision's RandomResizedCrop: aspect (width / height), and tries.
PART_ASPECT = (3 / 4, 4 / 3)
PART_TRIES = 10


@dataclass(frozen=True)
class Transform:
    """How images are made ready. Evaluation uses `image_size`, `resize`, `mean` and `std` only.

    In training: cut out (`area`, or `resize` and `crop_padding`), `flip`, `randaugment`, `jitter`, normalise,
    `erasing`, and `mixup` or `cutmix`, in this order. Everything but `image_size` is off by default. Images
    may be grey or of any size; strengths that are given in pixels elsewhere are shares of the image here.

    Attributes:
      image_size: height and width that the network is given, in pixels. Images of another size are resized,
        the shorter side to `image_size` (bilinear), and the centre is cut out.
      crop_padding: in training, pad with this many black pixels on each side and cut out a random square.
      flip: in training, mirror half of the images, at random.
      area: in training, instead of fitting the whole image, resize a random part of it: the part's share of
        the image's area is drawn from this range and its aspect from [3/4, 4/3] (the crop of ImageNet
        recipes, which have (0.08, 1.0); see `random_part`).
      resize: resize the shorter side to this instead of `image_size` before the centre is cut out, as in 256
        for an `image_size` of 224, in evaluation, and in training where `area` is None. With it sizes are
        rounded as torchvision's Resize and CenterCrop do; without, to the nearest pixel.
      randaugment: in training, two random operations of magnitudes below this one, in [1, 30]; see
        `repopt_jax.data.randaugment`. The "raug15" of the RepVGG and RepOptimizers recipes is 15.
      jitter: in training, change brightness, contrast and saturation, in random order, each by a factor in
        [1 - jitter, 1 + jitter].
      erasing: in training, the probability that a random box (0.02 to 1/3 of the area) of an image is set to
        0 after normalisation.
      mixup: in training, mix images in pairs, by shares of the distribution Beta(mixup, mixup).
      cutmix: in training, paste a box of one image of a pair into the other, of an area by Beta(cutmix,
        cutmix). Where both are given, each pair takes one of them, at even odds.
      mean: subtracted from pixel values that are scaled to [0, 1]; one number, or one for each channel.
      std: what the difference is divided by; one number, or one for each channel.

    Raises:
      ValueError: values out of their ranges; it names all of them.
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

    def __post_init__(self):
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
                f"None or an integer in [1, {LARGEST_MAGNITUDE}]",
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
        """Raises ValueError where `mean` or `std` does not fit images of `channels` channels."""
        for name in ("mean", "std"):
            value = getattr(self, name)
            if len(value) not in (1, channels):
                raise ValueError(
                    f"`{name}` has {len(value)} numbers, but the images have {channels} channels; "
                    f"give one number or {channels}"
                )


def augment(images: np.ndarray, draws: np.ndarray, transform: Transform) -> np.ndarray:
    """Random crop after zero padding, and random flip.

    Args:
      images: uint8 (batch, size, size, channels).
      draws: uniform numbers in [0, 1), (batch, NUM_DRAWS).
      transform: `crop_padding` and `flip` say what is done.

    Returns:
      uint8, the shape of `images`.
    """
    padding, size = transform.crop_padding, images.shape[1]
    if not padding and not transform.flip:
        return images
    padded = images
    if padding:
        padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    corners = np.floor(draws[:, :2] * (2 * padding + 1)).astype(int)
    flips = (draws[:, 2] < 0.5) & transform.flip
    out = np.empty_like(images)
    for row, ((top, left), flip) in enumerate(zip(corners, flips, strict=True)):
        window = padded[row, top : top + size, left : left + size]
        if flip:
            for channel in range(images.shape[-1]):  # six times as fast as all of them at once
                out[row, ..., channel] = window[:, ::-1, channel]
        else:
            out[row] = window
    return out


def normalise(images: np.ndarray, transform: Transform) -> np.ndarray:
    """(images / 255 - mean) / std, as float32, of uint8 (batch, height, width, channels)."""
    count, height, width, channels = images.shape
    # Whole rows of pixels, image by image: numpy is slow where the last axis is three channels, and a batch
    # does not stay in the processor's cache from the product to the difference.
    mean, std = (
        np.resize(np.asarray(v, np.float64), width * channels) for v in (transform.mean, transform.std)
    )
    scale, shift = (1 / (255 * std)).astype(np.float32), (mean / std).astype(np.float32)
    out = np.empty(images.shape, np.float32)
    rows = (count, height, width * channels)
    for image, result in zip(images.reshape(rows), out.reshape(rows), strict=True):
        np.multiply(image, scale, out=result)
        result -= shift
    return out


def fit(image: np.ndarray, size: int, resized: int | None = None) -> np.ndarray:
    """Resizes the shorter side of a uint8 (height, width, channels) image, and cuts out the centre.

    Args:
      image: one that is `size` by `size` is returned as it is, unless `resized` is given.
      size: height and width of the result.
      resized: what the shorter side becomes, at least `size`; the longer one is rounded down and the place
        of the centre to the nearest even pixel, as in torchvision. None: it becomes `size`, the longer one
        is rounded to the nearest pixel and the place of the centre down.
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


def random_part(
    image: np.ndarray, size: int, area: tuple[float, ...], rng: np.random.Generator
) -> np.ndarray:
    """Resizes a random part of a uint8 (height, width, channels) image to (size, size, channels).

    The rule of torchvision's RandomResizedCrop: the part's share of the area is uniform in `area` and the
    logarithm of width/height uniform in log [3/4, 4/3]; a part that does not fit into the image is drawn
    again, ten times at most, and then the central part is taken: the whole image, but for what makes it wider
    or higher than these aspects.
    """
    top, left, height, width = _part(image.shape[0], image.shape[1], area, rng)
    return resize(image[top : top + height, left : left + width], (size, size))


def _part(
    height: int, width: int, area: tuple[float, ...], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Top, left, height and width of `random_part`."""
    (low, high), (narrowest, widest) = area, PART_ASPECT
    for _ in range(PART_TRIES):
        pixels = height * width * rng.uniform(low, high)
        aspect = math.exp(rng.uniform(math.log(narrowest), math.log(widest)))
        part_height, part_width = round(math.sqrt(pixels / aspect)), round(math.sqrt(pixels * aspect))
        if 0 < part_height <= height and 0 < part_width <= width:
            top, left = rng.integers((height - part_height + 1, width - part_width + 1))
            return int(top), int(left), part_height, part_width
    part_height = min(height, round(width / narrowest))
    part_width = min(width, round(height * widest))
    return (height - part_height) // 2, (width - part_width) // 2, part_height, part_width


def resize(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resizes a uint8 (height, width, channels) image to `shape`, (height, width); bilinear, antialiased."""
    return to_array(to_picture(image).resize((shape[1], shape[0]), Image.Resampling.BILINEAR))


def _is_share_range(area: tuple[float, ...]) -> bool:
    return len(area) == 2 and 0 < area[0] <= area[1] <= 1


def _is_magnitude(value: int) -> bool:
    return isinstance(value, int | np.integer) and 1 <= value <= LARGEST_MAGNITUDE
