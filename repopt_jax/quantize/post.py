"""Post-training quantization: a fused network and some images -> the quantized network."""

from collections.abc import Iterable, Mapping
from typing import Any

from flax import nnx

from repopt_jax.quantize.calibrate import (
    PERCENTILE,
    Histogram,
    Method,
    calibrate,
    check_method,
    find_ranges,
)
from repopt_jax.quantize.layers import (
    Per,
    Scheme,
    WeightRange,
    check_paths,
    find_quantizable,
    with_quantizers,
)


def quantize(
    model: nnx.Module,
    images: Any,
    *,
    bits: int = 8,
    weight_bits: int | None = None,
    per: Per = "channel",
    calibration: Method = "percentile",
    percentile: float = PERCENTILE,
    weight_range: WeightRange = "reduced",
    keep_float: Iterable[str] = (),
    batch_size: int = 64,
) -> nnx.Module:
    """Returns the network with quantized layers; `model` itself is unchanged.

        quantized = quantize(fuse(model), images)
        quantized = quantize(fuse(model), images, bits=4, keep_float=["stages/0/0/conv", "head"])

    Input and kernel of every convolution and dense layer are rounded (`quantize.layers`); everything is still
    computed in floating point, with the numbers that integer arithmetic would give.

    Args:
      model: fused, in evaluation mode.
      images: as in `calibrate`; or the histograms that it returned, for several quantizations of a network.
      bits, weight_bits, per, weight_range: as in `Scheme`.
      calibration, percentile: how ranges of inputs are found, see `quantize.calibrate`. The percentile is
        that of absolute values; TensorRT's tools offer 99.9 to 99.999.
      keep_float: paths of layers that stay in floating point, such as `Sensitivity.worst(2)`.
      batch_size: how many images are run at a time.

    Raises:
      ValueError: as `Scheme`, `find_quantizable`, `calibrate` and `find_ranges`; paths in `keep_float` that
        are no layers, all of them, or that leave no layer to quantize.
      TypeError: as `calibrate`.
    """
    scheme = Scheme(bits, weight_bits, per, weight_range)
    check_method(calibration, percentile)
    layers, kept = find_quantizable(model), list(keep_float)
    check_paths(model, kept, "keep_float", layers)
    if len(set(kept)) == len(layers):
        raise ValueError("`keep_float` names all layers, so that there is none to quantize")
    histograms = images if is_calibrated(images) else calibrate(model, images, batch_size=batch_size)
    if missing := [path for path in layers if path not in histograms]:
        raise ValueError(f"the histograms lack {', '.join(missing)}: they are of another network")
    ranges = find_ranges(histograms, calibration, levels=scheme.levels, percentile=percentile)
    return with_quantizers(model, scheme, {path: ranges[path] for path in layers if path not in kept})


def is_calibrated(images: Any) -> bool:
    """Whether `images` are histograms that `calibrate` returned."""
    return isinstance(images, Mapping) and all(isinstance(one, Histogram) for one in images.values())
