"""The embedded detection data set: scenes composed of real handwritten digits, with boxes and five keypoints.

The digits are those of `repopt_jax.data.digits`: training scenes show its training digits only, evaluation
scenes its test digits only. A scene is a function of (seed, split, index) alone. It is composed when it is
asked for, in about half a millisecond, and nothing is stored.

A digit's *stroke* is its pixels above 40 % of full ink. The box is tight around the stroke after scaling. The
keypoints are the uppermost, lowest, leftmost and rightmost point of the stroke of the 8x8 image (of several
pixels in the extreme row or column their mean, weighted by ink) and its centroid, mapped with the digit into
the scene.
"""

import functools
from typing import NamedTuple

import numpy as np

from repopt_jax.data import digits
from repopt_jax.data.dataset import (
    AnnotatedExample,
    AnnotatedSource,
    AnnotatedSplit,
    DetectionInfo,
    Objects,
)

KEYPOINTS = ("top", "bottom", "left", "right", "centroid")
# One pixel of the 8x8 image is an eighth of the digit's side: an extreme point is exact to about that, as a
# hip is in COCO (0.107), and the centroid, a mean over the stroke, to half of it (COCO: shoulder 0.079, nose
# 0.026).
SIGMAS = (0.1, 0.1, 0.1, 0.1, 0.05)
STROKE = 0.4
# Side of the smallest scene, in pixels: in a smaller one a digit has too few to be recognised.
MIN_SIZE = 32
# Side of the 8x8 image with a rim of one empty pixel, which makes the stroke fade out where it touches the
# border of the image.
RIMMED = 8 + 2
# Side of the 8x8 digit, as a share of the scene's, and its further stretch in x and in y.
SIDE = (0.22, 0.44)
STRETCH = (0.88, 1.12)
# Two boxes share at most this much of the smaller one; a digit that finds no room in so many attempts is left
# out.
OVERLAP = 0.25
ATTEMPTS = 12
# Brightness, in [0, 1]: ranges of the background's level, its rise over the scene, ranges of the ink above
# that level and of the noise.
BACKGROUND = (0.0, 0.35)
RISE = 0.2
INK = (0.35, 0.65)
NOISE = (0.01, 0.06)


def open_scenes(
    seed: int = 0, *, num_train: int = 2000, num_eval: int = 500, size: int = 64, max_objects: int = 5
) -> AnnotatedSource:
    """Opens the scenes: grey, `size` by `size`, with 1 to `max_objects` digits.

    Args:
      seed: the same seed gives the same scenes; `num_train` and `num_eval` are how many of an endless
        sequence are used.
      num_train: scenes in the train split.
      num_eval: scenes in the eval split.
      size: side of a scene in pixels, at least 32.
      max_objects: the largest number of digits in a scene.

    Raises:
      ValueError: arguments out of their ranges; it lists all of them.
      ImportError: scikit-learn, which carries the digits, is not installed.
    """
    least = {"seed": 0, "num_train": 1, "num_eval": 1, "size": MIN_SIZE, "max_objects": 1}
    given = (seed, num_train, num_eval, size, max_objects)
    problems = [
        f"`{name}` is {value}; it must be at least {smallest}"
        for (name, smallest), value in zip(least.items(), given, strict=True)
        if value < smallest
    ]
    if problems:
        raise ValueError(", and ".join(problems))
    info = DetectionInfo(
        name=f"scenes{size}",
        class_names=tuple(str(digit) for digit in range(10)),
        keypoint_names=KEYPOINTS,
        channels=1,
        max_objects=max_objects,
        num_train=num_train,
        num_eval=num_eval,
        flip_pairs=((2, 3),),
        sigmas=SIGMAS,
    )
    images, labels, is_test = digits.load()
    train, evaluation = (
        Scenes(images[of], labels[of], (seed, number), count, size, max_objects)
        for number, (of, count) in enumerate([(~is_test, num_train), (is_test, num_eval)])
    )
    return AnnotatedSource(info, train, evaluation)


