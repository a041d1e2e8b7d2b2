"""A labelled image data set: a train and an eval split, each a random-access sequence of decoded images."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict

import numpy as np
from PIL import Image, UnidentifiedImageError

# Modes that hold one grey value a pixel; `1` and `LA` become `L` without loss that matters.
GREY_MODES = ("1", "L", "LA")
# Headers looked at when a folder is opened, to learn its colour mode and size: enough to notice a mixed
# folder, few enough to be free on a million images.
SAMPLED_HEADERS = 64
# More than 8 bits a channel: Pillow would clip these when converting, so they are refused.
DEEP_MODES = ("F", "I", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What is known of a data set without decoding it.

    Attributes:
      name: for people and for the metadata of runs.
      class_names: label `i` means `class_names[i]`.
      channels: 1 (grey) or 3 (RGB); images of other modes are converted to it.
      image_shape: (height, width, channels) of the stored images, or None where they are known to vary.
      num_train: images in the train split.
      num_eval: images in the eval split.
    """

    name: str
    class_names: tuple[str, ...]
    channels: int
    image_shape: tuple[int, int, int] | None
    num_train: int
    num_eval: int

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


class Example(TypedDict):
    """One decoded example: `image` is uint8 (height, width, channels), `label` an int."""

    image: np.ndarray
    label: int


@dataclass(frozen=True, eq=False)
class Source:
    """A data set to train on. `train` and `eval` may be any sequences of `Example`, a list included.

    Attributes:
      info: names, counts and shapes.
      train: random access to the training images.
      eval: random access to the images that are kept for evaluation.
    """

    info: DatasetInfo
    train: Sequence[Example]
    eval: Sequence[Example]
    # Decoded images, kept by the pipeline from one evaluation to the next; see `pipeline.train_batches`.
    kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)


class Record(NamedTuple):
    """An image as it is stored: encoded bytes, the label, and a name for error messages."""

    encoded: bytes
    label: int
    name: str


class Split(Sequence[Example]):
    """Decodes the records of `records` (random access to `Record`) as they are asked for."""

    def __init__(self, records: Sequence[Record], *, channels: int):
        self._records = records
        self._channels = channels

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The example at `index`.

        Raises:
          IndexError: no such example.
          ValueError: the image cannot be decoded; the message names it.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"`index` {index} is outside a split of {len(self)} images")
        record = self._records[index % len(self)]
        image = decode_image(record.encoded, channels=self._channels, name=record.name)
        return {"image": image, "label": record.label}


def decode_image(encoded: bytes, *, channels: int, name: str) -> np.ndarray:
    """Decodes PNG, JPEG or any other format that Pillow reads, to uint8 (height, width, `channels`).

    With one channel colours are reduced to their luminance, with three grey is repeated; palettes are
    resolved and transparency is dropped. Orientation tags are not applied, as in torchvision's image
    folder.

    Raises:
      ValueError: not an image, a damaged one, or one with more than 8 bits a channel; `name` is in the
        message.
    """
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
    looked_at = min(SAMPLED_HEADERS, count)
    headers = [image_header(path(i * count // looked_at)) for i in range(looked_at)]
    channels = 1 if all(mode in GREY_MODES for _, mode in headers) else 3
    sizes = {size for size, _ in headers}
    return ((*sizes.pop(), channels) if len(sizes) == 1 else None), channels


def image_header(path: str) -> tuple[tuple[int, int], str]:
    """((height, width), mode) of an image file, read without decoding the pixels.

    Raises:
      ValueError: not an image; the message names the file.
    """
    try:
        with Image.open(path) as opened:
            _refuse_deep(opened.mode)
            return (opened.height, opened.width), opened.mode
    except Exception as error:  # damaged files make Pillow raise nearly anything
        raise _unreadable(path, error) from error


def _refuse_deep(mode: str) -> None:
    if mode in DEEP_MODES:
        raise ValueError(f"more than 8 bits a channel, Pillow mode {mode}")


def _unreadable(name: str, error: Exception) -> ValueError:
    if isinstance(error, UnidentifiedImageError):
        reason = "not an image in a known format"
    else:
        reason = str(error) or type(error).__name__
    return ValueError(f"cannot read image {name} ({reason}); replace the file or remove it")
