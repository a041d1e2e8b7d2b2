"""Finds images that cannot be read before a training does: by the beginnings and ends of their files, which
is quick, or by decoding all of them.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from repopt_jax.data.dataset import RandomAccess, check_source, part_of
from repopt_jax.data.images import quick_problem

SPLITS = ("train", "eval")
# Files of a split that `check_quickly` looks at, spread evenly: less than a second on a disk of one's own.
QUICK_FILES = 10_000
LISTED = 3  # bad images that a message names


class BadImage(NamedTuple):
    """An image that cannot be read: its split, its position there, and a sentence that names its file."""

    split: str
    index: int
    problem: str


def check_quickly(source: Any) -> list[BadImage]:
    """The images of a data set whose files are missing, empty, cut or no images, of at most QUICK_FILES in
    each split.

    Nothing is decoded, so that damage in the middle of a file is not found. Data sets that are not made of
    image files have none.
    """
    check_source(source)

    def problem(split: Any, index: int) -> str | None:
        path = split.path(index)
        return None if path is None else quick_problem(path, max_pixels=split.max_pixels)

    return _bad(source, problem, most=QUICK_FILES)


def check_images(source: Any) -> list[BadImage]:
    """The images of a data set that cannot be read; all are decoded, by as many threads as there are
    cores."""
    check_source(source)

    def problem(split: Any, index: int) -> str | None:
        try:
            split[index]
        except ValueError as error:
            return str(error)
        return None

    return _bad(source, problem)


def without_bad(source: Any) -> Any:
    """The data set without the images that `check_images` finds; they are its `skipped`.

    Raises:
      ValueError: no image of a split is left.
    """
    check_source(source)
    bad = check_images(source)
    if not bad:
        return source
    kept = {}
    for split in SPLITS:
        left_out = [one.index for one in bad if one.split == split]
        kept[split] = np.setdiff1d(np.arange(len(getattr(source, split))), left_out)
    if empty := [split for split, indices in kept.items() if not len(indices)]:
        raise ValueError(f"no image of the split {' and '.join(empty)} can be read: {listed(bad)}")
    parts = {split: part_of(source, split, indices) for split, indices in kept.items()}
    info = replace(source.info, num_train=len(kept["train"]), num_eval=len(kept["eval"]))
    return replace(source, info=info, **parts, skipped=tuple(bad))


def listed(bad: Iterable[BadImage]) -> str:
    """The first few problems, and how many more there are."""
    problems = [one.problem for one in bad]
    more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
    return "; ".join(problems[:LISTED]) + more


def _bad(
    source: Any, problem: Callable[[Any, int], str | None], *, most: int | None = None
) -> list[BadImage]:
    found = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name in SPLITS:
            split = getattr(source, name)
            if most is not None and (not isinstance(split, RandomAccess) or split.path(0) is None):
                continue  # it has no files
            count = len(split) if most is None else min(most, len(split))
            indices = [i * len(split) // count for i in range(count)]
            problems = pool.map(lambda i, split=split: problem(split, i), indices)
            found += [BadImage(name, i, said) for i, said in zip(indices, problems) if said is not None]
    return found
