"""What PyTorch code bases call the arrays of our networks: one small table for each."""

from repopt_jax.interop.names.known import COUNTER as COUNTER
from repopt_jax.interop.names.known import SCHEMES as SCHEMES
from repopt_jax.interop.names.known import Recognised as Recognised
from repopt_jax.interop.names.known import arrays_of as arrays_of
from repopt_jax.interop.names.known import counters as counters
from repopt_jax.interop.names.known import find_scheme as find_scheme
from repopt_jax.interop.names.known import own_scheme as own_scheme
from repopt_jax.interop.names.known import recognise as recognise
from repopt_jax.interop.names.known import torch_names as torch_names
from repopt_jax.interop.names.scheme import Layout as Layout
from repopt_jax.interop.names.scheme import Scheme as Scheme
from repopt_jax.interop.names.scheme import TorchName as TorchName
