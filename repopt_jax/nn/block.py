"""The block that all networks are made of, and PyTorch's constants, on which all published recipes rely.

    y = act(se(bn(conv(pre(x)))))        se and act in either order; all but conv are optional

Networks are built of plain blocks. The way of training determines what `conv` is, and whether a batch norm
follows it: an `nnx.Conv` with `bn` is plain, `nn.Merged` with `bn` is RepOptimizer's search, `nn.Branched`
without `bn` is RepVGG, which has its norms inside, and an `nnx.Conv` without `bn` is a deployed block. The
rest of the block is the same in all of them, so scales that were searched with ReLU6 are used with ReLU6.
"""

import functools
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from repopt_jax.nn.convolution import conv_general_dilated

# Default initialisation of PyTorch's layers, uniform(-1/sqrt(fan_in), 1/sqrt(fan_in)).
kernel_init: Final = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nnx.relu,
    "relu6": nnx.relu6,
    "gelu": functools.partial(nnx.gelu, approximate=False),
    "none": lambda x: x,
}


class Block(nnx.Module):
    """act(se(bn(conv(pre(x))))): (batch, *spatial, in) -> (batch, *spatial', out).

    Args:
      conv: any module from feature maps to feature maps.
      bn: the batch norm after it, or None.
      se: squeeze-and-excitation, or None.
      se_first: whether `se` comes before the activation, as in RepVGG-D2se and MobileOne, or after it, as in
        RepOptimizer's networks.
      activation: a key of `ACTIVATIONS`.
      pre: a batch norm of the input, `PreNorm`, or what it became in a deployed block, or None.

    Raises:
      ValueError: an unknown activation.
    """

    def __init__(
        self,
        conv: nnx.Module,
        bn: nnx.BatchNorm | None = None,
        se: "SqueezeExcite | None" = None,
        *,
        se_first: bool = False,
        activation: str = "relu",
        pre: "PreNorm | ChannelAffine | None" = None,
    ):
        check_activation(activation)
        self.conv: Any = conv
        self.pre: PreNorm | ChannelAffine | None = nnx.data(pre)
        self.bn: nnx.BatchNorm | None = nnx.data(bn)
        self.se: SqueezeExcite | None = nnx.data(se)
        self.se_first = se_first
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv(x if self.pre is None else self.pre(x))
        if self.bn is not None:
            y = self.bn(y)
        if self.se is not None and self.se_first:
            y = self.se(y)
        y = ACTIVATIONS[self.activation](y)
        return self.se(y) if self.se is not None and not self.se_first else y

    def replaced(self, conv: nnx.Module, bn: nnx.BatchNorm | None, **changed: Any) -> "Block":
        """The same block with another linear part, and the keywords that are given changed."""
        own = {"se_first": self.se_first, "activation": self.activation, "pre": self.pre}
        return type(self)(conv, bn, self.se, **(own | changed))


