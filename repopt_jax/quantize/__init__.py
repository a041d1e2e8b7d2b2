"""Quantization of fused plain networks."""

from repopt_jax import extras

extras.require("flax", by=__name__)

from repopt_jax.quantize.affine import fake_quantize, quantize_array
from repopt_jax.quantize.calibration import Histogram, calibrate, find_ranges
from repopt_jax.quantize.expected import Expected, expected
from repopt_jax.quantize.images import check_images, image_statistics
from repopt_jax.quantize.layers import (
    EXACT_SCALE_BITS,
    Observed,
    Quantizer,
    Scheme,
    find_quantizable,
    quantizers,
    run_with_inputs,
    with_integer_biases,
    with_quantizers,
    without_quantizers,
)
from repopt_jax.quantize.post import quantize
from repopt_jax.quantize.sensitivity import Sensitivity, layer_noise, output_noise, sensitivity

__all__ = [
    "EXACT_SCALE_BITS",
    "Expected",
    "Histogram",
    "Observed",
    "Quantizer",
    "Scheme",
    "Sensitivity",
    "calibrate",
    "check_images",
    "expected",
    "fake_quantize",
    "find_quantizable",
    "find_ranges",
    "image_statistics",
    "layer_noise",
    "output_noise",
    "quantize",
    "quantize_array",
    "quantizers",
    "run_with_inputs",
    "sensitivity",
    "with_integer_biases",
    "with_quantizers",
    "without_quantizers",
]
