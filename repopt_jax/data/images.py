"""Encoded images: reading and decoding image files, and the conversions between arrays and Pillow images."""

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from repopt_jax.data.dataset import Example, RandomAccess

if TYPE_CHECKING:
    from PIL import Image

# Pillow's modes that hold one grey value for each pixel; converting `1` and `LA` to `L` loses nothing that
# matters.
GREY_MODES = ("1", "L", "LA")
# Headers that are read when a folder is opened, to learn its colour mode and size: enough to notice a mixed
# folder, few enough to cost nothing on a million images.
SAMPLED_HEADERS = 64
# Modes of more than 8 bits a channel: Pillow would clip them when converting, so they are refused.
DEEP_MODES = ("F", "I", "I;16", "I;16B", "I;16L", "I;16N")


class Record(NamedTuple):
    """A labelled image as it is stored: encoded bytes, the label, and a name for error messages."""

    encoded: bytes
    label: int
    name: str


class Split(RandomAccess[Example]):
    """Decodes the records of `records` (random access to `Record`) as they are asked for."""

    def __init__(self, records: Sequence[Record], *, channels: int):
        self._records = records
        self._channels = channels

    def __len__(self) -> int:
        return len(self._records)

    def example(self, index: int) -> Example:
        record = self._records[index]
        image = decode_image(record.encoded, channels=self._channels, name=record.name)
        return {"image": image, "label": record.label}


def decode_image(encoded: bytes, *, channels: int, name: str) -> np.ndarray:
    """Decodes PNG, JPEG or any other format that Pillow reads, to uint8 (height, width, `channels`).

    With one channel, colours are reduced to their luminance; with three, grey values are repeated. Palettes
    are resolved and transparency is dropped. Orientation tags are not applied, as in torchvision's image
    folder.

    Raises:
      ValueError: not an image, a damaged one, or one with more than 8 bits a channel; `name` is in the
        message.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded)) as opened:
            _refuse_deep(opened.mode)
            image = np.asarray(opened.convert("L" if channels == 1 else "RGB"))
    except Exception as error:  # damaged files make Pillow raise nearly anything
        raise _unreadable(name, error) from error
    return image[..., None] if channels == 1 else image


def read_encoded(path: str) -> bytes:
    """The bytes of an image file.

    Raises:
      ValueError: it cannot be read; the message names it.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ValueError(
            f"cannot read image {path} ({error.strerror}); put the file back or open the folder again"
        ) from error


def sampled_shape(count: int, path: Callable[[int], str]) -> tuple[tuple[int, int, int] | None, int]:
    """(shape or None if it varies, channels) of `count` image files, from headers spread evenly over them.

    They have one channel if all the sampled ones are grey, else three.
    """
    sampled = min(SAMPLED_HEADERS, count)
    headers = [image_header(path(i * count // sampled)) for i in range(sampled)]
    channels = 1 if all(mode in GREY_MODES for _, mode in headers) else 3
    sizes = {size for size, _ in headers}
    return ((*sizes.pop(), channels) if len(sizes) == 1 else None), channels


def image_header(path: str) -> tuple[tuple[int, int], str]:
    """((height, width), mode) of an image file, read without decoding the pixels.

    Raises:
      ValueError: not an image; the message names the file.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            _refuse_deep(opened.mode)
            return (opened.height, opened.width), opened.mode
    except Exception as error:  # damaged files make Pillow raise nearly anything
        raise _unreadable(path, error) from error


def resize(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resizes a uint8 (height, width, channels) image to `shape`, (height, width); bilinear, antialiased."""
    from PIL import Image

    return from_pillow(to_pillow(image).resize((shape[1], shape[0]), Image.Resampling.BILINEAR))


def to_pillow(image: np.ndarray) -> "Image.Image":
    """A uint8 (height, width, 1 or 3) array as a Pillow image, mode L or RGB."""
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image))


def from_pillow(image: "Image.Image") -> np.ndarray:
    """A Pillow image, mode L or RGB, as a uint8 (height, width, 1 or 3) array."""
    array = np.asarray(image)
    return array[..., None] if image.mode == "L" else array


def _refuse_deep(mode: str) -> None:
    if mode in DEEP_MODES:
        raise ValueError(f"more than 8 bits a channel, Pillow mode {mode}")


def _unreadable(name: str, error: Exception) -> ValueError:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        reason = "not an image in a known format"
    else:
        reason = str(error) or type(error).__name__
    return ValueError(f"cannot read image {name} ({reason}); replace the file or remove it")
