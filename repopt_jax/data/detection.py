"""Batches of annotated images: letterboxed, augmented with their boxes and keypoints, padded to fixed shapes.

Their order, sharding and caching are those of `repopt_jax.data.pipeline`.
"""

import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from repopt_jax.arguments import check_array, check_count, check_kind
from repopt_jax.data.dataset import AnnotatedSource, AnnotatedSplit, DetectionInfo, Objects, check_source
from repopt_jax.data.images import resize
from repopt_jax.data.pipeline import Options, Sharding, check_image, endless_batches, one_epoch, pad_rows
from repopt_jax.data.rng import RowRng
from repopt_jax.data.transforms import Transform, normalise

if TYPE_CHECKING:  # imports Grain, which takes a second
    from repopt_jax.data.batches import Batches

# An object that the border of the square cuts is dropped if less than this many pixels on a side, or less
# than this share of its box, remains: it cannot be recognised.
MIN_SIDE = 1.0
MIN_SHARE = 0.25
# An object that loses no more pixels than this is not cut: float arithmetic moves a coordinate by less.
ROUNDING = 1e-3


@dataclass(frozen=True)
class DetectionTransform:
    """The settings of preprocessing annotated images. Evaluation uses `image_size`, `mean` and `std` only.

    An image is *letterboxed*: resized (bilinear) so that its longer side is `image_size`, and put in the
    upper left corner of an otherwise black square. Boxes and keypoints are transformed with it.

    Attributes:
      image_size: height and width of the network's input, in pixels.
      flip: in training, mirror images with probability 1/2; the `flip_pairs` of the data set trade places.
      zoom: in training, make the letterboxed image larger or smaller by a factor whose logarithm is uniform
        between those of this range, (low, high): a smaller image is put at a random place of the square, and
        of a larger one a random part is shown. An object that the border of the square cuts is dropped if
        less than a quarter of it, or less than a pixel on a side, remains; one that is as small because the
        whole image was made smaller is kept.
      mean: subtracted from pixel values that are scaled to [0, 1]; one number, or one for each channel.
      std: what the difference is divided by; one number, or one for each channel.

    Raises:
      ValueError: a value out of its range.
    """

    image_size: int
    flip: bool = False
    zoom: tuple[float, ...] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        _ = self.pixels  # checks its values
        zoom = self.zoom
        if zoom is not None and not (len(zoom) == 2 and 0 < zoom[0] <= zoom[1] < math.inf):
            raise ValueError(f"`zoom` is {zoom}; it must be (low, high), 0 < low <= high")

    @property
    def pixels(self) -> Transform:
        """The part that labelled images share: size and normalisation."""
        return Transform(self.image_size, mean=self.mean, std=self.std)

    def check_channels(self, channels: int) -> None:
        """Raises ValueError if `mean` or `std` does not fit images of `channels` channels."""
        self.pixels.check_channels(channels)


def train_detection_batches(
    source: AnnotatedSource,
    transform: DetectionTransform,
    *,
    batch_size: int,
    seed: int,
    **options: Unpack[Options],
) -> "Batches":
    """Makes training batches without end: each epoch in a new order, without its last partial batch.

    Arguments are those of `data.train_batches`. Images are not cached where `transform.zoom` is used, which
    needs whole images.

    Returns:
      An iterable; `iter` of it has `get_state()` and `set_state(state)` (JSON-able, exact). Each element, for
      n = batch_size // process_count, M = source.info.max_objects and K keypoints, in pixels of the square:

        image: float32 (n, size, size, channels), normalised.
        boxes: float32 (n, M, 4): x1, y1, x2, y2.
        classes: int32 (n, M), -1 where there is no object. Crowds are left out, objects that zoom has cut off
          (see `DetectionTransform`), and of more than M objects the smallest. No object is left out only
          because it is small.
        keypoints: float32 (n, M, K, 3): x, y and 0 (not labelled, or outside: x and y are 0), 1 (hidden) or 2
          (visible).

      An image that cannot be read raises ValueError from `next`, naming it.

    Raises:
      ValueError: sizes, counts or `cache` that do not fit together or the source.
    """
    check_source(source, AnnotatedSource)
    check_kind("transform", transform, DetectionTransform, "a `DetectionTransform`")
    check_kind("batch_size", batch_size, numbers.Integral, "a whole number")
    check_kind("seed", seed, numbers.Integral, "a whole number")
    partners = _partners(source.info)

    def finish(arrays: tuple[np.ndarray, ...], rng: RowRng) -> dict[str, np.ndarray]:
        images, boxes, classes, keypoints, widths, _ = arrays
        if transform.flip:
            for row in np.flatnonzero(rng.flip < 0.5):
                _mirror(images[row], boxes[row], classes[row], keypoints[row], widths[row], partners)
        return {
            "image": normalise(images, transform.pixels),
            "boxes": boxes,
            "classes": classes,
            "keypoints": keypoints,
        }

    reader = AnnotatedReader(source, "train", transform)
    sharding = Sharding(batch_size=batch_size, **options)
    return endless_batches(source, transform, reader, finish, seed=seed, sharding=sharding)


