"""Batches of annotated images: letterboxed, augmented with their boxes and keypoints, padded to fixed shapes.

The order of the images, sharding, resuming and prefetching are those of `repopt_jax.data.pipeline`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from repopt_jax.data.annotated import AnnotatedSource, DetectionInfo, Objects
from repopt_jax.data.chance import Chance
from repopt_jax.data.pipeline import Options, Sharing, evaluation, filled, training
from repopt_jax.data.reading import check_image
from repopt_jax.data.transforms import Transform, normalise, resize

if TYPE_CHECKING:  # imports Grain, which takes a second
    from repopt_jax.data.batches import Batches

# Uniform numbers in [0, 1) that augmentation uses for one image, in this order.
DRAWS = ("flip", "zoom", "y", "x")
# What is left of an object that the border of the square cuts: with less than this many pixels on a side, or
# less than this share of its box, it cannot be recognised and is dropped.
LEAST_SIDE = 1.0
LEAST_SHARE = 0.25
# An object that loses no more pixels than this is not cut: float arithmetic moves a place by less.
ROUNDING = 1e-3


@dataclass(frozen=True)
class DetectionTransform:
    """How annotated images are made ready. Evaluation uses `image_size`, `mean` and `std` only.

    An image is *letterboxed*: resized (bilinear) so that its longer side is `image_size`, and put in the
    upper left corner of a square, of which the rest is black. Boxes and keypoints move along.

    Attributes:
      image_size: height and width that the network is given, in pixels.
      flip: in training, mirror half of the images, at random; the `flip_pairs` of the data set trade places.
      zoom: in training, make the letterboxed image larger or smaller by a factor whose logarithm is uniform
        between those of this range, (low, high): a smaller one is put at a random place of the square, and of
        a larger one a random part is shown. An object that the border of the square cuts is dropped where
        less than a quarter of it, or less than a pixel on a side, is left; one that is as small because the
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

    def __post_init__(self):
        _ = self.pixels  # checks its values
        zoom = self.zoom
        if zoom is not None and not (len(zoom) == 2 and 0 < zoom[0] <= zoom[1] < math.inf):
            raise ValueError(f"`zoom` is {zoom}; it must be (low, high), 0 < low <= high")

    @property
    def pixels(self) -> Transform:
        """The part that does not move anything."""
        return Transform(self.image_size, mean=self.mean, std=self.std)

    def check_channels(self, channels: int) -> None:
        """Raises ValueError where `mean` or `std` does not fit images of `channels` channels."""
        self.pixels.check_channels(channels)


def train_detection_batches(
    source: AnnotatedSource,
    transform: DetectionTransform,
    *,
    batch_size: int,
    seed: int,
    **options: Unpack[Options],
) -> "Batches":
    """Training batches without end: each epoch in a new order, without its last partial batch.

    Arguments are those of `data.train_batches`; `transform.zoom` is what needs whole images, so that "auto"
    keeps none.

    Returns:
      An iterable; `iter` of it has `get_state()` and `set_state(state)` (JSON-able, exact). Each element, for
      n = batch_size // process_count, M = source.info.max_objects and K keypoints, in pixels of the square:

        image: float32 (n, size, size, channels), normalised.
        boxes: float32 (n, M, 4): x1, y1, x2, y2.
        classes: int32 (n, M), -1 where there is no object. Crowds are left out, and what zoom cut off (see
          `DetectionTransform`), and of more than M objects the smallest. An object is not left out because
          it is small.
        keypoints: float32 (n, M, K, 3): x, y and 0 (not labelled, or outside: x and y are 0), 1 (hidden) or 2
          (visible).

      An image that cannot be read raises ValueError from `next`, naming it.

    Raises:
      ValueError: sizes, counts or `cache` that do not fit together or the source.
    """
    partners = _partners(source.info)

    def finish(read: tuple[np.ndarray, ...], chance: Chance) -> dict[str, np.ndarray]:
        images, boxes, classes, keypoints, widths, _ = read
        if transform.flip:
            for row in np.flatnonzero(chance.draws[:, 0] < 0.5):
                _mirror(images[row], boxes[row], classes[row], keypoints[row], widths[row], partners)
        return {
            "image": normalise(images, transform.pixels),
            "boxes": boxes,
            "classes": classes,
            "keypoints": keypoints,
        }

    decode = _Decoding(source, "train", transform)
    sharing = Sharing(batch_size=batch_size, **options)
    return training(source, transform, decode, finish, num_draws=len(DRAWS), seed=seed, sharing=sharing)


def eval_detection_batches(
    source: AnnotatedSource, transform: DetectionTransform, *, batch_size: int, **options: Unpack[Options]
) -> "Batches":
    """The eval split once, every image in exactly one row of one process; `iter` starts it again.

    Arguments, errors and elements are those of `train_detection_batches`, and each element also has

      mask: float32 (n,): 1 for an image, 0 for a row that fills up the last batch (black before
        normalisation, no objects).
      index: int32 (n,): position of the image in the split.
      ratio: float32 (n,): pixels of the square for a pixel of the image; a place of the square divided by it
        is the place in the image.

    Every process gets the same number of batches.
    """
    sharing = Sharing(batch_size=batch_size, **options)
    count = sharing.rows

    def finish(read: tuple[np.ndarray, ...], rows: np.ndarray) -> dict[str, np.ndarray]:
        images, boxes, classes, keypoints, _, ratios = read
        return {
            "image": normalise(filled(images, count), transform.pixels),
            "boxes": filled(boxes, count),
            "classes": filled(classes, count, -1),
            "keypoints": filled(keypoints, count),
            "index": filled(rows.astype(np.int32), count),
            "ratio": filled(ratios, count, 1),
        }

    return evaluation(source, transform, _Decoding(source, "eval", transform), finish, sharing=sharing)


