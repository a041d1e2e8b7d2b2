"""RepVGG's training form of any layer: each branch with a batch norm of its own; and what is left in the
place of a batch norm that was folded away.

    y = sum_b bn_b(branch_b(x))

Batch norm in training is not linear, so unlike a CSLA layer this one cannot merge its branches before it has
been trained. Source: RepVGG (arXiv 2101.03697), section 3.2.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from repopt_jax.core.branches import BranchSet
from repopt_jax.nn.blocks import batch_norm
from repopt_jax.nn.csla import (
    Branched,
    PadMode,
    Pads,
    along_channels,
    check_pad_mode,
    one_batch_axis,
    per_axis,
    run_branch,
)


class NormedBranches(Branched):
    """A convolution, or without spatial axes a dense layer, as a sum of branches with a batch norm each.
    `fuse` turns it into one `nnx.Conv` or `nnx.Linear`.

    Attributes:
      branches: the branch set.
      weights: branch name -> w_b, trainable. The identity has none: it is bn(x), at the layer's strides.
      norms: branch name -> its batch norm.

    Args:
      branches: the branch set of one layer; its kernel shape and groups are the layer's.
      strides: one number for all spatial axes or one each.
      padding: pairs for each spatial axis.
      pad_mode: what stands in the padding, as in `CSLAConv`.
      dilation: of the whole window.
      bias: an initial bias (out,), added to the sum, or None.
      dtype: computation dtype; by default that of inputs and parameters.
      precision: of the products, as in `nnx.Conv`.
      param_dtype: of the weights and the bias.
      rngs: source of the draws (stream `params`), each w_b as its branch's own layer would be drawn.

    Raises:
      ValueError: a branch set in another layout than "...io" or of stacked layers, an unknown `pad_mode`, or
        strides, dilation or padding that do not fit.
    """

    def __init__(
        self,
        branches: BranchSet,
        *,
        strides: int | Sequence[int] = 1,
        padding: Pads = (),
        pad_mode: PadMode = "constant",
        dilation: int | Sequence[int] = 1,
        bias: jax.Array | None = None,
        dtype: Any = None,
        precision: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if branches.layout != "...io" or branches.stacked:
            raise ValueError(
                f"`branches` has layout {branches.layout!r} and {branches.stacked} stacked axes: it must be "
                "of one layer, in '...io'"
            )
        axes = len(branches.kernel) - 2
        self.branches = branches
        self.strides = per_axis(strides, axes)
        self.dilation = per_axis(dilation, axes)
        self.padding: Pads = tuple((int(lo), int(hi)) for lo, hi in padding)
        if len(self.padding) != axes:
            raise ValueError(f"`padding` is {padding}: it needs a pair for each of the {axes} spatial axes")
        check_pad_mode(pad_mode, self.padding)
        self.pad_mode: PadMode = pad_mode
        self.dtype, self.precision = dtype, precision
        drawn = branches.sample(rngs.params(), dtype=param_dtype)
        self.weights = nnx.Dict({b.name: nnx.Param(drawn[b.name]) for b in branches.branches if b.has_scale})
        self.norms = nnx.Dict(
            {name: batch_norm(branches.out, dtype=dtype, rngs=rngs) for name in branches.names}
        )
        self.bias = nnx.data(None if bias is None else nnx.Param(jnp.asarray(bias, param_dtype)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(*batch, *spatial, in) -> (*batch, *spatial', out), any number of batch axes, none too."""
        x, batch = one_batch_axis(x, len(self.padding))
        outputs = []
        for b in self.branches.branches:
            w = self.weights[b.name][...] if b.has_scale else jnp.ones((self.branches.out,), x.dtype)
            xb, w = promote_dtype((x, w), dtype=self.dtype)
            outputs.append(self.norms[b.name](run_branch(b, xb, w, self)))
        y = sum(outputs[1:], start=outputs[0])
        y = y.reshape(*batch, *y.shape[1:])
        return y if self.bias is None else y + along_channels(self.bias[...], y)


class PassThrough(nnx.Module):
    """Gives back its first argument: what stands where a batch norm was, after `fuse` has folded it into the
    layer before it."""

    def __call__(self, x: jax.Array, *args: Any, **options: Any) -> jax.Array:
        return x
