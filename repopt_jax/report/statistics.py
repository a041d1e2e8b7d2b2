"""What few seeds show: means, spreads, and paired differences with their intervals."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

# Differences that are nearer than this are equal: accuracies are whole numbers of images, whose differences
# cannot be so near otherwise, and they are rounded at the sixteenth digit.
EQUAL = 1e-9


@dataclass(frozen=True)
class Difference:
    """How much better one way of training is than another, seed by seed.

    Runs of one seed see the same images in the same order, so that the spread of their differences is
    smaller than that of the runs.

    Attributes:
      way, than: the names of the two.
      by_seed: seed -> difference, in the unit of the metric, for the seeds that both have.
      mean: over the seeds.
      low, high: the 95 % interval of the mean, mean +- t * sd / sqrt(n) with the quantile t of Student's
        distribution with n - 1 degrees of freedom; None with one seed, which says nothing of the spread.
    """

    way: str
    than: str
    by_seed: Mapping[int, float]
    mean: float
    low: float | None
    high: float | None

    @property
    def equal(self) -> bool:
        """Whether all of several seeds have the same difference, as few seeds on few images may."""
        values = self.by_seed.values()
        return len(values) > 1 and max(values) - min(values) < EQUAL

    @property
    def shown(self) -> bool:
        """Whether the interval leaves out zero: the order of the two is then unlikely to be chance.

        Equal differences have no spread to judge by, and show nothing.
        """
        if self.low is None or self.high is None or self.equal:
            return False
        return self.low > 0 or self.high < 0


def difference(way: str, than: str, first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """`first` minus `second`, each seed -> value, over the seeds that both have.

    Raises:
      ValueError: they have no seed in common.
    """
    from scipy.stats import t as student_t

    by_seed = {seed: first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())}
    if not by_seed:
        raise ValueError(f"{way} and {than} have no seed in common")
    mean, count = statistics.fmean(by_seed.values()), len(by_seed)
    if count == 1:
        return Difference(way, than, by_seed, mean, None, None)
    quantile = float(student_t.ppf(0.975, count - 1))
    half = quantile * statistics.stdev(by_seed.values()) / math.sqrt(count)
    return Difference(way, than, by_seed, mean, mean - half, mean + half)


def standard_error(accuracy: float, count: int) -> float:
    """The binomial standard error of an accuracy in [0, 1], with 2 hits and 2 misses added (Agresti, Coull).

    Without these it would be 0 for a network that makes no mistake on a small test set.
    """
    adjusted = (accuracy * count + 2) / (count + 4)
    return math.sqrt(adjusted * (1 - adjusted) / (count + 4))
