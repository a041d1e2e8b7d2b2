"""What an exported file says of the network in it: classes, preprocessing, layout, and how outputs are read.

Images belong to a network as much as its weights: another mean and standard deviation than in training cost
points of accuracy, and nothing fails. So the file holds them.
"""

import dataclasses
import functools
import json
import typing
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from repopt_jax._version import __version__
from repopt_jax.arguments import is_finite, is_of, must_be
from repopt_jax.data.detection import DetectionTransform
from repopt_jax.data.transforms import Transform

LIBRARY = "repopt_jax"
LAYOUTS = ("NHWC", "NCHW")
# What a file's input holds -> its dtype.
INPUTS = {"normalised": "float32", "uint8": "uint8", "float32": "float32"}
# The mean and std with which `Transform` leaves pixel values from 0 to 255 as they are.
RAW = ((0.0,), (1 / 255,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metadata:
    """What a file says of its network.

    Attributes:
      task: "classify" or "detect"; "" for a network that is neither.
      name, architecture: of the network.
      class_names: of a classifier or detector.
      keypoint_names: of a detector.
      image_size: height and width of the input, in pixels.
      channels: of the input.
      resize: as in `data.Transform`.
      mean, std: of the preprocessing, (pixels / 255 - mean) / std; one number, or one for each channel.
      input: "normalised" if the file takes images after that; "uint8" or "float32" if it takes pixel values
        from 0 to 255 of this dtype, and computes it itself.
      layout: order of the input's axes, "NHWC" or "NCHW".
      strides: of a detector, pixels from one location to the next, level by level.
      score_threshold, iou_threshold, max_detections: of a detector, as in `detection.decode`.
      decoded: of a detector, whether the outputs are `Detections`, not `Outputs`.
      library: the program that wrote the file.

    Raises:
      ValueError: values of another type, out of their ranges, or that do not fit together; it lists all.
    """

    REQUIRED: ClassVar[frozenset[str]] = frozenset(
        ("task", "image_size", "channels", "mean", "std", "input", "layout")
    )

    task: str = ""
    name: str = ""
    architecture: str = ""
    class_names: tuple[str, ...] = ()
    keypoint_names: tuple[str, ...] = ()
    image_size: int = 0
    channels: int = 0
    resize: int | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    input: str = "normalised"
    layout: str = "NHWC"
    strides: tuple[int, ...] = ()
    score_threshold: float = 0.05
    iou_threshold: float = 0.6
    max_detections: int = 100
    decoded: bool = False
    library: str = f"{LIBRARY} {__version__}"

    def __post_init__(self) -> None:
        wrong = {}
        for name, kind in _kinds().items():
            value = _plain(getattr(self, name), kind)
            object.__setattr__(self, name, value)
            if not is_of(value, kind) or not is_finite(value):
                wrong[name] = f"{must_be(kind)}{' or None' if is_of(None, kind) else ''}"
        wrong |= self._rules(set(wrong))
        if wrong:
            texts = (
                f"`{n}` is {getattr(self, n)!r:.100}; it must {wrong[n]}" for n in _kinds() if n in wrong
            )
            raise ValueError(", and ".join(texts))

    def _rules(self, unknown: set[str]) -> dict[str, str]:
        """What fields must be that break a rule; nothing is said of `unknown` ones or by them."""
        detects, size, channels = self.task == "detect", self.image_size, self.channels
        numbers = (
            "one number" if "channels" in unknown else f"one number, or one for each of {channels} channels"
        )
        rules: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
            ("task", lambda v: v in ("", "classify", "detect"), "'', 'classify' or 'detect'"),
            ("class_names", lambda v: bool(v) or not self.task, "given"),
            ("image_size", lambda v: v >= 1, "at least 1"),
            ("channels", lambda v: v >= 1, "at least 1"),
            (
                "resize",
                lambda v: v is None or detects or "image_size" in unknown or v >= size,
                f"None or at least `image_size`, {size}",
            ),
            ("mean", lambda v: "channels" in unknown or len(v) in (1, channels), numbers),
            (
                "std",
                lambda v: all(n > 0 for n in v) and ("channels" in unknown or len(v) in (1, channels)),
                f"positive, {numbers}",
            ),
            ("input", lambda v: v in INPUTS, f"one of {', '.join(INPUTS)}"),
            ("layout", lambda v: v in LAYOUTS, f"one of {', '.join(LAYOUTS)}"),
            ("strides", lambda v: bool(v) == detects, "given for a detector, and for it only"),
            ("strides", lambda v: all(n >= 1 for n in v), "at least 1 each"),
            ("score_threshold", lambda v: 0 <= v <= 1, "from 0 to 1"),
            ("iou_threshold", lambda v: 0 <= v <= 1, "from 0 to 1"),
            ("max_detections", lambda v: v >= 1, "at least 1"),
            ("decoded", lambda v: detects or not v, "False, except for a detector"),
        )
        known = (entry for entry in rules if entry[0] not in unknown)
        return {name: f"be {rule}" for name, holds, rule in known if not holds(getattr(self, name))}

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape of an image as the file takes it, without the batch."""
        side, channels = self.image_size, self.channels
        return (side, side, channels) if self.layout == "NHWC" else (channels, side, side)

    @property
    def dtype(self) -> str:
        """The dtype of the input."""
        return INPUTS[self.input]

    @property
    def pixels(self) -> Transform:
        """Size and normalisation alone, those that the network was trained with."""
        return Transform(self.image_size, mean=self.mean, std=self.std)

    def describe_input(self) -> str:
        """What the images of the input are, for people."""
        if self.input != "normalised":
            return "pixel values from 0 to 255"
        return f"(pixels / 255 - mean) / std, mean {list(self.mean)}, std {list(self.std)}"

    def transform(self) -> Transform | DetectionTransform:
        """What is done to images before they are given to the file."""
        mean, std = (self.mean, self.std) if self.input == "normalised" else RAW
        if self.task == "detect":
            return DetectionTransform(self.image_size, mean=mean, std=std)
        return Transform(self.image_size, resize=self.resize, mean=mean, std=std)

    def to_strings(self) -> dict[str, str]:
        """Name of each field -> its value, as it is if it is a string, else as JSON."""
        fields = dataclasses.asdict(self)
        return {n: value if isinstance(value, str) else json.dumps(value) for n, value in fields.items()}

    @classmethod
    def from_strings(cls, given: Mapping[str, str]) -> "Metadata":
        """The metadata that `to_strings` wrote; other names are left out.

        Raises:
          ValueError: not written by this library, or with values that no file of it has.
        """
        if not given.get("library", "").startswith(LIBRARY):
            raise ValueError(f"it has no metadata of {LIBRARY}, so that nothing tells how it takes images")
        kinds = _kinds()
        values = {name: _value(name, given[name], kinds[name]) for name in kinds.keys() & given.keys()}
        missing = sorted(cls.REQUIRED - values.keys())
        if missing:
            raise ValueError(f"its metadata lack {', '.join(missing)}")
        return cls(**values)


def _value(name: str, text: str, kind: Any) -> Any:
    """The value of the field `name`, of the type `kind`, that `to_strings` has written as `text`."""
    if kind is str:
        return text
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"its metadata have the damaged entry {name}: {error}") from error


@functools.cache
def _kinds() -> dict[str, Any]:
    """The type of each field."""
    hints = typing.get_type_hints(Metadata)
    return {field.name: hints[field.name] for field in dataclasses.fields(Metadata)}


def _plain(value: Any, kind: Any) -> Any:
    """A value as Python has it: numbers and lists of NumPy, one number where several may be given."""
    value = value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
    if typing.get_origin(kind) is not tuple:
        return value
    if isinstance(value, (list, tuple)):
        return tuple(v.item() if isinstance(v, np.generic) else v for v in value)
    return (value,) if float in typing.get_args(kind) and is_of(value, float) else value