class PooledBlock(Block):
    """A block whose `conv` takes the mean over the map: (batch, *spatial, in) -> (batch, out).

    `pre` normalises the map, with statistics over all of its pixels. Its affine map commutes with the mean.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x if self.pre is None else self.pre(x)
        y = self.conv(jnp.mean(x, axis=tuple(range(1, x.ndim - 1))))
        return ACTIVATIONS[self.activation](y)


class PreNorm(nnx.BatchNorm):
    """A batch norm that comes before a layer, not after one: the first step of a residual branch.

    `surgery.fuse` folds it into the layer after it where that is exact, and otherwise makes a `ChannelAffine`
    of it.
    """


class ChannelAffine(nnx.Module):
    """x * scale + bias with scale and bias (channels,): a batch norm with fixed statistics."""

    def __init__(self, scale: jax.Array, bias: jax.Array, *, dtype: Any = None):
        self.scale: nnx.Param[jax.Array] = nnx.Param(scale)
        self.bias: nnx.Param[jax.Array] = nnx.Param(bias)
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x, scale, bias = promote_dtype((x, self.scale[...], self.bias[...]), dtype=self.dtype)
        shape = (1,) * (x.ndim - 1) + scale.shape
        return x * scale.reshape(shape) + bias.reshape(shape)


class SharedNorm(nnx.BatchNorm):
    """A batch norm each of whose channels is shared by `shared` consecutive channels of its input.

    (batch, *spatial, channels * shared) -> the same shape: the norm of maps that lie along the channels, one
    after another, with the positions of a map in the place of pixels.
    """

    def __init__(self, channels: int, *, shared: int, **options: Any):
        super().__init__(channels, axis=-2, **options)
        self.shared = shared

    def __call__(self, x: jax.Array, *args: Any, **options: Any) -> jax.Array:
        maps = x.reshape(*x.shape[:-1], self.num_features, self.shared)
        return super().__call__(maps, *args, **options).reshape(x.shape)


class SqueezeExcite(nnx.Module):
    """Gates channels: x * gate(up(relu(down(spatial mean of x)))). `down` has `hidden` output channels.

    The gate is the sigmoid or, with `hard`, its piecewise linear form min(max(z + 3, 0), 6) / 6.

    Raises:
      ValueError: no hidden channel, as of a share of too few channels.
    """

    def __init__(self, channels: int, hidden: int, *, hard: bool = False, dtype: Any = None, rngs: nnx.Rngs):
        if hidden < 1:
            raise ValueError(
                f"squeeze-and-excitation of {channels} channels has {hidden} hidden ones, and needs one at "
                "least: make the layer wider, or leave squeeze-and-excitation out"
            )
        self.down: nnx.Conv = conv(channels, hidden, 1, bias=True, dtype=dtype, rngs=rngs)
        self.up: nnx.Conv = conv(hidden, channels, 1, bias=True, dtype=dtype, rngs=rngs)
        self.hard = hard

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.gate(x)

    def gate(self, x: jax.Array) -> jax.Array:
        """Returns the gate, (batch, 1, 1, channels)."""
        z = self.up(nnx.relu(self.down(jnp.mean(x, axis=(1, 2), keepdims=True))))
        return nnx.hard_sigmoid(z) if self.hard else nnx.sigmoid(z)


def block(
    inputs: int,
    outputs: int,
    size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    se: SqueezeExcite | None = None,
    se_first: bool = False,
    activation: str = "relu",
    dtype: Any = None,
    rngs: nnx.Rngs,
) -> Block:
    """Makes a plain block: a 2-D convolution with odd sides, its batch norm, an activation."""
    layer = conv(inputs, outputs, size, stride=stride, groups=groups, dtype=dtype, rngs=rngs)
    norm = batch_norm(outputs, dtype=dtype, rngs=rngs)
    return Block(layer, norm, se, se_first=se_first, activation=activation)


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
    """Makes a 2-D convolution with odd sides and PyTorch's padding and initialisation."""
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
        conv_general_dilated=conv_general_dilated,
        dtype=dtype,
        rngs=rngs,
    )


def batch_norm(
    channels: int,
    *,
    start: float = 1.0,
    shared: int = 1,
    kind: Callable[..., nnx.BatchNorm] = nnx.BatchNorm,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.BatchNorm:
    """Makes a batch norm of `channels` inputs with PyTorch's constants, whose scale starts at `start`.

    PyTorch's momentum 0.1 is 0.9 in Flax. The variance is computed without cancellation. With `shared` above
    1 it is a `SharedNorm`; otherwise of class `kind`.
    """
    if shared > 1:
        kind, channels = functools.partial(SharedNorm, shared=shared), channels // shared
    return kind(
        channels,
        momentum=0.9,
        epsilon=1e-5,
        use_fast_variance=False,
        scale_init=nnx.initializers.constant(start),
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def classifier(inputs: int, num_classes: int, *, dtype: Any = None, rngs: nnx.Rngs) -> nnx.Linear:
    """Makes a dense layer with PyTorch's initialisation."""
    return nnx.Linear(
        inputs, num_classes, kernel_init=kernel_init, bias_init=bias_init(inputs), dtype=dtype, rngs=rngs
    )


def bias_init(fan_in: int) -> Callable[..., jax.Array]:
    """Returns PyTorch's default initialiser for biases: uniform(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32, **_: jax.random.uniform(key, shape, dtype, -bound, bound)


def check_activation(name: str) -> None:
    """Raises ValueError if `name` is no key of `ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise ValueError(f"`activation` is {name!r}: it must be one of {', '.join(ACTIVATIONS)}")