def eval_detection_batches(
    source: AnnotatedSource, transform: DetectionTransform, *, batch_size: int, **options: Unpack[Options]
) -> "Batches":
    """Reads the eval split once, every image in exactly one row of one process; `iter` starts it again.

    Arguments, errors and elements are those of `train_detection_batches`, and each element also has

      mask: float32 (n,): 1 for an image, 0 for a row that pads the last batch (black before normalisation, no
        objects).
      index: int32 (n,): position of the image in the split.
      ratio: float32 (n,): pixels of the square for a pixel of the image; coordinates in the square divided by
        it are coordinates in the image.

    Every process gets the same number of batches.
    """
    check_source(source, AnnotatedSource)
    check_kind("transform", transform, DetectionTransform, "a `DetectionTransform`")
    check_kind("batch_size", batch_size, numbers.Integral, "a whole number")
    sharding = Sharding(batch_size=batch_size, **options)
    count = sharding.rows

    def finish(arrays: tuple[np.ndarray, ...], rows: np.ndarray) -> dict[str, np.ndarray]:
        images, boxes, classes, keypoints, _, ratios = arrays
        return {
            "image": normalise(pad_rows(images, count), transform.pixels),
            "boxes": pad_rows(boxes, count),
            "classes": pad_rows(classes, count, -1),
            "keypoints": pad_rows(keypoints, count),
            "index": pad_rows(rows.astype(np.int32), count),
            "ratio": pad_rows(ratios, count, 1),
        }

    reader = AnnotatedReader(source, "eval", transform)
    return one_epoch(source, transform, reader, finish, sharding=sharding)


