"""A folder of images as a data set: `train/<class>/*` and `test/<class>/*`."""

import os
from collections.abc import Sequence
from pathlib import Path

from repopt_jax.arguments import check_path
from repopt_jax.data.dataset import DatasetInfo, Source
from repopt_jax.data.images import Record, Split, read_encoded, sampled_shape

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


def open_folder(
    data_dir: str | os.PathLike[str], *, name: str | None = None, max_pixels: int | None = None
) -> Source:
    """Opens `train/<class>/*` and `test/<class>/*` (or `val`, `validation`): JPEG, PNG, WebP or BMP files.

    Classes are the folders of `train`, sorted by name; hidden files and files with other suffixes are
    ignored. The files are listed and a few headers are read, but no image is decoded before it is asked for.
    The images have one channel if all the sampled ones are grey, else three.

    Args:
      data_dir: the folder that holds `train` and the others.
      name: of the data set, by default that of the folder.
      max_pixels: that an image may have; None for `images.MAX_PIXELS`, 2^25.

    Raises:
      FileNotFoundError: `data_dir`, its `train` or its test folder is missing.
      ValueError: no classes or only one, classes without images, or test classes that `train` does not have.
    """
    check_path("data_dir", data_dir)
    root = Path(data_dir).expanduser()
    train_dir, eval_dir = _split_folders(root)
    class_names = _class_folders(train_dir)
    if len(class_names) < 2:
        found = f"only the class {class_names[0]!r}" if class_names else "no class folders"
        raise ValueError(f"{train_dir} holds {found}; at least two folders <class>/ are needed")
    _check_eval_classes(train_dir, eval_dir, class_names)
    train = _FolderRecords(train_dir, class_names)
    evaluation = _FolderRecords(eval_dir, class_names)
    _check_not_empty(train, class_names)
    if not len(evaluation):
        raise ValueError(f"{eval_dir} holds no JPEG, PNG, WebP or BMP images; put them in <class>/ folders")
    shape, channels = sampled_shape(len(train), train.path, max_pixels=max_pixels)
    info = DatasetInfo(
        name=name or root.resolve().name,
        class_names=class_names,
        channels=channels,
        image_shape=shape,
        num_train=len(train),
        num_eval=len(evaluation),
    )
    options = {"channels": channels, "max_pixels": max_pixels}
    return Source(info, Split(train, **options), Split(evaluation, **options))


class _FolderRecords(Sequence[Record]):
    """The image files below `root`, class by class, each class sorted by file name."""

    def __init__(self, root: Path, class_names: Sequence[str]):
        self.root = str(root)
        self.paths: list[str] = []
        self.labels: list[int] = []
        for label, class_name in enumerate(class_names):
            names = _image_names(root / class_name)
            self.paths += [os.path.join(class_name, name) for name in names]
            self.labels += [label] * len(names)

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.paths[index])

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        path = self.path(index)
        return Record(read_encoded(path), self.labels[index], path)


def _split_folders(root: Path) -> tuple[Path, Path]:
    layout = "expected train/<class>/* and test/<class>/* (or val, validation)"
    if not root.is_dir():
        raise FileNotFoundError(f"`data_dir` {root} is not a folder; {layout}")
    if not (root / "train").is_dir():
        raise FileNotFoundError(f"{root} has no folder train; {layout}")
    for name in ("test", "val", "validation"):
        if (root / name).is_dir():
            return root / "train", root / name
    raise FileNotFoundError(f"{root} has no folder test, val or validation; {layout}")


def _class_folders(folder: Path) -> tuple[str, ...]:
    with os.scandir(folder) as entries:
        return tuple(sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(".")))


def _image_names(folder: Path) -> list[str]:
    if not folder.is_dir():  # a class that the eval split does not have
        return []
    names = (n for n in os.listdir(folder) if not n.startswith("."))
    return sorted(n for n in names if n.lower().endswith(IMAGE_SUFFIXES))


def _check_eval_classes(train_dir: Path, eval_dir: Path, class_names: Sequence[str]) -> None:
    unknown = [n for n in _class_folders(eval_dir) if n not in set(class_names)]
    if unknown:
        raise ValueError(
            f"{eval_dir} has classes that {train_dir} does not have: {', '.join(unknown)}; "
            "every test class must be a training class"
        )


def _check_not_empty(records: _FolderRecords, class_names: Sequence[str]) -> None:
    present = set(records.labels)
    empty = [name for label, name in enumerate(class_names) if label not in present]
    if empty:
        raise ValueError(
            f"{records.root} has classes without a JPEG, PNG, WebP or BMP image: {', '.join(empty)}; "
            "add images or remove them"
        )
