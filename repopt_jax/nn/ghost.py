"""Ghost modules and bottlenecks, for RepGhostNet and RepOpt-GhostNet.

A ghost module makes its channels with a cheap depthwise convolution instead of a dense one. What its `cheap`
layer is, is the kind of the network: `ConvNorm` with a plain convolution (RepOpt-GhostNet's target) or a
search layer, `RepGhostConv` (RepGhost), or after deploying a plain `nnx.Conv`.
Sources: RepGhost (arXiv 2211.06088), section 3; RepOptimizer (arXiv 2205.15242), appendix D; published code
of both, read for facts.
"""

from typing import Any

import jax
from flax import nnx

from repopt_jax.core.branches import BranchSet, Identity, Kernel
from repopt_jax.nn.blocks import ConvNorm, SqueezeExcite, batch_norm, conv


class GhostBottleneck(nnx.Module):
    """ghost2(se(depthwise(ghost1(x)))) + shortcut(x): (batch, h, w, in) -> (batch, h', w', out).

    Args:
      ghost1: widens; ends in a ReLU.
      ghost2: narrows; linear.
      depthwise: the strided convolution between the two, in bottlenecks that shrink the map.
      se: squeeze-and-excitation on the wide map.
      shortcut: depthwise and 1x1 convolution where width or resolution change, else None: x itself.
    """

    def __init__(
        self,
        ghost1: "GhostModule",
        ghost2: "GhostModule",
        *,
        depthwise: ConvNorm | None = None,
        se: SqueezeExcite | None = None,
        shortcut: tuple[ConvNorm, ConvNorm] | None = None,
    ):
        self.ghost1 = ghost1
        self.depthwise = nnx.data(depthwise)
        self.se = nnx.data(se)
        self.ghost2 = ghost2
        self.shortcut = nnx.List(shortcut or ())

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.ghost1(x)
        if self.depthwise is not None:
            y = self.depthwise(y)
        if self.se is not None:
            y = self.se(y)
        y = self.ghost2(y)
        for layer in self.shortcut:
            x = layer(x)
        return y + x


class GhostModule(nnx.Module):
    """relu(cheap(relu(primary(x)))), or cheap(primary(x)) with `relu` False.

    Args:
      primary: 1x1 convolution and batch norm to the module's width.
      cheap: depthwise 3x3 convolution with its normalisation, width kept.
      relu: whether both end in a ReLU.
    """

    def __init__(
        self, primary: ConvNorm | nnx.Conv, cheap: "ConvNorm | RepGhostConv | nnx.Conv", *, relu: bool
    ):
        self.primary = primary
        self.cheap = cheap
        self.relu = relu

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in (self.primary, self.cheap):
            x = nnx.relu(layer(x)) if self.relu else layer(x)
        return x


class RepGhostConv(nnx.Module):
    """bn(conv(x)) + bn_identity(x), depthwise 3x3: RepGhost's branches, which deploy to one convolution."""

    def __init__(self, channels: int, *, dtype: Any = None, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, 3, groups=channels, dtype=dtype, rngs=rngs)
        self.bn = batch_norm(channels, dtype=dtype, rngs=rngs)
        self.bn_identity = batch_norm(channels, dtype=dtype, rngs=rngs)
        self.branches = ghost_branches(channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.bn(self.conv(x)) + self.bn_identity(x)


def ghost_branches(channels: int) -> BranchSet:
    """Depthwise 3x3 and identity: what a ghost module's cheap kernel is made of. There is no 1x1 branch."""
    return BranchSet((3, 3, 1, channels), (Kernel((3, 3)), Identity()), groups=channels)
