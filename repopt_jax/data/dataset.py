"""What a data set is: information about it, and a train and an eval split with random access to examples.

There are two kinds. A `Source` has one label for each image; an `AnnotatedSource` has boxes, classes and
keypoints of any number of objects in each image.
"""

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict, TypeVar

import numpy as np

from repopt_jax.arguments import check_kind

Item = TypeVar("Item", covariant=True)

HOLD_OUT_SEED = 20_240_229  # of the order in which training images are held out


class RandomAccess(Sequence[Item], ABC):
    """A sequence of examples, each of which is made when it is asked for.

    Attributes:
      max_pixels: that an image file of it may have; None for `images.MAX_PIXELS`.
    """

    max_pixels: int | None = None

    @abstractmethod
    def example(self, index: int) -> Item:
        """The example at `index`, 0 <= index < len.

        Raises:
          ValueError: the image cannot be decoded; the message names it.
        """

    def __getitem__(self, index: int) -> Item:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The example at `index`, counted from the end where it is negative.

        Raises:
          IndexError: no such example.
          ValueError: the image cannot be decoded; the message names it.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"`index` {index} is outside a split of {len(self)} images")
        return self.example(index % len(self))

    def path(self, index: int) -> str | None:
        """The image file of the example at `index`, 0 <= index < len; None where there is none."""
        return None


class Part(RandomAccess[Any]):
    """The examples of a split at some of its indices."""

    def __init__(self, whole: Sequence[Any], indices: np.ndarray):
        self.whole = whole
        self.indices = indices
        self.max_pixels: int | None = getattr(whole, "max_pixels", None)

    def __len__(self) -> int:
        return len(self.indices)

    def example(self, index: int) -> Any:
        return self.whole[int(self.indices[index])]

    def path(self, index: int) -> str | None:
        whole = self.whole
        return whole.path(int(self.indices[index])) if isinstance(whole, RandomAccess) else None


def part_of(source: Any, split: str, indices: np.ndarray) -> Part:
    """The examples of a split of a `Source` or an `AnnotatedSource` at some of its indices."""
    kind = AnnotatedPart if isinstance(source, AnnotatedSource) else Part
    return kind(getattr(source, split), indices)


def hold_out(source: Any, count: int) -> Any:
    """The data set with `count` of its training images in place of those for evaluation.

    Which ones they are depends on `count` and on the number of training images only, so that all runs of a
    comparison hold out the same ones.

    Args:
      source: a `Source` or an `AnnotatedSource`.
      count: images to hold out.

    Raises:
      ValueError: fewer than one image would be left on either side.
    """
    check_source(source)
    check_kind("count", count, numbers.Integral, "a whole number")
    total = source.info.num_train
    if not 1 <= count < total:
        raise ValueError(
            f"`validation` is {count}, but there are {total} training images: it must be in [1, {total - 1}]"
        )
    order = np.random.default_rng(HOLD_OUT_SEED).permutation(total)
    held, kept = (part_of(source, "train", np.sort(part)) for part in (order[:count], order[count:]))
    info = replace(source.info, num_train=len(kept), num_eval=len(held))
    return replace(source, info=info, train=kept, eval=held)


# -- labelled images -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What is known of a labelled data set without decoding its images.

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
        """Number of classes."""
        return len(self.class_names)


class Example(TypedDict):
    """One decoded example: `image` is uint8 (height, width, channels), `label` an int."""

    image: np.ndarray
    label: int


@dataclass(frozen=True, eq=False)
class Source:
    """A labelled data set to train on. `train` and `eval` may be any sequences of `Example`, even lists.

    Attributes:
      info: names, counts and shapes.
      train: random access to the training images.
      eval: random access to the images that are kept for evaluation.
      skipped: images that were left out because they cannot be read, `check.BadImage`.
    """

    info: DatasetInfo
    train: Sequence[Example]
    eval: Sequence[Example]
    skipped: tuple[Any, ...] = ()
    # Decoded images, which live as long as the source, so that a second evaluation does not decode again.
    cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)


