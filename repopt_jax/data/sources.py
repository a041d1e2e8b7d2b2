"""The registry of data sets: one row for each, with the function that opens it and the task that it is for.

A new data set takes one module with that function, and one row here.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from repopt_jax.arguments import check_items, check_kind
from repopt_jax.data.coco import open_coco
from repopt_jax.data.dataset import AnnotatedSource
from repopt_jax.data.digits import open_digits
from repopt_jax.data.folder import open_folder
from repopt_jax.data.scenes import open_scenes
from repopt_jax.data.tfds import open_tfds


class SourceEntry(NamedTuple):
    """A row of the registry.

    Attributes:
      task: "classify" (`open` returns a `Source`) or "detect" (an `AnnotatedSource`).
      open: opens the data set. Its arguments are the options of the data set; those without a default are
        required. They have the names of the fields of a config's `data` section.
    """

    task: str
    open: Callable[..., Any]

    @property
    def options(self) -> tuple[str, ...]:
        """The names of the options."""
        return tuple(inspect.signature(self.open).parameters)

    @property
    def required(self) -> tuple[str, ...]:
        """The names of the options without a default."""
        parameters = inspect.signature(self.open).parameters.values()
        return tuple(p.name for p in parameters if p.default is inspect.Parameter.empty)


def _open_scenes(
    *, scenes: tuple[int, int] = (2000, 500), scenes_seed: int = 0, image_size: int = 64
) -> AnnotatedSource:
    """`open_scenes` by the names of a config: `scenes` are the numbers for training and for evaluation."""
    check_items("scenes", scenes, "two numbers of scenes")
    if len(scenes) != 2 or min(scenes) < 1:
        raise ValueError(
            f"`scenes` is {scenes}; it must be two numbers of scenes, for training and for evaluation, each "
            "at least 1, such as (2000, 500)"
        )
    num_train, num_eval = scenes
    return open_scenes(scenes_seed, num_train=num_train, num_eval=num_eval, size=image_size)


SOURCES = {
    "digits": SourceEntry("classify", open_digits),
    "folder": SourceEntry("classify", open_folder),
    "tfds": SourceEntry("classify", open_tfds),
    "scenes": SourceEntry("detect", _open_scenes),
    "coco": SourceEntry("detect", open_coco),
}


def open_source(source: str, **options: Any) -> Any:
    """Opens a data set by its name. Nothing is decoded yet, and nothing is downloaded.

    Args:
      source: "digits" (embedded), "folder" (`train/<class>/*` and `test/<class>/*`) or "tfds" (a prepared
        TFDS data set), which are for classification; "scenes" (composed of the embedded digits) or "coco"
        (annotations in COCO's format), which are for detection.
      **options: arguments of the function in the data set's row of `SOURCES`: `open_digits`, `open_folder`,
        `open_tfds` or `open_coco`; of scenes `scenes` (their numbers for training and for evaluation),
        `scenes_seed` and `image_size`. None and "" mean the default.

    Returns:
      A `Source` for classification, or an `AnnotatedSource` for detection.

    Raises:
      ValueError: an unknown source, options that are missing or that it does not take (all are listed), or
        data that cannot be used.
      FileNotFoundError: the folder or the prepared data set does not exist.
      ImportError: the digits are needed and scikit-learn is not installed.
    """
    check_kind("source", source, str, "the name of a data set")
    if source not in SOURCES:
        raise ValueError(f"`source` is {source!r}; it must be one of {', '.join(SOURCES)}")
    entry = SOURCES[source]
    given = {n: v for n, v in options.items() if v is not None and not (isinstance(v, str) and not v)}
    problems = [f"`{n}` is missing: source {source!r} needs it" for n in entry.required if n not in given]
    problems += [
        f"`{n}` is {v!r}, but source {source!r} takes only {', '.join(entry.options)}; leave it out"
        for n, v in given.items()
        if n not in entry.options
    ]
    if problems:
        raise ValueError("; ".join(problems))
    return entry.open(**given)


def open_configured(settings: Any) -> Any:
    """Opens the data set that settings describe, such as the `data` section of a config.

    Args:
      settings: its attribute `source` is the name of the data set; the options are its attributes of the same
        names, where it has them.

    Returns and raises as `open_source`.
    """
    if not hasattr(settings, "source"):
        raise TypeError(
            f"`settings` is of type {type(settings).__name__}: it must be the `data` section of a config"
        )
    options = SOURCES[settings.source].options if settings.source in SOURCES else ()
    return open_source(settings.source, **{name: getattr(settings, name, None) for name in options})
