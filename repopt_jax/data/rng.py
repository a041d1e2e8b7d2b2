"""The random numbers of a training batch: uniform ones for every row, and a seed for its own streams."""

from typing import NamedTuple

import numpy as np

# What a row's seed is used for. Each use has a stream of its own, so that switching one augmentation on or
# off does not change the random numbers of the others.
CROP, RANDAUGMENT, JITTER, ERASING, MIXING = range(5)


class RowRng(NamedTuple):
    """The random numbers of the rows of a batch, one element for each row.

    Attributes:
      flip, y, x, zoom: float64 (rows,), uniform in [0, 1). They are drawn for the whole batch at once, which
        is much cheaper than a stream for each row, and whether they are used or not.
      seeds: int64 (rows,), in [0, 2**63): the seeds that `stream` takes.
    """

    flip: np.ndarray
    y: np.ndarray
    x: np.ndarray
    zoom: np.ndarray
    seeds: np.ndarray

    def rows(self, part: slice) -> "RowRng":
        """The random numbers of some of the rows."""
        return RowRng(*(values[part] for values in self))


def batch_rng(seed: int, batch: int, rows: int) -> RowRng:
    """The random numbers of batch number `batch`, of `rows` rows, in a run with this seed."""
    rng = np.random.default_rng((seed, batch))
    flip, y, x, zoom = rng.random((4, rows))
    return RowRng(flip, y, x, zoom, seeds=rng.integers(2**63, size=rows))


def stream(seed: int, use: int) -> np.random.Generator:
    """The generator of the row with this seed for one use, such as `CROP`."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, use], np.uint64)))
