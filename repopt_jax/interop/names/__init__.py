"""The names of our networks' arrays in PyTorch code bases: one small table for each."""

from repopt_jax.interop.names.blocks import BLOCK_NAMES as BLOCK_NAMES
from repopt_jax.interop.names.blocks import block_rows as block_rows
from repopt_jax.interop.names.blocks import block_scheme as block_scheme
from repopt_jax.interop.names.lookup import COUNTER as COUNTER
from repopt_jax.interop.names.lookup import SCHEMES as SCHEMES
from repopt_jax.interop.names.lookup import Recognised as Recognised
from repopt_jax.interop.names.lookup import arrays_of as arrays_of
from repopt_jax.interop.names.lookup import authors_scheme as authors_scheme
from repopt_jax.interop.names.lookup import counters as counters
from repopt_jax.interop.names.lookup import find_scheme as find_scheme
from repopt_jax.interop.names.lookup import recognise as recognise
from repopt_jax.interop.names.lookup import torch_names as torch_names
from repopt_jax.interop.names.lookup import torch_tensors as torch_tensors
from repopt_jax.interop.names.scheme import BIASED as BIASED
from repopt_jax.interop.names.scheme import NETWORKS as NETWORKS
from repopt_jax.interop.names.scheme import NORM as NORM
from repopt_jax.interop.names.scheme import TENSOR as TENSOR
from repopt_jax.interop.names.scheme import Layout as Layout
from repopt_jax.interop.names.scheme import Scheme as Scheme
from repopt_jax.interop.names.scheme import Stored as Stored
from repopt_jax.interop.names.scheme import TorchName as TorchName
