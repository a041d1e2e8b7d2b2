"""Opens a data set by name: the embedded digits, a folder of images, or any prepared TFDS data set."""

import os

from repopt_jax.data.folder import open_folder
from repopt_jax.data.images import Source
from repopt_jax.data.prepared import open_tfds, open_tfds_directory

SOURCES = ("digits", "folder", "tfds")


def open_source(
    source: str, *, name: str | None = None, data_dir: str | os.PathLike[str] | None = None
) -> Source:
    """Opens a data set. Nothing is decoded yet, and nothing is downloaded.

    Args:
      source: "digits", "folder" or "tfds".
      name: tfds: the data set, as `cifar10`, `name/config` or `name:1.2.0`. folder: what to call it, by
        default the folder's name. digits: not given.
      data_dir: digits: where the prepared files are kept, by default `repopt_jax` in the user's cache
        (`$XDG_CACHE_HOME` or `~/.cache`). folder: the folder, required. tfds: TFDS's own, by default
        `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.

    Raises:
      ValueError: an unknown source, an argument that is missing or does not apply, or data that cannot be
        used.
      FileNotFoundError: the folder or the prepared data set does not exist.
      ImportError: digits have to be prepared and scikit-learn is not installed.
    """
    if source not in SOURCES:
        raise ValueError(f"`source` is {source!r}; it must be one of {', '.join(SOURCES)}")
    if source == "folder":
        if data_dir is None:
            raise ValueError("`data_dir` is missing: source 'folder' needs the folder of images")
        return open_folder(data_dir, name=name)
    if source == "tfds":
        if not name:
            raise ValueError("`name` is missing: source 'tfds' needs a data set, such as 'cifar10'")
        return open_tfds(name, data_dir=data_dir)
    if name is not None:
        raise ValueError(f"`name` is {name!r}, but source 'digits' is one data set; leave it out")
    from repopt_jax.data import digits

    return open_tfds_directory(digits.prepare(data_dir))
