"""Quantization of fused plain networks."""

from repopt_jax.quantize.affine import fake_quantize, quantize_array
from repopt_jax.quantize.calibrate import Histogram, calibrate, find_ranges
from repopt_jax.quantize.layers import (
    Observed,
    Quantizer,
    Scheme,
    find_quantizable,
    quantizers,
    run_with_inputs,
    with_quantizers,
)
from repopt_jax.quantize.post import quantize

__all__ = [
    "Histogram",
    "Observed",
    "Quantizer",
    "Scheme",
    "calibrate",
    "fake_quantize",
    "find_quantizable",
    "find_ranges",
    "quantize",
    "quantize_array",
    "quantizers",
    "run_with_inputs",
    "with_quantizers",
]
