"""Quantization of fused plain networks."""

from repopt_jax.quantize.affine import fake_quantize, quantize_array

__all__ = ["fake_quantize", "quantize_array"]
