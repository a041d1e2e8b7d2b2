"""Annotations in COCO's format (boxes and keypoints) with their folders of images, as a data set.

A file is checked as a whole when it is opened. One error lists all that is wrong with it, each kind of
mistake with its first few offenders and the number of the others.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from repopt_jax import jsontext
from repopt_jax.arguments import check_path
from repopt_jax.data.dataset import AnnotatedSource, AnnotatedSplit, DetectionInfo, Objects
from repopt_jax.data.images import (
    decode_image,
    exchanges_sides,
    image_header,
    read_encoded,
    sampled_shape,
)

# COCO's own constants for the 17 keypoints of a person, in its order, and the default for other keypoints.
PERSON_SIGMAS = (
    *(0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072),
    *(0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089),
)
OTHER_SIGMA = 0.05
# The number of objects in an image that COCO's evaluation considers.
MAX_OBJECTS = 100
# The number of offenders of each kind that a message names.
MAX_LISTED = 3
# A box narrower than this, in pixels, counts as empty: in float32 its sides may be equal.
EMPTY = float(np.finfo(np.float32).eps)
# The side in a keypoint's name: the word anywhere, a separate letter, or a capital letter as a suffix.
SIDE = re.compile(
    r"(?P<left>(?i:left))|(?P<right>(?i:right))"
    r"|(?P<l>(?<![^\W_])[lL](?![^\W_])|(?<=[a-z0-9])L$)|(?P<r>(?<![^\W_])[rR](?![^\W_])|(?<=[a-z0-9])R$)"
)
SIDES = {"left": "\0", "right": "\1", "l": "\2", "r": "\3"}
MIRRORED = str.maketrans("\0\1\2\3", "\1\0\3\2")

PathLike = str | os.PathLike[str]


def open_coco(
    data_dir: PathLike,
    *,
    train_annotations: PathLike = "train.json",
    eval_annotations: PathLike = "val.json",
    train_images: PathLike | None = None,
    eval_images: PathLike | None = None,
    name: str | None = None,
    max_objects: int | None = None,
    sigmas: Sequence[float] | None = None,
    flip_pairs: Sequence[tuple[int, int]] | Sequence[int] | None = None,
    max_pixels: int | None = None,
) -> AnnotatedSource:
    """Opens annotations in COCO's format. Every annotation is checked; no image is decoded yet.

    Classes are the categories in the order of their ids. Keypoints are those that the categories name
    (`keypoints`). Keypoints whose names differ in their side only trade places in a mirrored image, whatever
    their case: "left" and "right", or the letters l and r if they are separate (`l_eye`, `eye_r`, `eye.L`) or
    capital suffixes (`eyeL`). An object without keypoints has them all unlabelled. Boxes may extend beyond
    the border of their image; crowds (`iscrowd`) are kept for the evaluation and not trained on. Images may
    be without annotations. Coordinates are taken as they are, see `repopt_jax.data.dataset.Objects`.

    Args:
      data_dir: the folder that the other paths are relative to.
      train_annotations: JSON of the training images.
      eval_annotations: JSON of the images that are kept for evaluation.
      train_images: folder of the training images, by default the one named as the JSON is, without its ending
        (`train`), or else `images`.
      eval_images: the same for evaluation (`val`, or else `images`).
      name: of the data set, by default that of the folder.
      max_objects: objects of one image that a batch has room for; by default the largest number in a training
        image, but at most 100.
      sigmas: see `DetectionInfo`; by default COCO's own for its person of 17 keypoints, 0.05 for any other.
      flip_pairs: see `DetectionInfo`, as pairs or in one row, (0, 1, 2, 3) for (0, 1) and (2, 3); by default
        those that the names of the keypoints give, as above. () for none.
      max_pixels: that an image may have; None for `images.MAX_PIXELS`, 2^25.

    Raises:
      FileNotFoundError: a JSON file or a folder of images does not exist.
      ValueError: a file is not in COCO's format; an image is missing; an annotation refers to an image or a
        category that is not listed, has an empty or inverted box or one wholly outside its image, or
        keypoints that do not fit or that no category names; a category names a keypoint twice; a split has
        nothing but crowds; the two files have different categories; `flip_pairs` or `sigmas` do not fit the
        keypoints.
    """
    check_path("data_dir", data_dir)
    root = Path(data_dir).expanduser()
    files = [root / Path(file).expanduser() for file in (train_annotations, eval_annotations)]
    folders = [_image_folder(root, file, given) for file, given in zip(files, (train_images, eval_images))]
    train_file, eval_file = (_Annotations(file, folder, max_pixels) for file, folder in zip(files, folders))
    _check_same_categories(train_file, eval_file)
    paths = train_file.paths
    channels = sampled_shape(len(paths), paths.__getitem__, max_pixels=max_pixels)[1]
    train, evaluation = (CocoImages(file, channels) for file in (train_file, eval_file))
    keypoint_names = train_file.keypoint_names
    info = DetectionInfo(
        name=name or root.resolve().name,
        class_names=tuple(train_file.categories.values()),
        keypoint_names=keypoint_names,
        channels=channels,
        max_objects=min(train.most_objects, MAX_OBJECTS) if max_objects is None else max_objects,
        num_train=len(train),
        num_eval=len(evaluation),
        flip_pairs=_flip_pairs(keypoint_names) if flip_pairs is None else _as_pairs(flip_pairs),
        sigmas=_default_sigmas(keypoint_names) if sigmas is None else tuple(map(float, sigmas)),
    )
    return AnnotatedSource(info, train, evaluation)


class CocoImages(AnnotatedSplit):
    """The images of one annotation file, in its order."""

    def __init__(self, file: "_Annotations", channels: int):
        self._paths, self._shapes, self._channels = file.paths, file.shapes, channels
        self.max_pixels: int | None = file.max_pixels
        order = np.argsort(file.rows, kind="stable")
        self._starts = np.searchsorted(file.rows[order], np.arange(len(file.paths) + 1))
        self._objects: dict[str, np.ndarray] = {name: array[order] for name, array in file.objects.items()}
        self.most_objects: int = int(np.bincount(file.rows[~file.objects["crowd"]]).max())

    def __len__(self) -> int:
        return len(self._paths)

    def objects(self, index: int) -> Objects:
        part = slice(self._starts[index], self._starts[index + 1])
        return {name: array[part] for name, array in self._objects.items()}  # pyright: ignore[reportReturnType]

    def path(self, index: int) -> str | None:
        return self._paths[index]

    def image(self, index: int) -> np.ndarray:
        path = self._paths[index]
        encoded = read_encoded(path)
        image = decode_image(encoded, channels=self._channels, name=path, max_pixels=self.max_pixels)
        height, width = self._shapes[index]
        if image.shape[:2] != (height, width):
            how = "use the image that was annotated, not turned and not resized"
            if image.shape[:2] == (width, height) and exchanges_sides(encoded, max_pixels=self.max_pixels):
                how = (
                    "its EXIF orientation is applied, and they are for its pixels as they are stored: "
                    "annotate it upright, as viewers show it, or remove the orientation from the file"
                )
            raise ValueError(
                f"image {path} is {image.shape[1]} wide and {image.shape[0]} high, but its annotations are "
                f"for {width} by {height}; {how}"
            )
        return image


class _Annotations:
    """One annotation file, checked.

    Attributes:
      categories: id -> name, sorted by id.
      keypoint_names: those of the categories that have keypoints.
      paths: of the image files.
      shapes: (height, width) of each image.
      rows: int (t,), the position of the image that each of the t annotations belongs to.
      objects: the arrays of `Objects` for all annotations together.
    """

    def __init__(self, path: Path, folder: Path, max_pixels: int | None):
        content = _load(path)
        self.path: Path = path
        self.max_pixels: int | None = max_pixels
        problems: list[str] = []
        self._read_categories(content["categories"], problems)
        self._read_images(content["images"], folder, problems)
        self._read_annotations(content["annotations"], problems)
        if not problems and not (~self.objects["crowd"]).any():
            problems.append("it has no annotation but crowds: there is nothing to learn or to find")
        _refuse(path, problems)

    def _read_categories(self, categories: list[dict], problems: list[str]) -> None:
        names = {c["id"]: str(c["name"]) for c in categories}
        self.categories: dict[int | str, str] = {
            i: names[i] for i in sorted(names, key=lambda i: (isinstance(i, str), i))
        }
        if not categories:
            problems.append("it has no categories")
        _add(problems, "categories whose id occurs twice", _repeated(c["id"] for c in categories))
        with_keypoints = [c for c in categories if c.get("keypoints")]
        named = {tuple(map(str, c["keypoints"])) for c in with_keypoints}
        if len(named) > 1:
            differing = [str(c["name"]) for c in with_keypoints]
            _add(problems, "categories with different keypoints, which must be the same", differing)
        twice = [name for names in sorted(named) for name in _repeated(names)]
        _add(problems, "keypoints that a category names twice", twice, "give each a name of its own")
        self.keypoint_names: tuple[str, ...] = min(named) if named else ()

    def _read_images(self, images: list[dict], folder: Path, problems: list[str]) -> None:
        self.ids: dict[int | str, int] = {image["id"]: row for row, image in enumerate(images)}
        self.paths: list[str] = [os.path.join(folder, image["file_name"]) for image in images]
        self.shapes: list[tuple[int, int]] = []
        if not images:
            problems.append("it has no images")
        _add(problems, "images whose id occurs twice", _repeated(image["id"] for image in images))
        outside = [image["file_name"] for image in images if not _is_inside(image["file_name"])]
        remedy = "give file_name relative to the folder of the images, without '..'"
        _add(problems, "images whose file_name leads out of their folder", outside, remedy)
        _refuse(self.path, problems)
        missing = _missing(self.paths)
        _add(problems, "images whose file is missing", missing, "put the files there or remove the entries")
        without_file = set(missing)
        for image, path in zip(images, self.paths):
            size = image.get("height"), image.get("width")
            if not all(isinstance(n, int) and n > 0 for n in size):
                size = (1, 1)
                if path not in without_file:
                    size = image_header(path, max_pixels=self.max_pixels)[0]
            self.shapes.append(size)  # pyright: ignore[reportArgumentType]

    def _read_annotations(self, annotations: list[dict], problems: list[str]) -> None:
        unlisted = [a for a in annotations if a["image_id"] not in self.ids]
        _add(problems, "annotations of images that are not listed", self._names(unlisted))
        unknown = [a for a in annotations if a["category_id"] not in self.categories]
        _add(problems, "annotations of an unknown category", self._names(unknown))
        without = [a for a in annotations if not _is_numbers(a["bbox"], 4)]
        what = "annotations whose bbox is not four numbers x, y, width, height"
        _add(problems, what, self._names(without))
        count = 3 * len(self.keypoint_names)
        misshapen = [a for a in annotations if a.get("keypoints") and not _is_numbers(a["keypoints"], count)]
        if count:
            what = f"annotations whose keypoints are not {count} numbers, three for each that is named"
            remedy = ""
        else:
            what = "annotations with keypoints"
            remedy = (
                "the categories name no keypoints: add `keypoints`, the list of their names, to a category"
            )
        _add(problems, what, self._names(misshapen), remedy)
        _refuse(self.path, problems)
        self._make_arrays(annotations, problems)

    def _make_arrays(self, annotations: list[dict], problems: list[str]) -> None:
        def names(selected: Any) -> list[str]:
            return self._names([annotations[i] for i in np.flatnonzero(selected)])

        corners = _numbers([a["bbox"] for a in annotations]).reshape(-1, 4)
        with np.errstate(over="ignore", invalid="ignore"):
            corners[:, 2:] += corners[:, :2]
        boxes = _float32(corners)
        self.rows: np.ndarray = np.array([self.ids[a["image_id"]] for a in annotations], int)
        finite = np.isfinite(boxes).all(1, keepdims=True)
        sides = np.where(finite, boxes, 0).astype(float)
        sides = sides[:, 2:] - sides[:, :2]
        empty = ~(sides > EMPTY).all(1)
        remedy = "width and height must be positive, and all four finite"
        _add(problems, "annotations with an empty or inverted box", names(empty), remedy)
        sizes = np.array(self.shapes)[self.rows, ::-1]
        outside = ((boxes[:, :2] >= sizes) | (boxes[:, 2:] <= 0)).any(1) & ~empty
        _add(problems, "annotations with a box outside their image", names(outside))
        keypoints = _float32(self._keypoints(annotations))
        flags, labelled = keypoints[..., 2], keypoints[..., 2] != 0
        wrong = ~np.isin(flags, (0, 1, 2)) | (labelled & ~np.isfinite(keypoints).all(-1))
        _add(problems, "annotations with keypoints that are not x, y and 0, 1 or 2", names(wrong.any(1)))
        labels = {category: label for label, category in enumerate(self.categories)}
        areas = (a.get("area") for a in annotations)
        areas = _float32(_numbers([area if isinstance(area, int | float) else 0 for area in areas]))
        usable = (areas > 0) & np.isfinite(areas)
        self.objects: dict[str, np.ndarray] = {
            "boxes": boxes,
            "classes": np.array([labels[a["category_id"]] for a in annotations], np.int32),
            "keypoints": np.where(labelled[..., None], keypoints, np.float32(0)),
            "crowd": np.array([bool(a.get("iscrowd")) for a in annotations], bool),
            "area": np.where(usable, areas, _float32(sides.prod(1))),
        }

    def _keypoints(self, annotations: list[dict]) -> np.ndarray:
        """Float64 (annotations, K, 3)."""
        count = len(self.keypoint_names)
        keypoints = np.zeros((len(annotations), count, 3))
        for row, annotation in zip(keypoints, annotations):
            if annotation.get("keypoints"):
                row[:] = _numbers(annotation["keypoints"]).reshape(count, 3)
        return keypoints

    def _names(self, annotations: list[dict]) -> list[str]:
        """The names of annotations in messages."""
        return [f"{a.get('id', '?')} (image {self._image_name(a['image_id'])})" for a in annotations]

    def _image_name(self, image_id: Any) -> str:
        row = self.ids.get(image_id)
        return repr(image_id) if row is None else os.path.basename(self.paths[row])


def _load(path: Path) -> dict[str, Any]:
    """Reads the JSON of `path`, and checks that images, annotations and categories have the needed fields."""
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no annotation file {path}; expected JSON in COCO's format: images, annotations and "
            "categories"
        )
    try:
        # Such a file can have millions of entries, of which only those that are needed are looked at below.
        found = jsontext.parse(path.read_bytes(), path, depth=None)
    except ValueError as error:
        raise ValueError(f"{error}; expected annotations in COCO's format") from error
    fields = {
        "images": ("id", "file_name"),
        "annotations": ("image_id", "category_id", "bbox"),
        "categories": ("id", "name"),
    }
    lists = [name for name in fields if not isinstance(found, dict) or not isinstance(found.get(name), list)]
    if lists:
        raise ValueError(f"{path} is not in COCO's format: it has no list {', '.join(lists)}")
    problems: list[str] = []
    for name, needed in fields.items():
        bad = [str(i) for i, entry in enumerate(found[name]) if not _has_fields(entry, needed)]
        _add(problems, f"{name} (counted from 0) without a usable {', '.join(needed)}", bad)
    _refuse(path, problems)
    return found


def _image_folder(root: Path, file: Path, given: PathLike | None) -> Path:
    choices = [root / file.stem, root / "images"] if given is None else [root / Path(given).expanduser()]
    for folder in choices:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"there is no folder of the images of {file}: expected {' or '.join(map(str, choices))}"
    )


def _is_inside(name: str) -> bool:
    """Whether the name of a file stays in the folder that it is relative to."""
    path = Path(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _missing(paths: list[str]) -> list[str]:
    """The files that do not exist. Each folder is listed once, much faster than a check of each file."""
    present: dict[str, set[str]] = {}
    for folder in {os.path.dirname(path) for path in paths}:
        present[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    return [path for path in paths if os.path.basename(path) not in present[os.path.dirname(path)]]


def _check_same_categories(one: _Annotations, other: _Annotations) -> None:
    for what, left, right in (
        ("categories", one.categories, other.categories),
        ("keypoints", one.keypoint_names, other.keypoint_names),
    ):
        if left != right:
            raise ValueError(
                f"{one.path} and {other.path} have different {what}, {left or 'none'} and {right or 'none'}; "
                "they must be the same"
            )


def _flip_pairs(names: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """Pairs of keypoints whose names differ in their sides only; case counts first, and then is ignored.

    Every side in a name changes: the right corner of the left eye becomes the left corner of the right eye.
    """
    pairs: list[tuple[int, int]] = []
    for normalise in (str, str.casefold):
        keypoints: dict[str, list[int]] = {}
        for keypoint, name in enumerate(names):
            if all(keypoint not in pair for pair in pairs):
                keypoints.setdefault(normalise(SIDE.sub(_side_sign, name)), []).append(keypoint)
        mirrored = [(own, keypoints.get(key.translate(MIRRORED), [])) for key, own in keypoints.items()]
        pairs += [(a[0], b[0]) for a, b in mirrored if len(a) == len(b) == 1 and a < b]
    return tuple(sorted(pairs))


def _side_sign(match: re.Match[str]) -> str:
    return SIDES[match.lastgroup or ""]


def _as_pairs(flip_pairs: Sequence[tuple[int, int]] | Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Pairs from a row of numbers; what is no row of numbers is returned for `DetectionInfo` to check."""
    row = list(flip_pairs)
    if not all(isinstance(keypoint, int) for keypoint in row):
        return tuple(row)  # pyright: ignore[reportReturnType]
    if len(row) % 2:
        raise ValueError(f"`flip_pairs` is {tuple(row)}; it must be pairs of keypoints, an even number")
    return tuple(zip(row[::2], row[1::2]))  # pyright: ignore[reportReturnType]


