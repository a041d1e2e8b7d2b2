"""Which layers lose most: the output's signal-to-noise ratio with one layer quantized at a time.

    ratio in dB = -10 log10(mean over the outputs of sum (y' - y)^2 / sum y^2)

y is the output in floating point and y' with quantization. A validation for each layer would say the same at
many times the cost: the outputs on the calibration images are enough (arXiv 2004.09602, section 4.2, ranks by
accuracy; YOLOv6 by such a ratio).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from repopt_jax.arguments import check_kind
from repopt_jax.core.paths import natural_order
from repopt_jax.quantize.calibration import (
    PERCENTILE,
    Histogram,
    Method,
    batches_of,
    calibrate,
    check_histograms,
    find_ranges,
)
from repopt_jax.quantize.layers import (
    Per,
    Scheme,
    WeightRange,
    find_quantizable,
    quantized_input,
    quantized_kernel,
    run_with_inputs,
    with_functions,
)
from repopt_jax.surgery.modules import check_model


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What quantizing each layer does to the output, in dB; infinite where it changes nothing.

    Attributes:
      layers: path -> ratio with this layer alone quantized, the worst first.
      whole: ratio with all layers quantized.
    """

    layers: Mapping[str, float]
    whole: float

    def worst(self, count: int) -> list[str]:
        """The paths of the `count` layers with the least ratios."""
        return list(self.layers)[:count]


def sensitivity(
    model: nnx.Module,
    images: Any,
    *,
    bits: int = 8,
    weight_bits: int | None = None,
    per: Per = "channel",
    calibration: Method = "percentile",
    percentile: float = PERCENTILE,
    weight_range: WeightRange = "reduced",
    scale_bits: int | None = None,
    histograms: Mapping[str, Histogram] | None = None,
    batch_size: int = 64,
) -> Sensitivity:
    """Returns the output's signal-to-noise ratio with each layer alone quantized.

    One program is compiled, which is told which layers to quantize; it runs once for each layer and batch.

    Args:
      model, images: as in `quantize`; an iterable of batches is kept.
      bits, weight_bits, per, calibration, percentile, weight_range, scale_bits, batch_size: as in
        `quantize`.
      histograms: what `calibrate` returned for the model, if it is there already.

    Raises:
      ValueError, TypeError: as `quantize`.
    """
    scheme = Scheme(bits, weight_bits, per, weight_range, scale_bits)
    layers = list(find_quantizable(model))
    if histograms is not None:
        check_histograms(histograms, layers)
    batches = list(batches_of(model, images, batch_size=batch_size))
    if histograms is None:
        histograms = calibrate(model, batches)
    ranges = find_ranges(histograms, calibration, levels=scheme.levels, percentile=percentile)
    graphdef, state = nnx.split(model)

    @jax.jit
    def outputs(state: Any, chosen: jax.Array, batch: jax.Array) -> Any:
        whole = nnx.merge(graphdef, state, copy=True)
        return with_functions(whole, _chosen(layers, ranges, scheme, chosen))(batch)  # pyright: ignore

    runs = np.concatenate([np.eye(len(layers), dtype=bool), np.ones((1, len(layers)), bool)])
    noise = [Noise() for _ in runs]
    for batch in batches:
        exact = jax.device_get(outputs(state, np.zeros(len(layers), bool), batch))
        for one, chosen in zip(noise, runs):
            one.add(exact, jax.device_get(outputs(state, chosen, batch)))
    found = sorted(zip(layers, noise), key=lambda item: item[1].decibel)
    return Sensitivity({path: one.decibel for path, one in found}, noise[-1].decibel)


def _chosen(
    layers: list[str], ranges: Mapping[str, Any], scheme: Scheme, chosen: jax.Array
) -> Callable[[str, Any], Any]:
    """Functions of layers that quantize where `chosen`, (layers,) bool, is true."""

    def make(path: str, function: Any) -> Any:
        index = layers.index(path)

        def run(lhs: jax.Array, rhs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
            inputs = jnp.asarray(ranges[path], jnp.promote_types(lhs.dtype, jnp.float32))
            lhs = jnp.where(chosen[index], quantized_input(lhs, inputs, scheme), lhs)
            rhs = jnp.where(chosen[index], quantized_kernel(rhs, scheme), rhs)
            return function(lhs, rhs, *args, **kwargs)

        return run

    return make


def output_noise(
    model: Callable[..., Any], quantized: Callable[..., Any], images: Any, *, batch_size: int = 64
) -> float:
    """Returns the signal-to-noise ratio in dB of the output of `quantized`, whose signal is that of `model`.

    Images are (count, *shape of one) or an iterable of batches, as in `calibrate`.
    """
    check_kind("model", model, Callable, "a network")
    check_kind("quantized", quantized, Callable, "a network")
    run = nnx.jit(lambda model, batch: model(batch))
    noise = Noise()
    for batch in batches_of(model, images, batch_size=batch_size):  # pyright: ignore[reportArgumentType]
        noise.add(*jax.device_get((run(model, batch), run(quantized, batch))))
    return noise.decibel


def layer_noise(
    model: nnx.Module, quantized: nnx.Module, images: Any, *, batch_size: int = 64
) -> tuple[float, dict[str, float]]:
    """Returns `output_noise`, and the ratio in dB of the input of every layer of `quantized`, by path.

    The latter is what the layers before it have added: the noise as it travels through the network. An input
    is taken before it is rounded. Arguments are those of `output_noise`.
    """
    check_model(model)
    check_kind("quantized", quantized, nnx.Module, "an NNX model")
    run = nnx.jit(run_with_inputs)
    output, layers = Noise(), {}
    for batch in batches_of(model, images, batch_size=batch_size):
        (y, inputs), (other, others) = jax.device_get((run(model, batch), run(quantized, batch)))
        output.add(y, other)
        for path in inputs:
            layers.setdefault(path, Noise()).add(inputs[path], others[path])
    return output.decibel, {path: layers[path].decibel for path in sorted(layers, key=natural_order)}


class Noise:
    """Sums of squares of a signal and of what differs from it, for each output."""

    def __init__(self):
        self.sums: list[list[float]] = []  # (noise, signal) of each output

    def add(self, exact: Any, changed: Any) -> None:
        """Adds the outputs for a batch, trees of arrays."""
        pairs = list(zip(jax.tree.leaves(exact), jax.tree.leaves(changed)))
        self.sums = self.sums or [[0.0, 0.0] for _ in pairs]
        for sums, (y, other) in zip(self.sums, pairs):
            y, other = np.asarray(y, np.float64), np.asarray(other, np.float64)
            sums[0] += float(np.square(other - y).sum())
            sums[1] += float(np.square(y).sum())

    @property
    def decibel(self) -> float:
        """The ratio in dB; infinite where nothing differs."""
        ratios = [noise / signal if signal else math.inf * noise for noise, signal in self.sums if noise]
        return decibel(sum(ratios) / len(self.sums)) if ratios else math.inf


def decibel(noise_to_signal: float) -> float:
    """-10 log10 of a ratio of noise to signal."""
    return -10 * math.log10(noise_to_signal) if noise_to_signal else math.inf
