"""What networks make of images: of test images, and of any image file."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from repopt_jax.data.images import decode_image, read_encoded, resize, to_pillow
from repopt_jax.data.pipeline import subset
from repopt_jax.deploy.evaluation import open_test
from repopt_jax.deploy.exporting import metadata_of
from repopt_jax.detection import Detections
from repopt_jax.detection.drawing import contact_sheet, draw_detections
from repopt_jax.export.metadata import Metadata
from repopt_jax.export.runtime import FileNetwork, prepare
from repopt_jax.train.build import Trained
from repopt_jax.train.state import merge_model, split_model
from repopt_jax.train.tasks import make_detect

# Detections from this score on are drawn, which are more often right than wrong; the evaluation takes all
# above `detect.score_threshold`.
THRESHOLD = 0.4
COLUMNS = 6
# Approximate longer side of the drawings on a sheet, in pixels: smaller images are enlarged, larger ones
# shrunk.
SIDE = 256


def gallery(
    trained: Trained, *, count: int = 12, annotated: bool = False, data_dir: str | None = None
) -> bytes:
    """Draws the first `count` test images with the objects that the network finds, on one sheet.

    Args:
      trained: a detector, of a run or deployed.
      count: number of images, or all if there are fewer.
      annotated: draw the annotated objects instead of those that are found.
      data_dir: of the images, where it is another one than in the config.

    Returns:
      A PNG file.
    """
    _, source, batches = open_test(trained, data_dir)
    detect = None if annotated else _detector(trained)
    threshold = least_score(trained)
    drawings = []
    for batch in batches:
        detections = None if detect is None else detect(batch["image"])
        for row in np.flatnonzero(batch["mask"]):
            example = source.eval[int(batch["index"][row])]
            image = example["image"]
            if detections is None:
                objects = {name: example[name] for name in ("boxes", "classes", "keypoints")}
                objects["scores"] = None
            else:
                objects = _objects(detections, int(row), batch["ratio"][row], threshold, image.shape)
            drawings.append(_draw(*_shrunk(image, objects), trained.info.class_names))
            if len(drawings) == count:
                return _png(contact_sheet(drawings, columns=COLUMNS))
    return _png(contact_sheet(drawings, columns=COLUMNS))


def answers(networks: Mapping[str, Trained], *, count: int = 8) -> list[dict[str, Any]]:
    """Some test images with what classifiers take them for, those first on which they do not agree.

    Args:
      networks: name -> network; all of one data set.
      count: number of images, or all if there are fewer.

    Returns:
      For each image its class ("truth"), the class that each network gives ("answers", by name), both by the
      names of the classes, and a PNG file ("image").
    """
    first = next(iter(networks.values()))
    _, source, batches = open_test(first)
    given: dict[str, list[np.ndarray]] = {name: [] for name in networks}
    logits = {name: _logits(network) for name, network in networks.items()}
    for batch in batches:
        for name, chosen in given.items():
            answers = np.asarray(logits[name](batch["image"])).argmax(-1)
            chosen.append(answers[batch["mask"] > 0])
    table = np.stack([np.concatenate(chosen) for chosen in given.values()])
    images = subset(source.info.num_eval, first.config.data.eval_limit, "eval")  # the rows of the batches
    disagree = (table != table[0]).any(axis=0)
    shown = np.concatenate([np.flatnonzero(disagree), np.flatnonzero(~disagree)])[:count]
    names = first.info.class_names
    found = []
    for row in shown:
        example = source.eval[int(images[row])]
        image, _ = _shrunk(example["image"], {"boxes": np.zeros((0, 4)), "keypoints": np.zeros((0, 0, 3))})
        found.append(
            {
                "image": _png(to_pillow(image)),
                "truth": names[example["label"]],
                "answers": {name: names[answer] for name, answer in zip(networks, table[:, row])},
            }
        )
    return found


def _logits(trained: Trained) -> Callable[[np.ndarray], jax.Array]:
    """A function from images to logits, compiled once for each batch size."""
    network = split_model(trained.model)

    @jax.jit
    def logits(params: Any, rest: Any, images: jax.Array) -> jax.Array:
        model = merge_model(network.graphdef, params, rest)
        model.eval()
        return model(images)

    return lambda images: logits(network.params, network.non_trainable, images)


class FoundObject(NamedTuple):
    """An object that was found: its class, score, box (x1, y1, x2, y2) and keypoints (x, y), in pixels."""

    name: str
    score: float
    box: tuple[float, ...]
    keypoints: tuple[tuple[float, float], ...]


class Guess(NamedTuple):
    """A class, and the probability that a classifier gives it."""

    name: str
    probability: float


def predict(
    network: Trained | FileNetwork, image: str | Path, out: str | Path, *, threshold: float | None = None
) -> list[FoundObject]:
    """Finds the objects of an image file, draws them on a copy of it at `out`, and returns them, best first.

    Boxes are clipped to the image. Small images are enlarged for the drawing; large ones keep their size.

    Args:
      network: a detector, of a run, deployed, or in an exported file.
      image: a PNG, JPEG, WebP or BMP file.
      out: a path with a suffix that Pillow can write (.png, .jpg ...), where nothing is yet.
      threshold: the least score, see `least_score`.

    Raises:
      FileNotFoundError: no such image.
      FileExistsError: there is a file at `out`, perhaps the image itself.
      ValueError: the network is not a detector, `threshold` is out of its range, the file is not an image, or
        `out` has an unknown suffix.
    """
    path, out = _existing(image), Path(out)
    if out.exists():
        whose = "the image itself" if out.samefile(path) else "a file that is there"
        raise FileExistsError(f"`out` {out} is {whose}: give another name, pictures are not overwritten")
    known = description(network)
    if known.task != "detect":
        raise ValueError(f"{known.name} is a classifier, which finds no objects: `classify` asks it")
    threshold = least_score(network, threshold)
    pixels = _read(path, known.channels)
    fitted, ratio = prepare(pixels, known)
    objects = _objects(_detector(network)(fitted[None]), 0, ratio, threshold, pixels.shape)
    names = known.class_names
    drawing = _draw(pixels, objects, names)
    try:
        drawing.save(out)
    except ValueError as error:
        raise ValueError(f"cannot write a picture to {out}: use a name that ends in .png or .jpg") from error
    boxes, points = objects["boxes"].tolist(), objects["keypoints"].tolist()
    return [
        FoundObject(names[c], float(score), tuple(box), tuple(map(tuple, keypoints)))
        for c, score, box, keypoints in zip(objects["classes"], objects["scores"], boxes, points)
    ]


def classify(network: Trained | FileNetwork, image: str | Path, *, count: int = 5) -> list[Guess]:
    """The `count` likeliest classes of an image file with their probabilities, best first.

    Args:
      network: a classifier, of a run, deployed, or in an exported file.
      image: a PNG, JPEG, WebP or BMP file.

    Raises:
      FileNotFoundError: no such image.
      ValueError: the network is not a classifier, or the file is not an image.
    """
    known = description(network)
    if known.task != "classify":
        raise ValueError(f"{known.name} is a detector: `predict` finds objects with it")
    fitted, _ = prepare(_read(image, known.channels), known)
    logits = network.logits if isinstance(network, FileNetwork) else _logits(network)
    probabilities = np.asarray(jax.nn.softmax(np.asarray(logits(fitted[None]))[0].astype(np.float32)))
    best = np.argsort(-probabilities, kind="stable")[:count]
    return [Guess(known.class_names[i], float(probabilities[i])) for i in best]


def description(network: Trained | FileNetwork) -> Metadata:
    """What is known of a network: its task, its classes, and how it takes images."""
    return network.metadata if isinstance(network, FileNetwork) else metadata_of(network)


def least_score(network: Trained | FileNetwork, threshold: float | None = None) -> float:
    """Returns the least score of objects that are drawn: `threshold`, or by default `THRESHOLD`.

    Raises:
      ValueError: `threshold` is not between `detect.score_threshold` of the network's config, below which it
        finds nothing, and 1.
    """
    least = description(network).score_threshold
    if threshold is None:
        return max(THRESHOLD, least)
    if not least <= threshold <= 1:  # also refuses nan
        raise ValueError(
            f"`threshold` is {threshold:g}; it must be between {least:g}, the config's "
            "`detect.score_threshold`, and 1"
        )
    return threshold


def _read(image: str | Path, channels: int) -> np.ndarray:
    """The pixels of an image file."""
    path = _existing(image)
    return decode_image(read_encoded(str(path)), channels=channels, name=str(path))


def _existing(image: str | Path) -> Path:
    if not (path := Path(image)).exists():
        raise FileNotFoundError(f"no image {path}")
    return path


def _detector(network: Trained | FileNetwork) -> Callable[[np.ndarray], Detections]:
    """Returns a function from images to detections as NumPy arrays, compiled once for each batch size."""
    if isinstance(network, FileNetwork):
        return network.detect
    parts = split_model(network.model)
    detect = make_detect(parts.graphdef, network.config)
    return lambda images: jax.device_get(detect(parts.params, parts.non_trainable, images))


def _objects(
    detections: Detections, row: int, ratio: float, threshold: float, shape: tuple[int, ...]
) -> dict[str, Any]:
    """Returns the detections of one image from `threshold` on, in pixels of the original of this shape.

    The network's input is a square, and its boxes may extend into the padding: they are clipped to the image,
    and those that lie in the padding only are left out.
    """
    height, width = shape[:2]
    boxes = np.clip(detections.boxes[row] / ratio, 0, np.array([width, height, width, height], np.float32))
    in_image = (boxes[:, 2:] > boxes[:, :2]).all(-1)
    drawn = (detections.scores[row] >= threshold) & (detections.classes[row] >= 0) & in_image
    return {
        "boxes": boxes[drawn],
        "classes": detections.classes[row][drawn],
        "scores": detections.scores[row][drawn],
        "keypoints": detections.keypoints[row][drawn] / ratio,
    }


def _shrunk(image: np.ndarray, objects: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """Shrinks an image to a longer side of at most `SIDE`, and its objects with it."""
    height, width = image.shape[:2]
    if (longer := max(height, width)) <= SIDE:
        return image, objects
    fitted = resize(image, (max(1, round(height * SIDE / longer)), max(1, round(width * SIDE / longer))))
    scale = np.array([fitted.shape[1] / width, fitted.shape[0] / height], np.float32)
    points = objects["keypoints"]
    points = np.concatenate([points[..., :2] * scale, points[..., 2:]], -1)
    return fitted, {**objects, "boxes": objects["boxes"] * np.tile(scale, 2), "keypoints": points}


def _draw(image: np.ndarray, objects: dict[str, Any], class_names: tuple[str, ...]) -> Any:
    zoom = max(1, round(SIDE / max(image.shape[:2])))
    return draw_detections(image, **objects, class_names=class_names, zoom=zoom)


def _png(drawing: Any) -> bytes:
    buffer = io.BytesIO()
    drawing.save(buffer, format="PNG")
    return buffer.getvalue()
