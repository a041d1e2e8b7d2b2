"""Post-training quantization: a fused network and some images -> the quantized network."""

from collections.abc import Iterable
from typing import Any

from flax import nnx

from repopt_jax.arguments import check_items
from repopt_jax.core import paths
from repopt_jax.quantize.calibration import (
    PERCENTILE,
    Method,
    calibrate,
    check_histograms,
    check_method,
    find_ranges,
    is_calibrated,
)
from repopt_jax.quantize.layers import (
    Per,
    Scheme,
    WeightRange,
    check_paths,
    find_quantizable,
    with_quantizers,
)
from repopt_jax.surgery.modules import named_modules


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
    scale_bits: int | None = None,
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
      bits, weight_bits, per, weight_range, scale_bits: as in `Scheme`.
      calibration, percentile: how ranges of inputs are found, see `quantize.calibration`. The percentile is
        that of absolute values; TensorRT's tools offer 99.9 to 99.999.
      keep_float: paths of layers that stay in floating point, such as `Sensitivity.worst(2)`.
      batch_size: how many images are run at a time.

    Raises:
      ValueError: as `Scheme`, `find_quantizable`, `calibrate` and `find_ranges`; batch norms; paths in
        `keep_float` that are no layers, all of them, or that leave no layer to quantize.
      TypeError: as `calibrate`; `keep_float` that is a single text.
    """
    scheme = Scheme(bits, weight_bits, per, weight_range, scale_bits)
    check_method(calibration, percentile)
    check_items("keep_float", keep_float, "paths of layers")
    layers, kept = find_quantizable(model), list(keep_float)
    norms = [f"{p} ({type(m).__name__})" for p, m in named_modules(model) if isinstance(m, nnx.BatchNorm)]
    if norms:
        raise ValueError(f"{paths.listed(norms, 8)} are batch norms of their own: `fuse(model)` first")
    check_paths(model, kept, "keep_float", layers)
    if len(set(kept)) == len(layers):
        raise ValueError("`keep_float` names all layers, so that there is none to quantize")
    histograms = images if is_calibrated(images) else calibrate(model, images, batch_size=batch_size)
    check_histograms(histograms, layers)
    ranges = find_ranges(histograms, calibration, levels=scheme.levels, percentile=percentile)
    return with_quantizers(model, scheme, {path: ranges[path] for path in layers if path not in kept})