def _default_sigmas(names: tuple[str, ...]) -> tuple[float, ...]:
    if len(names) == len(PERSON_SIGMAS) and names[0] == "nose":
        return PERSON_SIGMAS
    return (OTHER_SIGMA,) * len(names)


def _has_fields(entry: Any, names: tuple[str, ...]) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("keypoints") or [], list):
        return False
    kinds = {"bbox": list, "file_name": str}
    return all(isinstance(entry.get(name), kinds.get(name, int | str)) for name in names)


def _is_numbers(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(isinstance(v, int | float) for v in value)


def _numbers(values: list) -> np.ndarray:
    """As float64; an integer that is too large for it becomes infinite."""
    try:
        return np.array(values, float)
    except OverflowError:
        return np.array([_numbers(v) if isinstance(v, list) else _number(v) for v in values])


def _number(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def _float32(values: np.ndarray) -> np.ndarray:
    """As float32; what is too large for it becomes infinite."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _repeated(ids: Iterable[Any]) -> list[str]:
    return [str(i) for i, count in Counter(ids).items() if count > 1]


def _add(problems: list[str], what: str, offenders: list[str], remedy: str = "") -> None:
    """Adds a problem to `problems` if there are any offenders."""
    if offenders:
        more = f" and {len(offenders) - MAX_LISTED} more" if len(offenders) > MAX_LISTED else ""
        how = f" ({remedy})" if remedy else ""
        problems.append(f"{what}: {', '.join(offenders[:MAX_LISTED])}{more}{how}")


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{path} cannot be used: {'; '.join(problems)}")
