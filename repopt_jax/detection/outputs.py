"""The outputs of a detector, their locations, and the detections decoded from them: named tuples of arrays.

Pixels are those of the network's image (resized and padded); x goes to the right, y down.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Outputs(NamedTuple):
    """Raw outputs at L locations: those of all levels one after the other, each row by row.

    Attributes:
      classes: (N, L, C) logits.
      boxes: (N, L, 4) distances to the left, top, right and bottom side, in strides, positive.
      centerness: (N, L) logits.
      keypoints: (N, L, K, 2) offsets in x and y from the location, in strides.
    """

    classes: Any
    boxes: Any
    centerness: Any
    keypoints: Any


class Locations(NamedTuple):
    """The locations of the outputs: static NumPy arrays.

    Attributes:
      points: (L, 2) float32, x and y in pixels.
      strides: (L,) float32, pixels.
      levels: (L,) int32, 0 for the finest.
    """

    points: np.ndarray
    strides: np.ndarray
    levels: np.ndarray


class Detections(NamedTuple):
    """D detections for each image, best first, padded where there are fewer.

    Attributes:
      boxes: (N, D, 4) x1, y1, x2, y2 in pixels.
      scores: (N, D) in [0, 1]; 0 in padding.
      classes: (N, D) int32; -1 in padding.
      keypoints: (N, D, K, 2) x and y in pixels.
    """

    boxes: Any
    scores: Any
    classes: Any
    keypoints: Any


def locations_of(image_size: int | tuple[int, int], strides: Sequence[int]) -> Locations:
    """The locations of the outputs for images of this size, (height, width) or one number, in pixels."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return grid_locations([(math.ceil(height / s), math.ceil(width / s)) for s in strides], strides)


def grid_locations(sizes: Sequence[tuple[int, int]], strides: Sequence[int]) -> Locations:
    """The locations of levels whose feature maps have these sizes (height, width).

    Pixel (i, j) of a level of stride s is at x = (j + 1/2) s, y = (i + 1/2) s.
    """
    points, steps, levels = [], [], []
    for level, ((height, width), stride) in enumerate(zip(sizes, strides, strict=True)):
        y, x = np.mgrid[:height, :width]
        points.append((np.stack([x, y], -1).reshape(-1, 2) + 0.5) * stride)
        steps.append(np.full(height * width, stride))
        levels.append(np.full(height * width, level))
    return Locations(
        np.concatenate(points).astype(np.float32),
        np.concatenate(steps).astype(np.float32),
        np.concatenate(levels).astype(np.int32),
    )
