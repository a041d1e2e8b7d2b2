"""Whether post-training quantization will be fine, before it is done: from kernels and ranges alone.

Rounding to steps of width d adds noise of variance d^2 / 12 where values are spread over many steps, and none
to zeros, which are exact. In a layer y = sum_k K_k x_k of n products, noise of the kernel and of the input
add

    n E[x^2] d_K^2 / 12        sum_k K_k^2 * p d_x^2 / 12        p: share of inputs that are not zero

to a signal of n E[K^2] E[x^2], if inputs are uncorrelated. Noise over signal is therefore

    kernel:  mean over the channels of (max|K_c| / q)^2 / (12 E[K^2])      that is (max / rms)^2 / (12 q^2)
    input:   p (range / levels)^2 / (12 E[x^2])

and that of the network the sum over its layers, if what follows a layer passes on noise as it does signal.
It needs no image where only kernels are asked for: what grows it is a kernel with heavy tails.
Source of the noise's variance: B. Widrow, "Statistical analysis of amplitude-quantized sampled-data systems",
AIEE 1961.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from flax import nnx

from repopt_jax.quantize.calibration import (
    PERCENTILE,
    Histogram,
    Method,
    check_histograms,
    find_ranges,
)
from repopt_jax.quantize.layers import (
    Per,
    Scheme,
    WeightRange,
    find_quantizable,
    input_scale,
    layer_kernel_scale,
)
from repopt_jax.quantize.sensitivity import decibel


@dataclasses.dataclass(frozen=True)
class ExpectedLayer:
    """What is expected of a layer.

    Attributes:
      kernel_noise, input_noise: noise over signal; the second is 0 where no inputs are known.
      tail: max|K| / rms of the kernel; 1 to 7 in networks that plain SGD has trained, and above 20 a sign of
        heavy tails.
    """

    kernel_noise: float
    input_noise: float
    tail: float

    @property
    def decibel(self) -> float:
        """The signal-to-noise ratio of the layer's output in dB."""
        return decibel(self.kernel_noise + self.input_noise)


@dataclasses.dataclass(frozen=True)
class Expected:
    """What is expected of a network.

    Attributes:
      layers: path -> what is expected of the layer, in the order of their paths.
    """

    layers: Mapping[str, ExpectedLayer]

    @property
    def decibel(self) -> float:
        """The signal-to-noise ratio of the network's output in dB."""
        return decibel(sum(one.kernel_noise + one.input_noise for one in self.layers.values()))

    @property
    def worst(self) -> str:
        """The path of the layer with the most noise."""
        return min(self.layers, key=lambda path: self.layers[path].decibel)


def expected(
    model: nnx.Module,
    histograms: Mapping[str, Histogram] | None = None,
    *,
    bits: int = 8,
    weight_bits: int | None = None,
    per: Per = "channel",
    calibration: Method = "percentile",
    percentile: float = PERCENTILE,
    weight_range: WeightRange = "reduced",
    scale_bits: int | None = None,
) -> Expected:
    """Returns the signal-to-noise ratios to expect of the quantized layers, without quantizing.

        expected(fuse(model)).decibel        # at any time of a training: kernels alone, at once

    It is a first look, for comparing networks, numbers of bits and layers. What training has made responds
    more to its inputs than to noise: trained networks of digits measured 4 to 15 dB more, at 8 to 4 bits,
    per channel and per tensor, in about the same order.

    Args:
      model: fused, in evaluation mode.
      histograms: what `calibrate` returned; None for the kernels' part alone.
      bits, weight_bits, per, calibration, percentile, weight_range, scale_bits: as in `quantize`.

    Raises:
      ValueError: as `Scheme`, `find_quantizable` and `find_ranges`; histograms of another network.
    """
    scheme = Scheme(bits, weight_bits, per, weight_range, scale_bits)
    layers = find_quantizable(model)
    if histograms is not None:
        check_histograms(histograms, layers)
    ranges = find_ranges(histograms or {}, calibration, levels=scheme.levels, percentile=percentile)
    found = {}
    for path, layer in layers.items():
        kernel = layer.kernel[...]
        steps = np.asarray(layer_kernel_scale(layer, scheme), np.float64)
        square = float(np.square(np.asarray(kernel, np.float64)).mean())
        of_kernel = float(np.square(steps).mean()) / (12 * square) if square else 0.0
        of_input = 0.0
        if histograms is not None and (mean_square := histograms[path].mean_square):
            low, high = ranges[path]
            share = 1 - histograms[path].counts[0] / histograms[path].count
            step = float(input_scale(low, high, scheme)[0])
            of_input = float(share * step**2 / (12 * mean_square))
        tail = float(np.abs(np.asarray(kernel)).max()) / square**0.5 if square else 0.0
        found[path] = ExpectedLayer(of_kernel, of_input, tail)
    return Expected(found)