def eval_annotations(source: AnnotatedSource, indices: Iterable[int] | None = None) -> dict[str, Any]:
    """The truth of the eval split in COCO's format, for `detection.evaluate_detections`; decodes no image.

    Args:
      source: its `eval` split is described.
      indices: positions in the split of the images that are evaluated; None: all.

    Returns:
      {"images", "annotations", "categories"}. The id of an image is its position + 1 and that of a category
      its class + 1; boxes and keypoints are in pixels of the image as it is stored.
    """
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
      uint8 (size, size, channels), the image in the upper left corner and the rest 0; `size` / longer side.
    """
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


class _Decoding:
    """Reads, decodes and letterboxes (or zooms) images each time they are asked for.

    It gives images, boxes, classes, keypoints, widths of the contents, ratios.
    """

    def __init__(self, source: AnnotatedSource, split: str, transform: DetectionTransform):
        self.split = split
        self.size = self.fitting = transform.image_size
        self.zoom = transform.zoom if split == "train" else None
        self.whole = None if self.zoom is None else "zoom"
        self.examples = getattr(source, split)
        self.info = source.info

    def __call__(self, rows: np.ndarray, chance: Chance | None) -> tuple[np.ndarray, ...]:
        count, places, info = len(rows), self.info.max_objects, self.info
        images = np.zeros((count, self.size, self.size, info.channels), np.uint8)
        boxes = np.zeros((count, places, 4), np.float32)
        classes = np.full((count, places), -1, np.int32)
        keypoints = np.zeros((count, places, info.num_keypoints, 3), np.float32)
        widths, ratios = np.zeros(count, np.int32), np.zeros(count, np.float32)
        for i, row in enumerate(rows):
            example = self.examples[int(row)]
            image = example["image"]
            check_image(image, info.channels, row)
            if self.zoom is None or chance is None:
                images[i], ratio = letterbox(image, self.size)
                ratios[i] = ratio
                widths[i], scale, corner = _side(image.shape[1], ratio), np.full(2, ratio), np.zeros(2)
            else:
                images[i], scale, corner = _zoomed(image, self.size, self.zoom, chance.draws[i])
                widths[i] = self.size
            extent = np.array(image.shape[1::-1]) * scale
            found = _moved(example, scale, extent, corner, self.size, places)
            n = len(found[1])
            boxes[i, :n], classes[i, :n], keypoints[i, :n] = found
        return images, boxes, classes, keypoints, widths, ratios


def _zoomed(image, size: int, zoom: tuple[float, ...], draws: np.ndarray):
    """A letterboxed image made larger or smaller; its scale (x, y), for whole pixels; its corner (x, y)."""
    low, high = np.log(zoom)
    ratio = size / max(image.shape[:2]) * math.exp(low + draws[1] * (high - low))
    resized = _scaled(image, ratio)
    # Where it does not fill the square there is room to move it, and where it is larger, a part to choose.
    top, left = (
        int(u * (abs(size - side) + 1)) * (1 if side < size else -1)
        for u, side in zip(draws[2:], resized.shape)
    )
    out = np.zeros((size, size, image.shape[-1]), np.uint8)
    seen = resized[max(0, -top) : size - top, max(0, -left) : size - left]
    y, x = max(0, top), max(0, left)
    out[y : y + seen.shape[0], x : x + seen.shape[1]] = seen
    scale = np.array(resized.shape[1::-1]) / image.shape[1::-1]
    return out, scale, np.array([left, top])


def _moved(objects: Objects, scale: np.ndarray, extent, corner, size: int, places: int):
    """Boxes, classes and keypoints in the square, without crowds, what is lost, and what is too many.

    The image, made `scale` (x, y) times as large and now `extent` (x, y) large, lies with its upper left
    corner at `corner` (x, y). An object that the border does not cut is kept however small it is, unless it
    has no size at all.
    """
    whole = np.clip(objects["boxes"] * np.tile(scale, 2), 0, np.tile(extent, 2)) + np.tile(corner, 2)
    boxes = np.clip(whole, 0, size)
    least = np.minimum(*_sides(boxes))
    cut = (abs(boxes - whole) > ROUNDING).any(1)
    enough = (least > 0) & (_area(boxes) >= LEAST_SHARE * _area(whole)) & (~cut | (least >= LEAST_SIDE))
    kept = np.flatnonzero(enough & ~objects["crowd"])
    if len(kept) > places:
        kept = np.sort(kept[np.argsort(-_area(boxes[kept]), kind="stable")[:places]])
    keypoints = objects["keypoints"][kept]
    points, flags = keypoints[..., :2] * scale, keypoints[..., 2:]
    inside = (points >= 0) & (points <= extent) & (points + corner >= 0) & (points + corner <= size)
    seen = inside.all(-1, keepdims=True) & (flags > 0)
    keypoints = np.where(seen, np.concatenate([points + corner, flags], -1), 0)
    return boxes[kept], objects["classes"][kept], keypoints


def _mirror(image, boxes, classes, keypoints, width: int, partners: np.ndarray) -> None:
    """Mirrors one image of a batch and its objects in place; `width` columns of it are the image's own."""
    image[:, :width] = image[:, :width][:, ::-1].copy()
    real = classes >= 0
    # The image's own width may be a fraction of a pixel more than its columns.
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
