"""What is done to images between decoding and the network, in numpy.

An image is *fitted* to a square (a plain function of the image), then augmented by numbers drawn for it,
then normalised. The random numbers come from outside: an image and its draws always give the same result.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

# Uniform numbers in [0, 1) that augmentation uses for one image, in this order.
DRAWS = ("top", "left", "flip", "area", "ratio", "y", "x")


@dataclass(frozen=True)
class Transform:
    """How images are made ready. Evaluation uses `image_size`, `mean` and `std` only.

    Attributes:
      image_size: height and width that the network is given, in pixels. Images of another size are resized,
        the shorter side to `image_size` (bilinear), and the centre is cut out.
      crop_padding: in training, pad with this many black pixels on each side and cut out a random square.
      flip: in training, mirror half of the images, at random.
      area: in training, instead of fitting the whole image, resize a random part of it: the part's share of
        the image's area is drawn from this range and its aspect from [3/4, 4/3] (the crop of ImageNet
        recipes).
      mean: subtracted from pixel values that are scaled to [0, 1]; one number, or one for each channel.
      std: what the difference is divided by; one number, or one for each channel.

    Raises:
      ValueError: a value out of its range.
    """

    image_size: int
    crop_padding: int = 0
    flip: bool = False
    area: tuple[float, ...] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self):
        for name, least in (("image_size", 1), ("crop_padding", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"`{name}` is {value}; it must be at least {least}")
        area = self.area
        if area is not None and not (len(area) == 2 and 0 < area[0] <= area[1] <= 1):
            raise ValueError(f"`area` is {self.area}; it must be (low, high), 0 < low <= high <= 1")
        if not all(math.isfinite(v) for v in self.mean):
            raise ValueError(f"`mean` is {self.mean}; it must be finite")
        if not all(math.isfinite(v) and v > 0 for v in self.std):
            raise ValueError(f"`std` is {self.std}; it must be positive and finite")

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
      draws: uniform numbers in [0, 1), (batch, len(DRAWS)).
      transform: `crop_padding` and `flip` say what is done.

    Returns:
      uint8, the shape of `images`.
    """
    padding, size = transform.crop_padding, images.shape[1]
    if not padding and not transform.flip:
        return images
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    corners = np.floor(draws[:, :2] * (2 * padding + 1)).astype(int)
    flips = (draws[:, 2] < 0.5) & transform.flip
    out = np.empty_like(images)
    for row, ((top, left), flip) in enumerate(zip(corners, flips, strict=True)):
        window = padded[row, top : top + size, left : left + size]
        out[row] = window[:, ::-1] if flip else window
    return out


def normalise(images: np.ndarray, transform: Transform) -> np.ndarray:
    """(images / 255 - mean) / std, as float32."""
    mean, std = (np.asarray(v, np.float64) for v in (transform.mean, transform.std))
    out = images.astype(np.float32)
    out *= (1 / (255 * std)).astype(np.float32)
    out -= (mean / std).astype(np.float32)
    return out


def fit(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes the shorter side of a uint8 (height, width, channels) image to `size`, cuts out the centre.

    An image that is `size` by `size` is returned as it is.
    """
    height, width, _ = image.shape
    if (height, width) == (size, size):
        return image
    scale = size / min(height, width)
    height, width = max(size, round(height * scale)), max(size, round(width * scale))
    resized = resize(image, (height, width))
    top, left = (height - size) // 2, (width - size) // 2
    return resized[top : top + size, left : left + size]


def random_part(image: np.ndarray, size: int, draws: np.ndarray, area: tuple[float, ...]) -> np.ndarray:
    """Resizes a random part of a uint8 (height, width, channels) image to (size, size, channels).

    The part's share of the area is uniform in `area` and the logarithm of width/height uniform in log [3/4,
    4/3]; a side that would be longer than the image is cut to it. `draws` holds len(DRAWS) uniform numbers.
    """
    height, width, _ = image.shape
    _, _, _, share, ratio, y, x = draws
    pixels = height * width * (area[0] + share * (area[1] - area[0]))
    aspect = math.exp((2 * ratio - 1) * math.log(4 / 3))
    part_width = min(width, max(1, round(math.sqrt(pixels * aspect))))
    part_height = min(height, max(1, round(math.sqrt(pixels / aspect))))
    top = math.floor(y * (height - part_height + 1))
    left = math.floor(x * (width - part_width + 1))
    part = image[top : top + part_height, left : left + part_width]
    return resize(part, (size, size))


def resize(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resizes a uint8 (height, width, channels) image to `shape`, (height, width); bilinear, antialiased."""
    grey = image.shape[-1] == 1
    picture = Image.fromarray(np.ascontiguousarray(image[..., 0] if grey else image))
    resized = np.asarray(picture.resize((shape[1], shape[0]), Image.Resampling.BILINEAR))
    return resized[..., None] if grey else resized