def eval_annotations(source: AnnotatedSource, indices: Iterable[int] | None = None) -> dict[str, Any]:
    """The ground truth of the eval split, in COCO's format, for `detection.evaluate_detections`.

    No image is decoded.

    Args:
      source: its `eval` split is described.
      indices: positions in the split of the images that are evaluated; None: all.

    Returns:
      {"images", "annotations", "categories"}. The id of an image is its position + 1 and that of a category
      its class + 1; boxes and keypoints are in pixels of the image as it is stored.
    """
    check_source(source, AnnotatedSource)
    images, annotations = [], []
    for index in range(len(source.eval)) if indices is None else indices:
        images.append({"id": int(index) + 1})
        objects = source.eval.objects(int(index))
        for i in range(len(objects["classes"])):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": int(index) + 1, **_annotation(objects, i)}
            )
    names = list(source.info.keypoint_names)
    categories = [
        {"id": c + 1, "name": name, "keypoints": names, "skeleton": []}
        for c, name in enumerate(source.info.class_names)
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def letterbox(image: np.ndarray, size: int) -> tuple[np.ndarray, float]:
    """Resizes the longer side of a uint8 (height, width, channels) image to `size`; keeps its aspect.

    Returns:
      uint8 (size, size, channels), the image in the upper left corner and 0 elsewhere; `size` / longer side.
    """
    check_array("image", image)
    check_count("size", size)
    ratio = size / max(image.shape[:2])
    resized = _scaled(image, ratio)
    out = np.zeros((size, size, image.shape[-1]), np.uint8)
    out[: resized.shape[0], : resized.shape[1]] = resized
    return out, ratio


def _annotation(objects: Objects, i: int) -> dict[str, Any]:
    """Object `i` in COCO's format, without the ids."""
    x1, y1, x2, y2 = objects["boxes"][i].tolist()
    annotation = {
        "category_id": int(objects["classes"][i]) + 1,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": float(objects["area"][i]),
        "iscrowd": int(objects["crowd"][i]),
    }
    keypoints = objects["keypoints"][i]
    if len(keypoints):
        annotation["keypoints"] = keypoints.ravel().tolist()
        annotation["num_keypoints"] = int((keypoints[:, 2] > 0).sum())
    return annotation


class AnnotatedReader:
    """Reads and decodes annotated images, and letterboxes (or zooms) them.

    A `pipeline.Reader` of images, boxes, classes, keypoints, widths of the image in the square, and ratios.
    """

    def __init__(self, source: AnnotatedSource, split: str, transform: DetectionTransform):
        self.split = split
        self.size: int = transform.image_size
        self.cache_key: int = transform.image_size
        self.zoom: tuple[float, ...] | None = transform.zoom if split == "train" else None
        self.needs_whole_images = None if self.zoom is None else "zoom"
        self.examples: AnnotatedSplit = getattr(source, split)
        self.info: DetectionInfo = source.info

    def __call__(self, rows: np.ndarray, rng: RowRng | None) -> tuple[np.ndarray, ...]:
        count, most, info = len(rows), self.info.max_objects, self.info
        images = np.zeros((count, self.size, self.size, info.channels), np.uint8)
        boxes = np.zeros((count, most, 4), np.float32)
        classes = np.full((count, most), -1, np.int32)
        keypoints = np.zeros((count, most, info.num_keypoints, 3), np.float32)
        widths, ratios = np.zeros(count, np.int32), np.zeros(count, np.float32)
        for i, row in enumerate(rows):
            example = self.examples[int(row)]
            image = example["image"]
            check_image(image, info.channels, row)
            if self.zoom is None or rng is None:
                images[i], ratio = letterbox(image, self.size)
                ratios[i] = ratio
                widths[i], scale, corner = _side(image.shape[1], ratio), np.full(2, ratio), np.zeros(2)
            else:
                low, high = np.log(self.zoom)
                factor = math.exp(low + rng.zoom[i] * (high - low))
                images[i], scale, corner = zoomed(image, self.size, factor, (rng.y[i], rng.x[i]))
                widths[i] = self.size
            extent = np.array(image.shape[1::-1]) * scale
            kept = objects_in_square(example, scale, extent, corner, self.size, most)
            n = len(kept[1])
            boxes[i, :n], classes[i, :n], keypoints[i, :n] = kept
        return images, boxes, classes, keypoints, widths, ratios


def zoomed(
    image: np.ndarray, size: int, factor: float, position: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Makes a letterboxed image larger or smaller, and places it in the square.

    Args:
      image: uint8 (height, width, channels).
      size: side of the square.
      factor: side of the result over that of the letterboxed image.
      position: y and x, uniform in [0, 1), which choose the place of a smaller image, and the part of a
        larger one.

    Returns:
      uint8 (size, size, channels); the scale (x, y), exact for the whole pixels of the result; the position
      (x, y) of the upper left corner of the image in the square.
    """
    resized = _scaled(image, size / max(image.shape[:2]) * factor)
    top, left = (
        int(u * (abs(size - side) + 1)) * (1 if side < size else -1)
        for u, side in zip(position, resized.shape)
    )
    out = np.zeros((size, size, image.shape[-1]), np.uint8)
    visible = resized[max(0, -top) : size - top, max(0, -left) : size - left]
    y, x = max(0, top), max(0, left)
    out[y : y + visible.shape[0], x : x + visible.shape[1]] = visible
    scale = np.array(resized.shape[1::-1]) / image.shape[1::-1]
    return out, scale, np.array([left, top])


def objects_in_square(
    objects: Objects, scale: np.ndarray, extent: np.ndarray, corner: np.ndarray, size: int, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes, classes and keypoints in the square, without crowds, lost objects, and more than `most` objects.

    The image, resized by `scale` (x, y) to `extent` (x, y), has its upper left corner at `corner` (x, y). An
    object that the border does not cut is kept however small it is, unless it has no size at all.
    """
    whole = np.clip(objects["boxes"] * np.tile(scale, 2), 0, np.tile(extent, 2)) + np.tile(corner, 2)
    boxes = np.clip(whole, 0, size)
    shorter = np.minimum(*_sides(boxes))
    cut = (abs(boxes - whole) > ROUNDING).any(1)
    enough = (shorter > 0) & (_area(boxes) >= MIN_SHARE * _area(whole)) & (~cut | (shorter >= MIN_SIDE))
    kept = np.flatnonzero(enough & ~objects["crowd"])
    if len(kept) > most:
        kept = np.sort(kept[np.argsort(-_area(boxes[kept]), kind="stable")[:most]])
    keypoints = objects["keypoints"][kept]
    points, flags = keypoints[..., :2] * scale, keypoints[..., 2:]
    inside = (points >= 0) & (points <= extent) & (points + corner >= 0) & (points + corner <= size)
    visible = inside.all(-1, keepdims=True) & (flags > 0)
    keypoints = np.where(visible, np.concatenate([points + corner, flags], -1), 0)
    return boxes[kept], objects["classes"][kept], keypoints


def _mirror(image, boxes, classes, keypoints, width: int, partners: np.ndarray) -> None:
    """Mirrors one image of a batch and its objects in place; its first `width` columns hold the image."""
    image[:, :width] = image[:, :width][:, ::-1].copy()
    real = classes >= 0
    # The image may be a fraction of a pixel wider than its columns.
    boxes[real, 0], boxes[real, 2] = (np.maximum(width - boxes[real, side], 0) for side in (2, 0))
    keypoints[:] = keypoints[:, partners]
    labelled = keypoints[..., 2] > 0
    keypoints[labelled, 0] = np.maximum(width - keypoints[labelled, 0], 0)


def _partners(info: DetectionInfo) -> np.ndarray:
    """Int (K,): which keypoint takes the place of each when an image is mirrored."""
    partners = np.arange(info.num_keypoints)
    for one, other in info.flip_pairs:
        partners[[one, other]] = other, one
    return partners


def _scaled(image: np.ndarray, ratio: float) -> np.ndarray:
    height, width = (_side(n, ratio) for n in image.shape[:2])
    return image if (height, width) == image.shape[:2] else resize(image, (height, width))


def _side(pixels: int, ratio: float) -> int:
    return max(1, round(pixels * ratio))


def _sides(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]


def _area(boxes: np.ndarray) -> np.ndarray:
    return np.prod(_sides(boxes), axis=0)
