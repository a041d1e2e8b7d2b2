"""An annotated image data set: boxes, classes and keypoints of every object, beside the decoded image.

Coordinates are continuous, in pixels of the image as it is stored, x to the right and y down: the upper left
corner of the image is (0, 0) and the middle of its first pixel (0.5, 0.5), so that resizing an image
multiplies them and mirroring it takes x to width - x.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np


@dataclass(frozen=True, kw_only=True)
class DetectionInfo:
    """What is known of an annotated data set without decoding it.

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
      ValueError: numbers that do not fit together.
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

    def __post_init__(self):
        if self.channels not in (1, 3):
            raise ValueError(f"`channels` is {self.channels}; it must be 1 or 3")
        if self.max_objects < 1:
            raise ValueError(f"`max_objects` is {self.max_objects}; it must be at least 1")
        count = len(self.keypoint_names)
        if len(self.sigmas) != count:
            raise ValueError(
                f"`sigmas` has {len(self.sigmas)} numbers, but there are {count} keypoints; give one for each"
            )
        if not all(math.isfinite(s) and s > 0 for s in self.sigmas):
            raise ValueError(f"`sigmas` is {self.sigmas}; it must be positive and finite")
        paired = [k for pair in self.flip_pairs for k in pair]
        two_each = all(len(pair) == 2 for pair in self.flip_pairs)
        if not two_each or len(set(paired)) != len(paired) or not all(0 <= k < count for k in paired):
            raise ValueError(
                f"`flip_pairs` is {self.flip_pairs}; it must be pairs of different keypoints in [0, {count})"
            )

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def num_keypoints(self) -> int:
        return len(self.keypoint_names)


class Objects(TypedDict):
    """The n objects of one image.

    boxes: float32 (n, 4): x1, y1, x2, y2.
    classes: int32 (n,).
    keypoints: float32 (n, K, 3): x, y and 0 (not labelled; x and y mean nothing), 1 (hidden) or 2 (visible).
    crowd: bool (n,): a box around many objects at once, which is neither to be learned nor a mistake to find.
    area: float32 (n,): of the object in pixels, the scale of the evaluation; the box's where nothing better
      is known.
    """

    boxes: np.ndarray
    classes: np.ndarray
    keypoints: np.ndarray
    crowd: np.ndarray
    area: np.ndarray


class AnnotatedExample(Objects):
    """One decoded example: its objects, and `image`, uint8 (height, width, channels)."""

    image: np.ndarray


class AnnotatedSplit(Sequence[AnnotatedExample], ABC):
    """Random access to examples, and to their objects alone, for which no image need be decoded."""

    @abstractmethod
    def objects(self, index: int) -> Objects:
        """The objects of image `index`, 0 <= index < len."""

    @abstractmethod
    def image(self, index: int) -> np.ndarray:
        """Image `index`, 0 <= index < len: uint8 (height, width, channels)."""

    def __getitem__(self, index: int) -> AnnotatedExample:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The example at `index`.

        Raises:
          IndexError: no such example.
          ValueError: the image cannot be decoded; the message names it.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"`index` {index} is outside a split of {len(self)} images")
        index %= len(self)
        return {"image": self.image(index), **self.objects(index)}


@dataclass(frozen=True, eq=False)
class AnnotatedSource:
    """An annotated data set to train on.

    Attributes:
      info: names and counts.
      train: random access to the training images.
      eval: random access to the images that are kept for evaluation.
    """

    info: DetectionInfo
    train: AnnotatedSplit
    eval: AnnotatedSplit
    # Decoded images, kept by the pipeline from one evaluation to the next; see `train_detection_batches`.
    kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
