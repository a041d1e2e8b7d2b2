"""What detectors find, as pictures: on the test images of a run, and on any image file."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from repopt_jax.data import letterbox
from repopt_jax.data.images import decode_image
from repopt_jax.data.transforms import normalise, resize
from repopt_jax.detection import Detections
from repopt_jax.detection.drawing import contact_sheet, draw_detections
from repopt_jax.train.build import Trained
from repopt_jax.train.deploy import open_test
from repopt_jax.train.state import split_model
from repopt_jax.train.tasks import detection_transform, make_detect

# Drawn are detections that are rather right than wrong; the evaluation takes all above
# `detect.score_threshold`.
THRESHOLD = 0.4
COLUMNS = 6
# Longer side of the pictures on a sheet, about, in pixels: smaller images are enlarged, larger ones shrunk.
SIDE = 256


def gallery(
    trained: Trained, *, count: int = 12, annotated: bool = False, data_dir: str | None = None
) -> bytes:
    """A sheet of the first `count` test images with what the network finds, or with `annotated` what there is
    to find; PNG."""
    _, source, batches = open_test(trained, data_dir)
    detect = None if annotated else _detector(trained)
    threshold = least_score(trained)
    pictures = []
    for batch in batches:
        found = None if detect is None else detect(batch["image"])
        for row in np.flatnonzero(batch["mask"]):
            example = source.eval[int(batch["index"][row])]
            image = example["image"]
            if found is None:
                objects = {name: example[name] for name in ("boxes", "classes", "keypoints")}
                objects["scores"] = None
            else:
                objects = _objects(found, int(row), batch["ratio"][row], threshold, image.shape)
            pictures.append(_drawn(*_shrunk(image, objects), trained.info.class_names))
            if len(pictures) == count:
                return _png(contact_sheet(pictures, columns=COLUMNS))
    return _png(contact_sheet(pictures, columns=COLUMNS))


class Found(NamedTuple):
    """An object on an image: class, score, box (x1, y1, x2, y2) and keypoints (x, y), in pixels of the
    file."""

    name: str
    score: float
    box: tuple[float, ...]
    keypoints: tuple[tuple[float, float], ...]


def predict(
    trained: Trained, image: str | Path, out: str | Path, *, threshold: float | None = None
) -> list[Found]:
    """Finds the objects of an image file, draws them on a copy of it at `out`, and returns them, best first.

    Boxes end at the borders of the image. Small images are enlarged for the picture, none is shrunk.

    Args:
      trained: a detector, of a run or deployed.
      image: PNG, JPEG or what else Pillow reads.
      out: a name ending as Pillow writes it (.png, .jpg ...); replaced if it is there.
      threshold: the least score, see `least_score`.

    Raises:
      FileNotFoundError: no such image.
      ValueError: the network is no detector, `threshold` is out of its range, the file is no image, or `out`
        has an unknown ending.
    """
    if trained.config.task != "detect":
        raise ValueError(
            f"{trained.config.name} is a classifier: `repopt predict` draws what detectors find, "
            "`repopt eval` measures classifiers"
        )
    threshold = least_score(trained, threshold)
    path, out = Path(image), Path(out)
    if not path.is_file():
        raise FileNotFoundError(f"no image {path}")
    pixels = decode_image(path.read_bytes(), channels=trained.info.channels, name=str(path))
    transform = detection_transform(trained.config.data)
    fitted, ratio = letterbox(pixels, transform.image_size)
    found = _detector(trained)(normalise(fitted[None], transform.pixels))
    objects = _objects(found, 0, ratio, threshold, pixels.shape)
    picture = _drawn(pixels, objects, trained.info.class_names)
    try:
        picture.save(out)
    except ValueError as error:
        raise ValueError(f"cannot write a picture to {out}: use a name that ends in .png or .jpg") from error
    boxes, points = objects["boxes"].tolist(), objects["keypoints"].tolist()
    return [
        Found(trained.info.class_names[c], float(score), tuple(box), tuple(map(tuple, keypoints)))
        for c, score, box, keypoints in zip(objects["classes"], objects["scores"], boxes, points)
    ]


def least_score(trained: Trained, asked: float | None = None) -> float:
    """The least score of what is drawn: `asked`, or `THRESHOLD` where the network gives such scores.

    Raises:
      ValueError: `asked` is not between `detect.score_threshold` of the network's config, below which it
        finds nothing, and 1.
    """
    least = trained.config.detect.score_threshold
    if asked is None:
        return max(THRESHOLD, least)
    if not least <= asked <= 1:  # nan neither
        raise ValueError(
            f"`threshold` is {asked:g}; it must be between {least:g}, the config's `detect.score_threshold`, "
            "and 1"
        )
    return asked


def _detector(trained: Trained) -> Callable[[np.ndarray], Detections]:
    """Images -> detections as NumPy arrays; compiled once for all batches of a size."""
    network = split_model(trained.model)
    detect = make_detect(network.graphdef, trained.config)
    return lambda images: jax.device_get(detect(network.params, network.non_trainable, images))


def _objects(
    found: Detections, row: int, ratio: float, threshold: float, shape: tuple[int, ...]
) -> dict[str, Any]:
    """The detections of one image from `threshold` on, in pixels of the original, which is `shape` large.

    The network sees a square, and its boxes may reach into the padding: they are cut at the image, and what
    lies in the padding alone is left out.
    """
    height, width = shape[:2]
    boxes = np.clip(found.boxes[row] / ratio, 0, np.array([width, height, width, height], np.float32))
    seen = (boxes[:, 2:] > boxes[:, :2]).all(-1)
    chosen = (found.scores[row] >= threshold) & (found.classes[row] >= 0) & seen
    return {
        "boxes": boxes[chosen],
        "classes": found.classes[row][chosen],
        "scores": found.scores[row][chosen],
        "keypoints": found.keypoints[row][chosen] / ratio,
    }


def _shrunk(image: np.ndarray, objects: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """An image whose longer side is at most `SIDE`, and its objects there."""
    height, width = image.shape[:2]
    if (longer := max(height, width)) <= SIDE:
        return image, objects
    fitted = resize(image, (max(1, round(height * SIDE / longer)), max(1, round(width * SIDE / longer))))
    scale = np.array([fitted.shape[1] / width, fitted.shape[0] / height], np.float32)
    points = objects["keypoints"]
    points = np.concatenate([points[..., :2] * scale, points[..., 2:]], -1)
    return fitted, {**objects, "boxes": objects["boxes"] * np.tile(scale, 2), "keypoints": points}


def _drawn(image: np.ndarray, objects: dict[str, Any], class_names: tuple[str, ...]) -> Any:
    zoom = max(1, round(SIDE / max(image.shape[:2])))
    return draw_detections(image, **objects, class_names=class_names, zoom=zoom)


def _png(picture: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
