"""Compactors: 1x1 convolutions that begin as the identity and learn which channels can be removed.

    y = Q bn(conv(x))

Convolution, batch norm and compactor are linear in evaluation mode, so that they can be merged into one
convolution with as many outputs as Q has rows that are not zero (`surgery.shrink`). In training they differ:
the optimizer drives rows of Q to zero (`optim.scale_by_resrep`).

Source: ResRep (arXiv 2007.03260), section 3.2.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype


class Compactor(nnx.Module):
    """x Q over the channels, the last axis: (..., channels) -> (..., channels).

    Attributes:
      kernel: (in, out) = (channels, channels), the identity at first. The row of output channel o, in the
        paper's words, is `kernel[:, o]`.

    Args:
      channels: number of channels.
      dtype: computation dtype; by default that of input and kernel.
      param_dtype: dtype of the kernel.
      precision: precision of the product, as in `nnx.Linear`.
    """

    def __init__(
        self, channels: int, *, dtype: Any = None, param_dtype: Any = jnp.float32, precision: Any = None
    ):
        self.kernel: nnx.Param[jax.Array] = nnx.Param(jnp.eye(channels, dtype=param_dtype))
        self.dtype = dtype
        self.precision = precision

    def __call__(self, x: jax.Array) -> jax.Array:
        x, q = promote_dtype((x, self.kernel[...]), dtype=self.dtype)
        return jnp.matmul(x, q, precision=self.precision)


class Compacted(nnx.Module):
    """compactor(layer(x)): takes the place of a batch norm, or of a layer that has none after it.

    Arguments beside the input are passed on to the layer. Layers whose outputs are added have one compactor
    together, held by each of them.
    """

    def __init__(self, layer: nnx.Module, compactor: Compactor):
        self.layer: Any = layer
        self.compactor = compactor

    def __call__(self, x: jax.Array, *args: Any, **options: Any) -> jax.Array:
        return self.compactor(self.layer(x, *args, **options))
