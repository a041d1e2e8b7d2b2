"""PyTorch and safetensors files, without PyTorch: tensors by name, weights of our networks, and scales."""

from repopt_jax.interop.files import read_tensors as read_tensors
from repopt_jax.interop.files import write_safetensors as write_safetensors
from repopt_jax.interop.files import write_torch as write_torch
from repopt_jax.interop.names import SCHEMES as SCHEMES
from repopt_jax.interop.names import Layout as Layout
from repopt_jax.interop.names import Scheme as Scheme
from repopt_jax.interop.names import block_scheme as block_scheme
from repopt_jax.interop.names import recognise as recognise
from repopt_jax.interop.networks import load_converted as load_converted
from repopt_jax.interop.scales import load_torch_scales as load_torch_scales
from repopt_jax.interop.weights import from_torch as from_torch
from repopt_jax.interop.weights import load_torch as load_torch
from repopt_jax.interop.weights import save_torch as save_torch
from repopt_jax.interop.weights import to_torch as to_torch
