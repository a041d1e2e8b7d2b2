"""Calibration: the range of each layer's input, from images that the network in floating point sees.

The inputs of a layer are counted in a histogram of their absolute values, whose size does not depend on how
many images there are. A threshold T is chosen on it, and the range is what lies within it:

    least = max(min x, -T)        largest = min(max x, T)

| method | T | source |
|---|---|---|
| abs-max | the largest absolute value | arXiv 2004.09602, section 3.4 |
| percentile | the absolute value that a share of all values does not exceed | the same |
| entropy | least divergence of the clipped histogram from its quantized form | TensorRT, below |
| mse | least squared error of the quantized values | arXiv 1810.05723, section 3 |

TensorRT's method: S. Migacz, "8-bit Inference with TensorRT", GTC 2017.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from repopt_jax.arguments import check_count, check_items, check_kind
from repopt_jax.core import paths
from repopt_jax.quantize.layers import Range, find_quantizable, run_with_inputs
from repopt_jax.surgery.modules import check_model

Method = Literal["abs-max", "percentile", "entropy", "mse"]

BINS = 4096
# Histograms reach to a power of two, this at least, so that the width of a bin is a normal number.
LEAST_EXPONENT = -80
PERCENTILE = 99.99
CANDIDATES = 256  # thresholds that `entropy` and `mse` try
SMOOTHING = 1e-4  # share of a uniform distribution in both distributions of `entropy`


@dataclasses.dataclass(frozen=True, eq=False)
class Histogram:
    """The inputs of a layer.

    Attributes:
      low, high: the least and the largest.
      exponent: the bins divide [0, 2^exponent), which holds all absolute values and is no larger than needed.
      counts: (BINS,) int64, how many absolute values are in each bin.
      square_sum: the sum of their squares.
    """

    low: float
    high: float
    exponent: int
    counts: np.ndarray
    square_sum: float

    @property
    def largest(self) -> float:
        """The largest absolute value."""
        return max(-self.low, self.high)

    @property
    def count(self) -> int:
        """How many values there are."""
        return int(self.counts.sum())

    @property
    def mean_square(self) -> float:
        """The mean of their squares."""
        return self.square_sum / max(self.count, 1)

    @property
    def width(self) -> float:
        """The width of a bin."""
        return math.ldexp(1 / BINS, self.exponent)

    def clipped(self, threshold: float) -> Range:
        """Returns the range of the values within `threshold`, widened to hold zero."""
        return min(max(self.low, -threshold), 0.0), max(min(self.high, threshold), 0.0)

    def __add__(self, other: "Histogram") -> "Histogram":
        exponent = max(self.exponent, other.exponent)
        return Histogram(
            min(self.low, other.low),
            max(self.high, other.high),
            exponent,
            _coarser(self.counts, exponent - self.exponent)
            + _coarser(other.counts, exponent - other.exponent),
            self.square_sum + other.square_sum,
        )


def calibrate(model: nnx.Module, images: Any, *, batch_size: int = 64) -> dict[str, Histogram]:
    """Returns the histogram of the inputs of every convolution and dense layer, by the path of the layer.

    Args:
      model: in floating point, fused, in evaluation mode.
      images: as the network sees them, after mean and std: (count, *shape of one), or an iterable of such
        batches, of which one at a time is held. The inputs of a layer that is used in several places are
        counted together.
      batch_size: how many images of an array are run at a time.

    Raises:
      ValueError: as `find_quantizable`; no images, images of another shape than the network's or than the
        first, layers that no image reaches, or inputs that are not finite, with all of their layers;
        `batch_size` below 1.
      TypeError: images that are whole numbers, as before the preprocessing.
    """
    check_model(model)
    layers = find_quantizable(model)
    graphdef, state = nnx.split(model)

    @jax.jit
    def count(state: Any, batch: jax.Array) -> dict[str, Any]:
        _, inputs = run_with_inputs(nnx.merge(graphdef, state, copy=True), batch)
        return {path: _counted(arrays) for path, arrays in inputs.items()}

    total: dict[str, Histogram] = {}
    for batch in batches_of(model, images, batch_size=batch_size):
        found = {path: _histogram(*parts) for path, parts in jax.device_get(count(state, batch)).items()}
        if bad := [path for path, one in found.items() if not math.isfinite(one.square_sum)]:
            raise ValueError(f"inputs of {paths.listed(bad, 8)} are not finite, or overflow when squared")
        total = {path: total[path] + one if path in total else one for path, one in found.items()}
    if missing := [path for path in layers if path not in total]:
        raise ValueError(
            f"no image reaches {paths.listed(missing, 8)}, so that nothing is known of their inputs"
        )
    return {path: total[path] for path in layers}


def find_ranges(
    histograms: Mapping[str, Histogram],
    method: Method = "percentile",
    *,
    levels: int = 255,
    percentile: float = PERCENTILE,
) -> dict[str, Range]:
    """Returns the range (least, largest) of each histogram; see the module's table of methods.

    Args:
      histograms: path -> histogram, as `calibrate` returns them.
      method: of the table.
      levels: the largest whole number of the quantized input, 2^bits - 1.
      percentile: of the method of this name, of all absolute values.

    Raises:
      ValueError: as `check_method`.
    """
    check_kind("histograms", histograms, Mapping, "a mapping such as `calibrate` returns")
    check_method(method, percentile)
    threshold = {
        "abs-max": lambda one: one.largest,
        "percentile": functools.partial(percentile_threshold, percentile=percentile),
        "entropy": functools.partial(entropy_threshold, levels=levels),
        "mse": functools.partial(mse_threshold, levels=levels),
    }[method]
    return {path: one.clipped(threshold(one)) for path, one in histograms.items()}


def check_method(method: str, percentile: float = PERCENTILE) -> None:
    """Raises ValueError for an unknown method, a percentile outside of (0, 100], and one other than the
    default for a method that has none."""
    methods = get_args(Method)
    problems = (
        (method in methods, f"`calibration` is {method!r}: it must be one of {', '.join(methods)}"),
        (0 < percentile <= 100, f"`percentile` is {percentile}: it must be above 0 and at most 100"),
        (
            percentile == PERCENTILE or method == "percentile" or method not in methods,
            f"`percentile` is {percentile}, and `calibration` {method!r} has none: leave one of the two out",
        ),
    )
    if wrong := [message for holds, message in problems if not holds]:
        raise ValueError("; ".join(wrong))


def is_calibrated(images: Any) -> bool:
    """Whether `images` are histograms that `calibrate` returned."""
    return isinstance(images, Mapping) and all(isinstance(one, Histogram) for one in images.values())


def check_histograms(histograms: Any, layers: Iterable[str]) -> None:
    """Checks that `histograms` are those of a network with these layers.

    Raises:
      TypeError: they are no mapping of histograms.
      ValueError: layers are not among them, all of them.
    """
    check_kind("histograms", histograms, Mapping, "a mapping such as `calibrate` returns")
    for one in histograms.values():
        check_kind("histograms", one, Histogram, "a mapping of `Histogram`s, such as `calibrate` returns")
    if missing := [path for path in layers if path not in histograms]:
        raise ValueError(f"the histograms lack {paths.listed(missing, 8)}: they are of another network")


def percentile_threshold(histogram: Histogram, *, percentile: float = PERCENTILE) -> float:
    """Returns the upper edge of the first bin up to which there are `percentile` % of all values."""
    wanted = histogram.count * percentile / 100 * (1 - 1e-12)  # a whole number stays one
    reached = np.cumsum(histogram.counts) >= wanted
    return min((int(reached.argmax()) + 1) * histogram.width, histogram.largest)


def mse_threshold(histogram: Histogram, *, levels: int) -> float:
    """Returns the T at which sum (Q_T(x) - x)^2 is least, of `CANDIDATES` equal steps up to the largest.

    A bin stands for values at its centre, the first for zero. The scale is that of `Histogram.clipped(T)`.
    """
    values, counts = _values(histogram)
    best, least = histogram.largest, math.inf
    for step in range(CANDIDATES, 0, -1):
        threshold = histogram.largest * step / CANDIDATES
        low, high = histogram.clipped(threshold)
        if not (scale := (high - low) / levels):
            break
        rounded = np.minimum(np.round(values / scale) * scale, threshold)
        error = float(counts @ (rounded - values) ** 2)
        if error < least:
            best, least = threshold, error
    return best


def entropy_threshold(histogram: Histogram, *, levels: int) -> float:
    """Returns the T at which KL(P || Q) is least, of at most about `CANDIDATES` edges of bins.

    P is the histogram up to T with all that is above it in its last bin. Q is the same without that, joined
    to as many groups as there are whole numbers up to T, each spread evenly over its bins that are not empty.
    The first bin counts what the second does, as in NVIDIA's tools: after a ReLU most values are zero, which
    is exact at every T. Both are smoothed, as an empty last bin would make the divergence infinite.
    """
    counts = histogram.counts.astype(np.float64)
    counts[0] = counts[1]
    used = int(np.flatnonzero(histogram.counts)[-1]) + 1 if histogram.count else 0
    low, high = histogram.clipped(histogram.largest)
    groups = levels if not low or not high else levels // 2
    best, least = histogram.largest, math.inf
    stride = max(1, (used - groups) // CANDIDATES)
    for bins in range(used, groups - 1, -stride):
        divergence = _divergence(counts, bins, groups)
        if divergence < least:
            best, least = min(bins * histogram.width, histogram.largest), divergence
    return best


def _divergence(counts: np.ndarray, bins: int, groups: int) -> float:
    """KL(P || Q) where the first `bins` bins are kept and joined to so many groups."""
    kept, p = counts[:bins], counts[:bins].copy()
    p[-1] += counts[bins:].sum()
    group = np.arange(bins) * groups // bins
    filled = kept > 0
    share = np.bincount(group, kept) / np.maximum(np.bincount(group, filled), 1)
    q = np.where(filled, share[group], 0.0)
    if not q.sum():
        return math.inf
    p, q = ((1 - SMOOTHING) * v / v.sum() + SMOOTHING / bins for v in (p, q))
    return float((p * np.log(p / q)).sum())


def batches_of(model: nnx.Module, images: Any, *, batch_size: int = 64) -> Iterator[jax.Array]:
    """Yields the batches of an array or an iterable of arrays, checked as `calibrate` says."""
    check_count("batch_size", batch_size)
    shape, graphdef, state = None, *nnx.split(model)
    for batch in _in_batches(images, batch_size):
        if not jnp.issubdtype(batch.dtype, jnp.floating):
            raise TypeError(
                f"the images are of dtype {batch.dtype}: give what the network sees, after mean and std"
            )
        if shape is None:
            try:
                jax.eval_shape(lambda state, x: nnx.merge(graphdef, state, copy=True)(x), state, batch)
            except (TypeError, ValueError, AssertionError) as error:
                raise ValueError(
                    f"the network does not take images of shape {batch.shape}: {str(error).splitlines()[0]}"
                ) from error
        elif batch.shape[1:] != shape:
            raise ValueError(f"images of shape {batch.shape[1:]} follow images of shape {shape}")
        shape = batch.shape[1:]
        yield jnp.asarray(batch)
    if shape is None:
        raise ValueError("there are no images: ranges cannot be found without any")


def _in_batches(images: Any, batch_size: int) -> Iterable[Any]:
    if not hasattr(images, "shape"):
        check_items("images", images, "an array, or batches of them")
        return (batch for batch in images if len(batch))
    return (images[i : i + batch_size] for i in range(0, len(images), batch_size))


def _counted(arrays: list[jax.Array]) -> tuple[jax.Array, ...]:
    """The parts of a `Histogram` of the values of all arrays, traced."""
    x = jnp.concatenate([jnp.ravel(array) for array in arrays])
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    size = jnp.abs(x)
    exponent = jnp.maximum(jnp.frexp(size.max())[1], LEAST_EXPONENT)
    position = jnp.floor(jnp.ldexp(size, math.frexp(BINS)[1] - 1 - exponent))
    position = jnp.clip(position, 0, BINS - 1).astype(jnp.int32)
    counts = jnp.zeros(BINS, jnp.int32).at[position].add(1)
    return x.min(), x.max(), exponent, counts, (x * x).sum()


def _histogram(low: Any, high: Any, exponent: Any, counts: Any, square_sum: Any) -> Histogram:
    return Histogram(float(low), float(high), int(exponent), counts.astype(np.int64), float(square_sum))


def _coarser(counts: np.ndarray, doublings: int) -> np.ndarray:
    """Counts in bins of 2^doublings times the width."""
    joined = 1 << min(doublings, int(math.log2(BINS)))
    short = counts.reshape(-1, joined).sum(1)
    return np.concatenate([short, np.zeros(BINS - len(short), counts.dtype)])


def _values(histogram: Histogram) -> tuple[np.ndarray, np.ndarray]:
    """The values that the bins stand for, and how many there are of each; empty bins are left out."""
    some = np.flatnonzero(histogram.counts)
    values = np.where(some > 0, some + 0.5, 0.0) * histogram.width
    return values, histogram.counts[some].astype(np.float64)
