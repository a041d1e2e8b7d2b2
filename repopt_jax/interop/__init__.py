"""PyTorch and safetensors files, without PyTorch: tensors by name, weights of our networks, and scales."""

from repopt_jax import extras

extras.require("flax", "safetensors", by=__name__)

from repopt_jax.interop.files import read_tensors, write_safetensors, write_torch
from repopt_jax.interop.names import SCHEMES, Layout, Scheme, block_scheme, recognise
from repopt_jax.interop.networks import load_converted
from repopt_jax.interop.scales import load_torch_scales
from repopt_jax.interop.weights import from_torch, load_torch, save_torch, to_torch

__all__ = [
    "SCHEMES",
    "Layout",
    "Scheme",
    "block_scheme",
    "from_torch",
    "load_converted",
    "load_torch",
    "load_torch_scales",
    "read_tensors",
    "recognise",
    "save_torch",
    "to_torch",
    "write_safetensors",
    "write_torch",
]
