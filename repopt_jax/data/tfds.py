"""Prepared TFDS data sets, read as ArrayRecord, without TensorFlow and without the code that made them."""

import os
from collections.abc import Sequence
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
      ValueError: it is not in a random-access format, or is not one of labelled images.
    """
    check_kind("name", name, str, "the name of a data set")
    import tensorflow_datasets as tfds

    core: Any = tfds.core  # loads its modules lazily, which a type checker does not see
    directory = None if data_dir is None else os.path.expanduser(data_dir)
    try:
        builder = core.read_only_builder.builder_from_files(name, data_dir=directory)
    except core.registered.DatasetNotFoundError as error:
        place = directory or core.constants.DATA_DIR
        raise FileNotFoundError(
            f"TFDS data set {name!r} is not prepared in {place}; prepare it once with "
            f"tfds.builder({name!r}, data_dir=..., file_format='array_record').download_and_prepare()"
        ) from error
    return _from_builder(builder, max_pixels)


def open_tfds_directory(directory: str | os.PathLike[str]) -> Source:
    """Opens the prepared data set in `directory`, which holds its `dataset_info.json`."""
    import tensorflow_datasets as tfds

    return _from_builder(tfds.builder_from_directory(os.fspath(directory)))


class _TfdsRecords(Sequence[Record]):
    """A split of a prepared data set. Its images stay encoded: Pillow decodes them, as those of a folder."""

    def __init__(self, builder: Any, split: str, image_key: str, label_key: str):
        import tensorflow_datasets as tfds

        try:
            self._source = builder.as_data_source(split, decoders={image_key: tfds.decode.SkipDecoding()})
        except NotImplementedError as error:
            raise ValueError(
                f"TFDS data set in {builder.data_dir} is not stored as array_record; prepare it in "
                "another `data_dir` with download_and_prepare(file_format='array_record')"
            ) from error
        self._keys = image_key, label_key
        self._name = f"of split {split} in {builder.data_dir}"

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        stored = self._source[index]
        image_key, label_key = self._keys
        return Record(stored[image_key], int(stored[label_key]), f"{index} {self._name}")


def _from_builder(builder: Any, max_pixels: int | None = None) -> Source:
    image_key, label_key = _feature_keys(builder)
    features = builder.info.features
    if "train" not in builder.info.splits:
        raise ValueError(f"TFDS data set in {builder.data_dir} has no split train")
    train = _TfdsRecords(builder, "train", image_key, label_key)
    evaluation = _eval_records(builder, image_key, label_key)
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


def _eval_records(builder: Any, image_key: str, label_key: str) -> _TfdsRecords:
    """The split test, else validation. A test split without labels (-1, such as ImageNet's) is skipped."""
    for split in ("test", "validation"):
        if split in builder.info.splits:
            records = _TfdsRecords(builder, split, image_key, label_key)
            if len(records) and records[0].label >= 0:
                return records
    raise ValueError(
        f"TFDS data set in {builder.data_dir} has no labelled split test or validation; "
        f"it has {', '.join(builder.info.splits)}"
    )
