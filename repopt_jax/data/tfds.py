"""Prepared TFDS data sets, read as ArrayRecord, without TensorFlow and without the code that made them."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from repopt_jax.arguments import check_kind
from repopt_jax.data.dataset import DatasetInfo, Source
from repopt_jax.data.images import Record, Split


def open_tfds(
    name: str, *, data_dir: str | os.PathLike[str] | None = None, max_pixels: int | None = None
) -> Source:
    """Opens a TFDS data set that has been prepared as ArrayRecord.

    Args:
      name: `cifar10`, `name/config` or `name:1.2.0`.
      data_dir: TFDS's directory, by default `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
      max_pixels: that an image may have; None for `images.MAX_PIXELS`, 2^25.

    Raises:
      FileNotFoundError: it is not prepared in `data_dir`.
      ValueError: it is not in a random-access format, is not one of labelled images, or is damaged.
    """
    check_kind("name", name, str, "the name of a data set")
    import tensorflow_datasets as tfds

    core: Any = tfds.core  # loads its modules lazily, which a type checker does not see
    absent = core.registered.DatasetNotFoundError
    directory = None if data_dir is None else os.path.expanduser(data_dir)
    place = directory or core.constants.DATA_DIR
    prepare = f"tfds.builder({name!r}, data_dir=..., file_format='array_record').download_and_prepare()"
    remedy = f"remove its folder and prepare it anew with {prepare}"
    try:
        with _whole(f"TFDS data set {name!r} in {place}", remedy, passing=(absent,)):
            builder = core.read_only_builder.builder_from_files(name, data_dir=directory)
    except absent as error:
        raise FileNotFoundError(
            f"TFDS data set {name!r} is not prepared in {place}; prepare it once with {prepare}"
        ) from error
    return _from_builder(builder, remedy, max_pixels)


def open_tfds_directory(directory: str | os.PathLike[str], *, remedy: str) -> Source:
    """Opens the prepared data set in `directory`, which holds its `dataset_info.json`; `remedy` is what
    messages say to do if it is damaged."""
    import tensorflow_datasets as tfds

    with _whole(f"the data set in {directory}", remedy):
        builder = tfds.builder_from_directory(os.fspath(directory))
    return _from_builder(builder, remedy)


@contextlib.contextmanager
def _whole(what: str, remedy: str, *, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Makes a ValueError that names `what` of whatever TFDS raises of damaged files, which is nearly
    anything; but errors of the classes `passing`, and of packages that are missing, stay what they are."""
    try:
        yield
    except (ImportError, *passing):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot read {what} ({reason}); {remedy}") from error


class _TfdsRecords(Sequence[Record]):
    """A split of a prepared data set. Its images stay encoded: Pillow decodes them, as those of a folder."""

    def __init__(self, builder: Any, split: str, image_key: str, label_key: str, remedy: str):
        import tensorflow_datasets as tfds

        self._keys = image_key, label_key
        self._name = f"of split {split} in {builder.data_dir}"
        self._remedy = remedy
        try:
            with _whole(f"split {split} in {builder.data_dir}", remedy, passing=(NotImplementedError,)):
                skipping = {image_key: tfds.decode.SkipDecoding()}
                self._source = builder.as_data_source(split, decoders=skipping)
        except NotImplementedError as error:
            raise ValueError(
                f"TFDS data set in {builder.data_dir} is not stored as array_record; prepare it in "
                "another `data_dir` with download_and_prepare(file_format='array_record')"
            ) from error

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        image_key, label_key = self._keys
        with _whole(f"image {index} {self._name}", self._remedy):
            stored = self._source[index]
            return Record(stored[image_key], int(stored[label_key]), f"{index} {self._name}")


def _from_builder(builder: Any, remedy: str, max_pixels: int | None = None) -> Source:
    image_key, label_key = _feature_keys(builder)
    features = builder.info.features
    if "train" not in builder.info.splits:
        raise ValueError(f"TFDS data set in {builder.data_dir} has no split train")
    train = _TfdsRecords(builder, "train", image_key, label_key, remedy)
    evaluation = _eval_records(builder, image_key, label_key, remedy)
    *size, channels = features[image_key].shape
    info = DatasetInfo(
        name=builder.info.full_name.rsplit("/", 1)[0],
        class_names=tuple(features[label_key].names),
        channels=channels,
        image_shape=None if None in size else (*size, channels),
        num_train=len(train),
        num_eval=len(evaluation),
    )
    options = {"channels": channels, "max_pixels": max_pixels}
    return Source(info, Split(train, **options), Split(evaluation, **options))


def _feature_keys(builder: Any) -> tuple[str, str]:
    """The names of the image and of the label feature."""
    keys, features = builder.info.supervised_keys, builder.info.features
    kinds = [type(features[key]).__name__ for key in keys] if keys and len(keys) == 2 else []
    if kinds != ["Image", "ClassLabel"]:
        raise ValueError(
            f"TFDS data set in {builder.data_dir} has supervised features {kinds}; "
            "it must be one of an Image and a ClassLabel"
        )
    image = features[keys[0]]
    if image.shape[-1] not in (1, 3) or image.np_dtype != "uint8":
        raise ValueError(
            f"TFDS data set in {builder.data_dir} has images of shape {image.shape} and dtype "
            f"{image.np_dtype}; they must be uint8 with 1 or 3 channels"
        )
    return keys


def _eval_records(builder: Any, image_key: str, label_key: str, remedy: str) -> _TfdsRecords:
    """The split test, else validation. A test split without labels (-1, such as ImageNet's) is skipped."""
    for split in ("test", "validation"):
        if split in builder.info.splits:
            records = _TfdsRecords(builder, split, image_key, label_key, remedy)
            if len(records) and records[0].label >= 0:
                return records
    raise ValueError(
        f"TFDS data set in {builder.data_dir} has no labelled split test or validation; "
        f"it has {', '.join(builder.info.splits)}"
    )
