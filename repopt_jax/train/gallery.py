"""What detectors find, as pictures: on the test images of a run, and on any image file."""

import io
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from repopt_jax.data import letterbox
from repopt_jax.data.images import decode_image
from repopt_jax.data.transforms import normalise
from repopt_jax.detection import Detections
from repopt_jax.detection.drawing import contact_sheet, draw_detections
from repopt_jax.train.build import Trained
from repopt_jax.train.deploy import open_test
from repopt_jax.train.detection import detection_transform, make_detect
from repopt_jax.train.state import split_model

# Drawn are detections that are rather right than wrong; the evaluation takes all above
# `detect.score_threshold`.
THRESHOLD = 0.4
COLUMNS = 6
# Small images are drawn larger, to about this many pixels.
SIDE = 256


def gallery(
    trained: Trained, *, count: int = 12, annotated: bool = False, data_dir: str | None = None
) -> bytes:
    """A sheet of the first `count` test images with what the network finds, or with `annotated` what there is
    to find; PNG."""
    _, source, batches = open_test(trained, data_dir)
    pictures = []
    for batch in batches:
        found = None if annotated else _detect(trained, batch["image"])
        for row in np.flatnonzero(batch["mask"]):
            example = source.eval[int(batch["index"][row])]
            if found is None:
                objects = {name: example[name] for name in ("boxes", "classes", "keypoints")}
                objects |= {"scores": None, "keypoints": example["keypoints"][..., :2]}
            else:
                objects = _objects(found, int(row), batch["ratio"][row], THRESHOLD)
            pictures.append(_drawn(example["image"], objects, trained.info.class_names))
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
    trained: Trained, image: str | Path, out: str | Path, *, threshold: float = THRESHOLD
) -> list[Found]:
    """Finds the objects of an image file, draws them on a copy of it at `out`, and returns them, best first.

    Args:
      trained: a detector, of a run or deployed.
      image: PNG, JPEG or what else Pillow reads.
      out: a name ending as Pillow writes it (.png, .jpg ...); replaced if it is there.
      threshold: the least score.

    Raises:
      FileNotFoundError: no such image.
      ValueError: the network is no detector, the file is no image, or `out` has an unknown ending.
    """
    if trained.config.task != "detect":
        raise ValueError(
            f"{trained.config.name} is a classifier: `repopt predict` draws what detectors find, "
            "`repopt eval` measures classifiers"
        )
    path, out = Path(image), Path(out)
    if not path.is_file():
        raise FileNotFoundError(f"no image {path}")
    pixels = decode_image(path.read_bytes(), channels=trained.info.channels, name=str(path))
    transform = detection_transform(trained.config.data)
    fitted, ratio = letterbox(pixels, transform.image_size)
    found = _detect(trained, normalise(fitted[None], transform.pixels))
    objects = _objects(found, 0, ratio, threshold)
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


def _detect(trained: Trained, images: np.ndarray) -> Detections:
    network = split_model(trained.model)
    return jax.device_get(make_detect(network.graphdef, trained.config)(network.params, network.rest, images))


def _objects(found: Detections, row: int, ratio: float, threshold: float) -> dict[str, Any]:
    """The detections of one image above `threshold`, in pixels of the original."""
    chosen = (found.scores[row] >= threshold) & (found.classes[row] >= 0)
    return {
        "boxes": found.boxes[row][chosen] / ratio,
        "classes": found.classes[row][chosen],
        "scores": found.scores[row][chosen],
        "keypoints": found.keypoints[row][chosen] / ratio,
    }


def _drawn(image: np.ndarray, objects: dict[str, Any], class_names: tuple[str, ...]) -> Any:
    zoom = max(1, round(SIDE / max(image.shape[:2])))
    return draw_detections(image, **objects, class_names=class_names, zoom=zoom)


def _png(picture: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