class Scenes(AnnotatedSplit):
    """The scenes of one split.

    Args:
      images: uint8 (n, 8, 8), the digits to choose from.
      labels: int (n,).
      seed: numbers that, with the index of a scene, determine it.
      count: number of scenes.
      size: side in pixels.
      max_objects: the largest number of digits in a scene.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        seed: tuple[int, ...],
        count: int,
        size: int,
        max_objects: int,
    ):
        self._ink = np.pad(images.astype(np.float32) / 255, ((0, 0), (1, 1), (1, 1)))
        self._keypoints = _keypoints(self._ink)
        self._labels = labels.astype(np.int32)
        self._seed, self._count, self._size, self._max_objects = seed, count, size, max_objects

    def __len__(self) -> int:
        return self._count

    def objects(self, index: int) -> Objects:
        return _annotate(self._compose(index)[0], self._size)

    def image(self, index: int) -> np.ndarray:
        return _paint(*self._compose(index), self._size)

    def example(self, index: int) -> AnnotatedExample:
        placed, rng = self._compose(index)  # once for both
        return {**_annotate(placed, self._size), "image": _paint(placed, rng, self._size)}

    def _compose(self, index: int) -> tuple[list["Placed"], np.random.Generator]:
        """Places the digits of a scene, in the order of painting; also returns the generator for that."""
        rng = np.random.default_rng((*self._seed, index))
        placed: list[Placed] = []
        for _ in range(rng.integers(1, self._max_objects + 1)):
            digit = rng.integers(len(self._labels))
            side = rng.uniform(*SIDE) * self._size * RIMMED / 8
            height, width = np.rint(side * rng.uniform(*STRETCH, 2)).astype(int)
            ink = _resizing(height) @ self._ink[digit] @ _resizing(width).T
            box = _stroke_box(ink)
            corner = _free_corner(box, [other.box for other in placed], rng.random((ATTEMPTS, 2)), self._size)
            if corner is None:
                continue
            box = box + np.tile(corner, 2)
            points = self._keypoints[digit] * (width, height) / RIMMED + corner
            points = np.minimum(np.maximum(points, box[:2]), box[2:])
            placed.append(Placed(ink, corner, box, points, self._labels[digit]))
        return placed, rng


class Placed(NamedTuple):
    """A digit in a scene.

    ink: float32 (height, width) in [0, 1], rim included.
    corner: int (2,): x and y of its upper left corner in the scene. A part of the rim may lie outside.
    box: int (4,), around the stroke.
    points: float64 (5, 2).
    """

    ink: np.ndarray
    corner: np.ndarray
    box: np.ndarray
    points: np.ndarray
    label: int


def _stroke_box(ink: np.ndarray) -> np.ndarray:
    """Int (4,): x1, y1, x2, y2 around the stroke."""
    stroke = ink >= STROKE
    rows, columns = np.flatnonzero(stroke.any(1)), np.flatnonzero(stroke.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def _free_corner(box, others: list[np.ndarray], attempts: np.ndarray, size: int) -> np.ndarray | None:
    """The first of the offsets of `box` that `attempts` give at which it is clear of `others`, or None.

    `attempts` are uniform numbers in [0, 1), (attempts, 2), which become positions in the scene.
    """
    room = size - (box[2:] - box[:2]) + 1
    for corner in np.floor(attempts * room).astype(int) - box[:2]:
        moved = box + np.tile(corner, 2)
        if all(_overlap(moved.tolist(), other.tolist()) <= OVERLAP for other in others):
            return corner
    return None


def _overlap(one: list[int], other: list[int]) -> float:
    """The common part of two boxes, as a share of the smaller one."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return max(width, 0) * max(height, 0) / smaller


def _keypoints(ink: np.ndarray) -> np.ndarray:
    """Float64 (n, 5, 2): x and y of the keypoints of unscaled digits (n, 10, 10), rim included."""
    weight = np.where(ink >= STROKE, ink, 0).astype(float)
    rows, columns = weight.max(2) > 0, weight.max(1) > 0
    last = ink.shape[1] - 1
    points = np.empty((len(ink), 5, 2))
    each = np.arange(len(ink))
    for k, row in ((0, rows.argmax(1)), (1, last - rows[:, ::-1].argmax(1))):
        points[:, k] = np.stack([_middle(weight[each, row]), row + 0.5], -1)
    for k, column in ((2, columns.argmax(1)), (3, last - columns[:, ::-1].argmax(1))):
        points[:, k] = np.stack([column + 0.5, _middle(weight[each, :, column])], -1)
    points[:, 4] = np.stack([_middle(weight.sum(1)), _middle(weight.sum(2))], -1)
    return points


def _middle(weight: np.ndarray) -> np.ndarray:
    """(n, m) -> (n,): the weighted mean of the centres of m pixels."""
    return weight @ (np.arange(weight.shape[1]) + 0.5) / weight.sum(1)


@functools.lru_cache(maxsize=256)
def _resizing(size: int) -> np.ndarray:
    """Float32 (size, RIMMED): the matrix that scales a side of RIMMED pixels to `size` of them, bilinear."""
    at = np.clip((np.arange(size) + 0.5) * RIMMED / size - 0.5, 0, RIMMED - 1)
    return np.maximum(0, 1 - abs(at[:, None] - np.arange(RIMMED))).astype(np.float32)


def _annotate(placed: list[Placed], size: int) -> Objects:
    boxes = np.array([digit.box for digit in placed], np.float32)
    keypoints = np.full((len(placed), len(KEYPOINTS), 3), 2, np.float32)
    for i, digit in enumerate(placed):
        keypoints[i, :, :2] = digit.points
        for later in placed[i + 1 :]:
            if _overlap(digit.box.tolist(), later.box.tolist()):
                keypoints[i, _covers(later, digit.points), 2] = 1
    return {
        "boxes": boxes,
        "classes": np.array([digit.label for digit in placed], np.int32),
        "keypoints": keypoints,
        "crowd": np.zeros(len(placed), bool),
        "area": (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
    }


def _covers(digit: Placed, points: np.ndarray) -> np.ndarray:
    """Bool (n,): whether each point lies under the digit's stroke."""
    columns, rows = np.floor(points - digit.corner).astype(int).T
    height, width = digit.ink.shape
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return inside & (digit.ink[rows % height, columns % width] >= STROKE)


def _paint(placed: list[Placed], rng: np.random.Generator, size: int) -> np.ndarray:
    """Paints the scene, uint8 (size, size, 1): background with a gradient of brightness, digits, noise."""
    level, angle, noise = rng.uniform(*BACKGROUND), rng.uniform(0, 2 * np.pi), rng.uniform(*NOISE)
    ramp = np.linspace(-RISE / 2, RISE / 2, size, dtype=np.float32)
    scene = level + np.float32(np.cos(angle)) * ramp + np.float32(np.sin(angle)) * ramp[:, None]
    for digit in placed:
        brightness = level + rng.uniform(*INK)
        (x, y), (height, width) = digit.corner, digit.ink.shape
        rows, columns = (slice(max(0, a), min(size, a + n)) for a, n in ((y, height), (x, width)))
        ink = digit.ink[rows.start - y : rows.stop - y, columns.start - x : columns.stop - x]
        scene[rows, columns] += ink * (brightness - scene[rows, columns])
    scene = scene + noise * rng.standard_normal(scene.shape, np.float32)
    return np.rint(255 * np.clip(scene, 0, 1)).astype(np.uint8)[..., None]
