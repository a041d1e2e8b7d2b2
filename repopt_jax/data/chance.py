"""Random numbers of a training batch: a few for every row, and a seed from which a row draws the rest."""

from typing import NamedTuple

import numpy as np

# What a row's seed is used for. Each use has a stream of its own, so that switching one augmentation on or
# off leaves the others' numbers as they are.
CROP, RANDAUGMENT, JITTER, ERASING, MIXING = range(5)


class Chance(NamedTuple):
    """The random numbers of some rows of a batch.

    Attributes:
      draws: uniform in [0, 1), float64 (rows, numbers that a row needs).
      seeds: int64 (rows,), in [0, 2**63).
    """

    draws: np.ndarray
    seeds: np.ndarray


def draw(rng: np.random.Generator, rows: int, count: int) -> Chance:
    """`count` uniform numbers and a seed for each of `rows` rows.

    The uniform numbers come first: they are what they were before there were seeds.
    """
    return Chance(rng.random((rows, count)), rng.integers(2**63, size=rows))


def generator(seed: int, use: int) -> np.random.Generator:
    """The random numbers of the row with this seed, for one use."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, use], np.uint64)))
