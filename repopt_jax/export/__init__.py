"""Networks as files that run elsewhere, and running them here."""

from repopt_jax import extras

extras.require("flax", by=__name__)

from repopt_jax.export.metadata import Metadata
from repopt_jax.export.onnx import compare_fused, onnx_model, to_onnx
from repopt_jax.export.runtime import FileNetwork, open_file, open_onnx
from repopt_jax.export.stablehlo import read_stablehlo, to_stablehlo

__all__ = [
    "FileNetwork",
    "Metadata",
    "compare_fused",
    "onnx_model",
    "open_file",
    "open_onnx",
    "read_stablehlo",
    "to_onnx",
    "to_stablehlo",
]
