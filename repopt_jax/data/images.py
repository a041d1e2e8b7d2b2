"""Encoded images: reading and decoding image files, and the conversions between arrays and Pillow images.

Only what a training set needs is decoded: PNG, JPEG, WebP and BMP, told by their content, whatever the name
of the file says. Everything else that Pillow can open is refused (some of it starts other programs, or takes
gigabytes of memory for a few bytes). So is, before it is decoded, an image of more than MAX_PIXELS, or of
more than FREE_PIXELS in a file that has too few bytes to hold a picture of that size.
"""

import io
import os
import stat
import warnings
from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, NamedTuple

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
FORMATS = "PNG, JPEG, WebP or BMP"
# Of an image, if nothing else is asked for: 100 MB as RGB, and several times that to decode it.
MAX_PIXELS = 2**25
# A blank page has 64 (JPEG) to 654 (WebP) pixels for each byte of its file; a WebP of 90 bytes claims 10^8.
FREE_PIXELS, MAX_DENSITY = 2**24, 1000
MAX_BYTES = 2**28  # of a file
ORIENTATION = 0x0112  # EXIF's tag
# What Pillow says of damaged notes of a camera, whose pixels are whole.
warnings.filterwarnings("ignore", "Corrupt EXIF data|Truncated File Read|Metadata Warning", UserWarning)
PNG_END = b"IEND\xaeB`\x82"  # the last chunk, with its checksum


class Record(NamedTuple):
    """A labelled image as it is stored: encoded bytes, the label, and a name for error messages."""

    encoded: bytes
    label: int
    name: str


class Split(RandomAccess[Example]):
    """Decodes the records of `records` (random access to `Record`) as they are asked for."""

    def __init__(self, records: Sequence[Record], *, channels: int, max_pixels: int | None = None):
        self._records = records
        self._channels = channels
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self._records)

    def example(self, index: int) -> Example:
        record = self._records[index]
        image = decode_image(
            record.encoded, channels=self._channels, name=record.name, max_pixels=self.max_pixels
        )
        return {"image": image, "label": record.label}

    def path(self, index: int) -> str | None:
        path = getattr(self._records, "path", None)  # records of a folder have one
        return None if path is None else path(index)


def decode_image(encoded: bytes, *, channels: int, name: str, max_pixels: int | None = None) -> np.ndarray:
    """Decodes PNG, JPEG, WebP or BMP to uint8 (height, width, `channels`).

    With one channel, colours are reduced to their luminance; with three, grey values are repeated. Palettes
    are resolved and transparency is dropped. EXIF's orientation is applied, so that the image stands as a
    viewer shows it; of an animation the first picture is taken. Decoding three channels takes 10 bytes of
    memory for each pixel of a PNG or JPEG and 18 of a WebP, 0.6 GB of the largest one; turning takes 4 more,
    and so does another mode, such as that of a PNG with transparency.

    Args:
      encoded: the content of the file.
      channels: 1 or 3.
      name: of the image, for messages.
      max_pixels: that an image may have; None for MAX_PIXELS.

    Raises:
      ValueError: not such an image, a damaged or truncated one, one of more than `max_pixels`, one of more
        than FREE_PIXELS in a file with less than a byte for MAX_DENSITY of them, or one with more than 8 bits
        a channel; `name` is in the message.
    """
    try:
        if _format(encoded[:16]) == "PNG" and PNG_END not in encoded:
            raise ValueError("image file is truncated")  # Pillow reads on where only pixels are complete
        mode = "L" if channels == 1 else "RGB"
        with _opened(io.BytesIO(encoded), max_pixels) as opened:
            opened.load()  # what a PNG says of its orientation may follow its pixels
            image = opened if opened.mode == mode else opened.convert(mode)
            image = np.asarray(_upright(image, _orientation(opened)))
    except Exception as error:  # damaged files make Pillow raise nearly anything
        raise _unreadable(name, error) from error
    return image[..., None] if channels == 1 else image


def read_encoded(path: str) -> bytes:
    """The bytes of an image file.

    Raises:
      ValueError: it cannot be read, is none (a pipe or a device, which might never end), or has more than
        MAX_BYTES; the message names it.
    """
    with _open_file(path) as file:
        return file.read()


def _open_file(path: str) -> IO[bytes]:
    try:
        found = os.stat(path)
        if stat.S_ISREG(found.st_mode) and found.st_size <= MAX_BYTES:
            return open(path, "rb")
    except OSError as error:
        raise ValueError(
            f"cannot read image {path} ({error.strerror}); put the file back or open the folder again"
        ) from error
    except ValueError as error:  # a null character
        raise ValueError(f"cannot read image {path!r} ({error})") from error
    reason = f"{found.st_size:,} bytes, more than {MAX_BYTES:,}" if stat.S_ISREG(found.st_mode) else "no file"
    raise ValueError(f"cannot read image {path} ({reason}); replace it or remove it")


