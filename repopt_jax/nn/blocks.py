"""Blocks: plain (a convolution, batch norm, ReLU), RepVGG (three normalised branches), what both deploy to,
and the layers that networks share.

A block's kind is its class; which convolution a plain block holds (`nnx.Conv` or the search layer `CSLAConv`)
is what tells a target network from a search network. Deploying makes another class, `FusedBlock`, not another
mode. Sources: RepVGG (arXiv 2101.03697), RepOptimizer (arXiv 2205.15242); published code of both, MIT
licence, read for facts.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax.core.branches import Branch, BranchSet, Identity, Kernel
from repopt_jax.nn.csla import CSLAConv

# Default initialisation of PyTorch's layers, uniform(-1/sqrt(fan_in), 1/sqrt(fan_in)): all published recipes
# rely on it.
kernel_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def bias_init(fan_in: int) -> Callable[..., jax.Array]:
    """PyTorch's default for biases: uniform(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32, **_: jax.random.uniform(key, shape, dtype, -bound, bound)


def conv(
    inputs: int,
    outputs: int,
    size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    bias: bool = False,
    dtype: Any = None,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A 2-D convolution with odd sides and PyTorch's padding and initialisation."""
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        strides=stride,
        padding=((size // 2, size // 2),) * 2,
        feature_group_count=groups,
        use_bias=bias,
        kernel_init=kernel_init,
        bias_init=bias_init(inputs // groups * size * size),
        dtype=dtype,
        rngs=rngs,
    )


def batch_norm(channels: int, *, dtype: Any = None, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Batch norm with PyTorch's constants (its momentum 0.1 is 0.9 here) and a variance without
    cancellation."""
    return nnx.BatchNorm(
        channels, momentum=0.9, epsilon=1e-5, use_fast_variance=False, dtype=dtype, rngs=rngs
    )


def normed_branches(inputs: int, outputs: int, size: int, groups: int, has_identity: bool) -> BranchSet:
    """The branches of RepVGG and MobileOne: size x size, 1x1, and the identity where there is one.

    They are not always the default ones: depthwise blocks have a 1x1 branch and an identity, the same map
    twice, each with a batch norm of its own.
    """
    branches: list[Branch] = [Kernel((n, n)) for n in sorted({size, 1}, reverse=True)]
    branches += [Identity()] if has_identity else []
    return BranchSet((size, size, inputs // groups, outputs), tuple(branches), groups)


class SqueezeExcite(nnx.Module):
    """Gates channels: x * gate(up(relu(down(mean of x over the map)))). `down` has `hidden` channels.

    The gate is the sigmoid, or with `hard` its piecewise linear form min(max(z + 3, 0), 6) / 6.
    """

    def __init__(self, channels: int, hidden: int, *, hard: bool = False, dtype: Any = None, rngs: nnx.Rngs):
        self.down = conv(channels, hidden, 1, bias=True, dtype=dtype, rngs=rngs)
        self.up = conv(hidden, channels, 1, bias=True, dtype=dtype, rngs=rngs)
        self.hard = hard

    def __call__(self, x: jax.Array) -> jax.Array:
        z = self.up(nnx.relu(self.down(jnp.mean(x, axis=(1, 2), keepdims=True))))
        return x * (nnx.hard_sigmoid(z) if self.hard else nnx.sigmoid(z))


def activate(y: jax.Array, se: SqueezeExcite | None, *, se_first: bool) -> jax.Array:
    """How a block ends: relu(y), with squeeze-and-excitation before the ReLU (`se_first`) or after it."""
    if se is None:
        return nnx.relu(y)
    return nnx.relu(se(y)) if se_first else se(nnx.relu(y))


class ConvNorm(nnx.Module):
    """bn(conv(x)): the linear part of a block. `conv` is an `nnx.Conv`, or `CSLAConv` in a search. Deploys to
    one `nnx.Conv`."""

    def __init__(self, conv: nnx.Conv | CSLAConv, bn: nnx.BatchNorm):
        self.conv = conv
        self.bn = bn

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.bn(self.conv(x))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"relu": nnx.relu, "relu6": nnx.relu6}


def activation_named(name: str) -> Callable[[jax.Array], jax.Array]:
    """The function of `ACTIVATIONS` with this name.

    Raises:
      ValueError: there is none.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"`activation` is {name!r}: it must be one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class Activated(nnx.Module):
    """act(linear(x)): a `ConvNorm`, or what surgery and `fuse` put in its place, and an activation.

    For networks that are always built plain: what `linear` holds (a search layer, RepVGG's branches, the
    folded convolution) is changed on the built network, and this module is the same in all of them. So a
    scale that was searched with ReLU6 is used with ReLU6.

    Args:
      linear: any module from maps to maps.
      activation: a key of `ACTIVATIONS`.

    Raises:
      ValueError: an unknown activation.
    """

    def __init__(self, linear: nnx.Module, activation: str = "relu"):
        activation_named(activation)
        self.linear = linear
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return ACTIVATIONS[self.activation](self.linear(x))


def conv_norm(
    inputs: int, outputs: int, size: int, *, stride: int = 1, dtype: Any = None, rngs: nnx.Rngs
) -> ConvNorm:
    """A plain convolution with odd sides and its batch norm."""
    return ConvNorm(
        conv(inputs, outputs, size, stride=stride, dtype=dtype, rngs=rngs),
        batch_norm(outputs, dtype=dtype, rngs=rngs),
    )


class PlainBlock(nnx.Module):
    """relu(bn(conv(x))): with `nnx.Conv` the block that RepOptimizer trains, with `CSLAConv` the one it
    searches.

    Squeeze-and-excitation, if any, comes after the ReLU, as in RepOptimizer's networks, or with `se_first`
    before it.
    """

    def __init__(
        self,
        conv: nnx.Conv | CSLAConv,
        bn: nnx.BatchNorm,
        se: SqueezeExcite | None = None,
        *,
        se_first: bool = False,
    ):
        self.conv = conv
        self.bn = bn
        self.se = nnx.data(se)
        self.se_first = se_first

    def __call__(self, x: jax.Array) -> jax.Array:
        return activate(self.bn(self.conv(x)), self.se, se_first=self.se_first)


class RepVGGBlock(nnx.Module):
    """relu(bn(conv3x3(x)) + bn(conv1x1(x)) + bn(x)), the last where width and resolution stay.

    Squeeze-and-excitation, if any, comes after the ReLU, as in RepVGGplus, or with `se_first` before it, as
    in RepVGG-D2se.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        stride: int = 1,
        groups: int = 1,
        se: SqueezeExcite | None = None,
        se_first: bool = False,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        self.conv_3x3 = conv(inputs, outputs, 3, stride=stride, groups=groups, dtype=dtype, rngs=rngs)
        self.bn_3x3 = batch_norm(outputs, dtype=dtype, rngs=rngs)
        self.conv_1x1 = conv(inputs, outputs, 1, stride=stride, groups=groups, dtype=dtype, rngs=rngs)
        self.bn_1x1 = batch_norm(outputs, dtype=dtype, rngs=rngs)
        # What the deployed kernel is merged from; it also says whether there is an identity.
        has_identity = stride == 1 and inputs == outputs
        self.branches = normed_branches(inputs, outputs, 3, groups, has_identity)
        self.bn_identity = nnx.data(batch_norm(outputs, dtype=dtype, rngs=rngs) if has_identity else None)
        self.se = nnx.data(se)
        self.se_first = se_first

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.bn_3x3(self.conv_3x3(x)) + self.bn_1x1(self.conv_1x1(x))
        if self.bn_identity is not None:
            y = y + self.bn_identity(x)
        return activate(y, self.se, se_first=self.se_first)


class FusedBlock(nnx.Module):
    """relu(conv(x)) with a bias in the convolution, and squeeze-and-excitation where the block had it: what
    is deployed."""

    def __init__(self, conv: nnx.Conv, se: SqueezeExcite | None = None, *, se_first: bool = False):
        self.conv = conv
        self.se = nnx.data(se)
        self.se_first = se_first

    def __call__(self, x: jax.Array) -> jax.Array:
        return activate(self.conv(x), self.se, se_first=self.se_first)
