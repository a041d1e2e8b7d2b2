"""The embedded data set: real handwritten digits, prepared as a TFDS data set when they are first opened.

They are the 1,797 digits that scikit-learn carries (the test part of "Optical Recognition of Handwritten
Digits", E. Alpaydin and C. Kaynak, UCI, 1998, https://doi.org/10.24432/C50P49): 8x8 pixels, 17 grey levels,
13 writers.

The split is fixed and stratified: of each digit, in scikit-learn's order, every fifth image (5, 10,
...) is for testing. Writers are not recorded, so the same writer occurs in both parts.
"""

import contextlib
import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from repopt_jax.data.dataset import Source
from repopt_jax.data.tfds import open_tfds_directory

NAME = "digits"
VERSION = "1.0.0"
TEST_EVERY = 5
# Grey levels 0..16 are stretched to 0..255, so that "pixel / 255" means what it does elsewhere.
LEVELS = 16
# Keeps the builder out of TFDS's registry of names, which belongs to the user.
UNREGISTERED: dict[str, Any] = {"skip_registration": True}


def open_digits(*, data_dir: str | os.PathLike[str] | None = None) -> Source:
    """Opens the digits, which it prepares in `data_dir` if they are not there yet; see `prepare`.

    Raises:
      ValueError: what was prepared is damaged.
    """
    return open_tfds_directory(prepare(data_dir), remedy="remove the folder: it is made anew")


def prepare(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Prepares the data set if it is not there yet, and returns its folder.

    Args:
      data_dir: where prepared data sets are kept; the folder returned is `<data_dir>/digits/1.0.0`. By
        default `$XDG_CACHE_HOME/repopt_jax` or `~/.cache/repopt_jax`.

    Raises:
      ImportError: it is not there yet and scikit-learn is not installed.
      OSError: `data_dir` cannot be written.
    """
    root = default_data_dir() if data_dir is None else Path(data_dir).expanduser()
    final = root / NAME / VERSION
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=".preparing_", dir=root)
    except OSError as error:
        # From the number `OSError` selects the subclass, such as `PermissionError`.
        raise OSError(
            error.errno,
            f"cannot write {root} to prepare the digits: {error.strerror}; name another `data_dir` "
            "(--config.data.data_dir=DIR), or set XDG_CACHE_HOME",
        ) from error
    try:
        _build(temporary)
        _publish(Path(temporary) / NAME / VERSION, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def default_data_dir() -> Path:
    """The folder `repopt_jax` in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "repopt_jax"


def load() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All digits, in scikit-learn's order: images uint8 (n, 8, 8), labels int (n,), is_test bool (n,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn, which is not installed; pip install 'repopt_jax[digits]'"
        ) from error
    dataset: Any = load_digits()
    images = np.rint(dataset.images * (255 / LEVELS)).astype(np.uint8)
    labels = dataset.target
    is_test = np.zeros(len(labels), bool)
    for digit in range(10):
        is_test[np.flatnonzero(labels == digit)[TEST_EVERY - 1 :: TEST_EVERY]] = True
    return images, labels, is_test


def _publish(prepared: Path, final: Path) -> None:
    """Renames the finished folder to its final path; if another process was first, its folder is kept."""
    try:
        os.rename(prepared, final)
    except OSError:
        if not final.is_dir():
            raise


def _build(data_dir: str) -> None:
    import tensorflow_datasets as tfds

    images, labels, is_test = load()

    class Digits(tfds.core.GeneratorBasedBuilder, **UNREGISTERED):
        """The digits as PNG: TFDS needs TensorFlow to encode arrays, but not to store encoded bytes."""

        name = NAME
        VERSION = tfds.core.Version(VERSION)
        pkg_dir_path: Any = Path(data_dir)

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            )
            return tfds.core.DatasetInfo(
                builder=self,
                description="Optical recognition of handwritten digits, as carried by scikit-learn.",
                features=features,
                supervised_keys=("image", "label"),
                homepage="https://doi.org/10.24432/C50P49",
            )

        def _split_generators(self, dl_manager):
            del dl_manager  # nothing is downloaded
            return {"train": self._generate_examples(~is_test), "test": self._generate_examples(is_test)}

        def _generate_examples(self, selected: np.ndarray):
            for index in np.flatnonzero(selected):
                yield int(index), {"image": _png(images[index]), "label": int(labels[index])}

    # TFDS prints its progress; a library call must not.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        Digits(data_dir=data_dir, file_format="array_record").download_and_prepare()


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