def sampled_shape(
    count: int, path: Callable[[int], str], *, max_pixels: int | None = None
) -> tuple[tuple[int, int, int] | None, int]:
    """(shape or None if it varies, channels) of `count` image files, from headers spread evenly over them.

    They have one channel if all the sampled ones are grey, else three. Those that cannot be read are passed
    over.

    Raises:
      ValueError: none of them can be read.
    """
    sampled = min(SAMPLED_HEADERS, count)
    headers, problems = [], []
    for i in range(sampled):
        try:
            headers.append(image_header(path(i * count // sampled), max_pixels=max_pixels))
        except ValueError as error:  # `check` finds it, and may leave it out
            problems.append(error)
    if not headers:
        raise problems[0]
    channels = 1 if all(mode in GREY_MODES for _, mode in headers) else 3
    sizes = {size for size, _ in headers}
    return ((*sizes.pop(), channels) if len(sizes) == 1 else None), channels


def image_header(path: str, *, max_pixels: int | None = None) -> tuple[tuple[int, int], str]:
    """((height, width), mode) of an image file as `decode_image` gives it, without decoding the pixels.

    Raises:
      ValueError: not an image, or one that is too large, as for `decode_image`; the message names the file.
    """
    with _open_file(path) as file:
        try:
            with _opened(file, max_pixels) as opened:
                turned = _orientation(opened) >= 5
                height, width = opened.height, opened.width
                return ((width, height) if turned else (height, width)), opened.mode
        except Exception as error:  # damaged files make Pillow raise nearly anything
            raise _unreadable(path, error) from error


def exchanges_sides(encoded: bytes, *, max_pixels: int | None = None) -> bool:
    """Whether the EXIF orientation of an image that can be read exchanges its width and its height."""
    with _opened(io.BytesIO(encoded), max_pixels) as opened:
        opened.load()
        return _orientation(opened) >= 5


def quick_problem(path: str, *, max_pixels: int | None = None) -> str | None:
    """What is wrong with an image file by its beginning and its end, without decoding it; None if nothing is.

    A file that is empty, cut or no image is found; damage in its middle is not.
    """
    try:
        with _open_file(path) as file:
            beginning = file.read(16)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 12))
            end = file.read()
    except (ValueError, OSError) as error:
        return str(error)
    complete = {
        "PNG": end.endswith(PNG_END),
        "JPEG": end.endswith(b"\xff\xd9"),
        "WebP": int.from_bytes(beginning[4:8], "little") + 8 <= size,
        "BMP": int.from_bytes(beginning[2:6], "little") <= size,
    }
    try:
        if complete.get(_format(beginning), False):
            image_header(path, max_pixels=max_pixels)
        else:  # a whole file may have more after its end
            decode_image(read_encoded(path), channels=3, name=path, max_pixels=max_pixels)
    except ValueError as error:
        return str(error)
    return None


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


def _format(beginning: bytes) -> str:
    """The format of a file that begins so, "" for others."""
    if beginning.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if beginning.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if beginning[:4] == b"RIFF" and beginning[8:12] == b"WEBP":
        return "WebP"
    return "BMP" if beginning.startswith(b"BM") else ""


class _TooLarge(ValueError):
    """Why an image is not decoded, and what to do."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(reason)
        self.remedy = remedy


def _opened(file: IO[bytes], max_pixels: int | None) -> "Image.Image":
    """A Pillow image of which the header has been read and checked, from a file at its beginning.

    Its class is called itself: `Image.open` would try every format that it knows, and warn of large images.
    """
    from PIL import BmpImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

    classes = {
        "PNG": PngImagePlugin.PngImageFile,
        "JPEG": JpegImagePlugin.JpegImageFile,
        "WebP": WebPImagePlugin.WebPImageFile,
        "BMP": BmpImagePlugin.BmpImageFile,
    }
    kind = _format(file.read(16))
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if not kind:
        raise ValueError(f"not an image in a known format, {FORMATS}")
    opened = classes[kind](file)
    _refuse_large(opened.width, opened.height, size, MAX_PIXELS if max_pixels is None else max_pixels)
    _refuse_deep(opened.mode)
    return opened


def _orientation(image: "Image.Image") -> int:
    """EXIF's, from 1 (upright) to 8; 1 if there is none, or none that can be read."""
    from PIL.Image import Exif

    exif = Exif()
    try:
        # Not `image.getexif()`, which decodes some images first.
        exif.load(image.info.get("exif") or b"")
        found = exif.get(ORIENTATION, 1)
    except Exception:  # damaged ones make Pillow raise nearly anything, and the pixels may be whole
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _upright(image: "Image.Image", orientation: int) -> "Image.Image":
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image if orientation == 1 else image.transpose(turns[orientation])


def _refuse_large(width: int, height: int, size: int, max_pixels: int) -> None:
    pixels = width * height
    found = f"{width} x {height} = {pixels:,} pixels in {size:,} bytes"
    if pixels > max_pixels:
        raise _TooLarge(
            f"{found}, more than {max_pixels:,} pixels",
            "make it smaller, remove it, or allow more with `max_pixels` (--config.data.max_pixels)",
        )
    if pixels > FREE_PIXELS and pixels > MAX_DENSITY * size:
        raise _TooLarge(
            f"{found}, more than {MAX_DENSITY} for each byte, as no picture has and files that exhaust the "
            "memory have",
            f"remove it, or make it smaller, at most {FREE_PIXELS:,} pixels",
        )


def _refuse_deep(mode: str) -> None:
    if mode in DEEP_MODES:
        raise ValueError(f"more than 8 bits a channel, Pillow mode {mode}")


def _unreadable(name: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()) or type(error).__name__
    remedy = error.remedy if isinstance(error, _TooLarge) else "replace the file or remove it"
    return ValueError(f"cannot read image {name} ({reason}); {remedy}")