# -- annotated images ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DetectionInfo:
    """What is known of an annotated data set without decoding its images.

    Attributes:
      name: for people and for the metadata of runs.
      class_names: class `i` means `class_names[i]`.
      keypoint_names: keypoint `k` of every object means `keypoint_names[k]`; may be empty.
      channels: 1 (grey) or 3 (RGB); images of other modes are converted to it.
      max_objects: objects of one image that a batch has room for.
      num_train: images in the train split.
      num_eval: images in the eval split.
      flip_pairs: pairs of keypoints that trade places when an image is mirrored, such as the two eyes.
      sigmas: for each keypoint how exact its place is, as a share of the object's scale (the square root of
        its area): the constants of COCO's object keypoint similarity.

    Raises:
      ValueError: values that do not fit together; it lists all problems.
    """

    name: str
    class_names: tuple[str, ...]
    keypoint_names: tuple[str, ...]
    channels: int
    max_objects: int
    num_train: int
    num_eval: int
    flip_pairs: tuple[tuple[int, int], ...]
    sigmas: tuple[float, ...]

    def __post_init__(self) -> None:
        count = len(self.keypoint_names)
        paired = [k for pair in self.flip_pairs for k in pair]
        are_pairs = all(len(pair) == 2 for pair in self.flip_pairs) and len(set(paired)) == len(paired)
        problems = [
            message
            for holds, message in (
                (self.channels in (1, 3), f"`channels` is {self.channels}; it must be 1 or 3"),
                (self.max_objects >= 1, f"`max_objects` is {self.max_objects}; it must be at least 1"),
                (
                    len(self.sigmas) == count,
                    f"`sigmas` has {len(self.sigmas)} numbers, but there are {count} keypoints; "
                    "give one for each",
                ),
                (
                    all(math.isfinite(s) and s > 0 for s in self.sigmas),
                    f"`sigmas` is {self.sigmas}; it must be positive and finite",
                ),
                (
                    are_pairs and all(0 <= k < count for k in paired),
                    f"`flip_pairs` is {self.flip_pairs}; it must be pairs of different keypoints "
                    f"in [0, {count})",
                ),
            )
            if not holds
        ]
        if problems:
            raise ValueError(", and ".join(problems))

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def num_keypoints(self) -> int:
        """Number of keypoints of each object."""
        return len(self.keypoint_names)


class Objects(TypedDict):
    """The n objects of one image.

    Coordinates are continuous, in pixels of the image as it is stored, x to the right and y down: the upper
    left corner of the image is (0, 0) and the middle of its first pixel (0.5, 0.5), so that resizing an image
    multiplies them and mirroring it takes x to width - x.

    boxes: float32 (n, 4): x1, y1, x2, y2.
    classes: int32 (n,).
    keypoints: float32 (n, K, 3): x, y and a flag, 0 (not labelled: x and y mean nothing), 1 (hidden) or 2
      (visible).
    crowd: bool (n,): a box around many objects at once, which is not trained on and is not counted as a
      mistake where it is found.
    area: float32 (n,): of the object in pixels, the scale of the evaluation; that of the box where nothing
      better is known.
    """

    boxes: np.ndarray
    classes: np.ndarray
    keypoints: np.ndarray
    crowd: np.ndarray
    area: np.ndarray


class AnnotatedExample(Objects):
    """One decoded example: its objects, and `image`, uint8 (height, width, channels)."""

    image: np.ndarray


class AnnotatedSplit(RandomAccess[AnnotatedExample]):
    """Random access to annotated examples, and to their objects without decoding the image."""

    @abstractmethod
    def objects(self, index: int) -> Objects:
        """The objects of image `index`, 0 <= index < len."""

    @abstractmethod
    def image(self, index: int) -> np.ndarray:
        """Image `index`, 0 <= index < len: uint8 (height, width, channels)."""

    def example(self, index: int) -> AnnotatedExample:
        return {"image": self.image(index), **self.objects(index)}


class AnnotatedPart(Part, AnnotatedSplit):
    """The annotated examples of a split at some of its indices."""

    whole: AnnotatedSplit

    def objects(self, index: int) -> Objects:
        return self.whole.objects(int(self.indices[index]))

    def image(self, index: int) -> np.ndarray:
        return self.whole.image(int(self.indices[index]))


@dataclass(frozen=True, eq=False)
class AnnotatedSource:
    """An annotated data set to train on.

    Attributes:
      info: names and counts.
      train: random access to the training images.
      eval: random access to the images that are kept for evaluation.
      skipped: as in `Source`.
    """

    info: DetectionInfo
    train: AnnotatedSplit
    eval: AnnotatedSplit
    skipped: tuple[Any, ...] = ()
    # As in `Source`.
    cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)


# Classes of data sets -> what they are called in messages.
_NAMES = {Source: "a labelled", AnnotatedSource: "an annotated"}


def check_source(source: Any, kind: type[Source] | type[AnnotatedSource] | None = None) -> None:
    """Raises TypeError if an argument `source` is no data set, or none of this class."""
    name = "a" if kind is None else _NAMES[kind]
    check_kind("source", source, kind or tuple(_NAMES), f"{name} data set, such as `open_source` returns")
