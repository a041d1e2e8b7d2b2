"""Networks as a stranger writes them: of Flax alone, every kind of layer that has to work."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from repopt_jax.core import paths
from repopt_jax.core.scales import LayerScales, Scales


class BasicBlock(nnx.Module):
    def __init__(self, inputs, outputs, stride=1, groups=1, dilation=1, *, rngs):
        d = dilation
        self.conv1 = nnx.Conv(
            inputs,
            outputs,
            (3, 3),
            strides=stride,
            padding=((d, d), (d, d)),
            kernel_dilation=d,
            feature_group_count=groups,
            use_bias=False,
            rngs=rngs,
        )
        self.bn1 = nnx.BatchNorm(outputs, use_fast_variance=False, rngs=rngs)
        self.conv2 = nnx.Conv(outputs, outputs, (3, 3), feature_group_count=groups, use_bias=False, rngs=rngs)
        self.bn2 = nnx.BatchNorm(outputs, use_fast_variance=False, rngs=rngs)
        downsample = None
        if stride > 1 or inputs != outputs:
            downsample = nnx.Sequential(
                nnx.Conv(inputs, outputs, (1, 1), strides=stride, use_bias=False, rngs=rngs),
                nnx.BatchNorm(outputs, use_fast_variance=False, rngs=rngs),
            )
        self.downsample = nnx.data(downsample)

    def __call__(self, x):
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.downsample is not None:
            x = self.downsample(x)
        return nnx.relu(x + y)


class ResNet18(nnx.Module):
    """2-2-2-2 basic blocks; grouped in the second stage, dilated in place of strided in the last one."""

    def __init__(self, *, widths=(4, 4, 8, 8), rngs):
        self.conv1 = nnx.Conv(3, widths[0], (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(widths[0], use_fast_variance=False, rngs=rngs)
        stages, inputs = [], widths[0]
        for width, stride, groups, dilation in zip(widths, (1, 2, 2, 1), (1, 2, 1, 1), (1, 1, 1, 2)):
            first = BasicBlock(inputs, width, stride, groups, dilation, rngs=rngs)
            stages.append(nnx.List([first, BasicBlock(width, width, 1, groups, dilation, rngs=rngs)]))
            inputs = width
        self.stages = nnx.List(stages)
        self.fc = nnx.Linear(inputs, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.fc(x.mean((1, 2)))


class DoubleConv(nnx.Module):
    def __init__(self, inputs, outputs, *, rngs):
        self.conv1 = nnx.Conv(inputs, outputs, (3, 3), rngs=rngs)
        self.bn1 = nnx.BatchNorm(outputs, use_fast_variance=False, rngs=rngs)
        self.conv2 = nnx.Conv(outputs, outputs, (3, 3), padding="REFLECT", rngs=rngs)
        self.bn2 = nnx.BatchNorm(outputs, use_fast_variance=False, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.conv1(x)))
        return nnx.relu(self.bn2(self.conv2(x)))


class UNet(nnx.Module):
    """Two levels down and up again: strided and transposed convolutions, a resize, skips that are
    concatenated."""

    def __init__(self, *, rngs):
        self.enter = DoubleConv(2, 4, rngs=rngs)
        self.down = nnx.Conv(4, 4, (3, 3), strides=2, padding=((1, 1), (1, 1)), rngs=rngs)
        self.middle = DoubleConv(4, 6, rngs=rngs)
        self.deeper = nnx.Conv(6, 6, (2, 2), strides=2, padding="VALID", rngs=rngs)
        self.up = nnx.ConvTranspose(6, 6, (2, 2), strides=2, rngs=rngs)
        self.leave = DoubleConv(16, 4, rngs=rngs)
        self.out = nnx.Conv(4, 2, (1, 1), rngs=rngs)

    def __call__(self, x):
        first = self.enter(x)
        second = self.middle(nnx.relu(self.down(first)))
        x = jnp.concatenate([self.up(nnx.relu(self.deeper(second))), second], -1)
        x = jax.image.resize(x, (*first.shape[:3], x.shape[-1]), "nearest")
        return self.out(self.leave(jnp.concatenate([x, first], -1)))


class Head(nnx.Module):
    def __init__(self, channels, *, rngs):
        self.conv = nnx.Conv(channels, channels, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(channels, use_fast_variance=False, rngs=rngs)
        self.out = nnx.Conv(channels, 3, (1, 1), rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.bn(self.conv(x))))


class Pyramid(nnx.Module):
    """One head for both levels, held under three names."""

    def __init__(self, *, rngs):
        self.stem = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.down = nnx.Conv(4, 4, (3, 3), strides=2, padding=1, rngs=rngs)
        head = Head(4, rngs=rngs)
        self.z_head = head
        self.heads = nnx.List([head, head])

    def __call__(self, x):
        levels = [nnx.relu(self.stem(x))]
        levels.append(nnx.relu(self.down(levels[0])))
        return jnp.stack([head(level).mean((1, 2)) for head, level in zip(self.heads, levels)], 1)


class ScannedBlock(nnx.Module):
    def __init__(self, *, rngs):
        self.conv = nnx.Conv(4, 4, (3,), rngs=rngs)
        self.bn = nnx.BatchNorm(4, use_fast_variance=False, rngs=rngs)
        self.mix = nnx.Linear(4, 4, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.mix(nnx.relu(self.bn(self.conv(x))))


class Scanned(nnx.Module):
    """Three equal blocks whose arrays are stacked, made by `nnx.vmap` and run by `nnx.scan`."""

    def __init__(self, *, depth=3, rngs):
        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return ScannedBlock(rngs=rngs)

        self.stem = nnx.Conv(2, 4, (3,), rngs=rngs)
        self.blocks = make(rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(block, x):
            return block(x)

        return self.head(run(self.blocks, self.stem(x)).mean(1))


class Line(nnx.Module):
    """One spatial axis: a circular, a dilated and a depthwise layer."""

    def __init__(self, *, rngs):
        self.stem = nnx.Conv(2, 4, 5, strides=2, padding="CIRCULAR", rngs=rngs)
        self.bn = nnx.BatchNorm(4, use_fast_variance=False, rngs=rngs)
        self.wide = nnx.Conv(4, 4, (3,), kernel_dilation=2, use_bias=False, rngs=rngs)
        self.depthwise = nnx.Conv(4, 4, (3,), feature_group_count=4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn(self.stem(x)))
        x = nnx.relu(self.wide(x))
        return self.head(nnx.relu(self.depthwise(x)).mean(1))


class Volume(nnx.Module):
    """Three spatial axes, a window with sides of its own."""

    def __init__(self, *, rngs):
        self.stem = nnx.Conv(2, 4, (3, 3, 3), strides=(1, 2, 2), padding=((1, 1),) * 3, rngs=rngs)
        self.conv = nnx.Conv(4, 4, (1, 3, 5), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(4, use_fast_variance=False, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn(self.conv(nnx.relu(self.stem(x)))))
        return self.head(x.mean((1, 2, 3)))


class MLP(nnx.Module):
    def __init__(self, *, rngs):
        self.layers = nnx.List([nnx.Linear(n, m, rngs=rngs) for n, m in ((6, 8), (8, 8), (8, 8), (8, 3))])

    def __call__(self, x):
        *hidden, last = self.layers
        for layer in hidden:
            x = jnp.tanh(layer(x))
        return last(x)


class Separable(nnx.Module):
    """Depthwise layers of several sizes, one of them strided and dilated, one with two outputs for each
    input, and 1x1 layers between them."""

    def __init__(self, *, rngs):
        def depthwise(size, outputs=4, **options):
            return nnx.Conv(
                4, outputs, (size, size), feature_group_count=4, use_bias=False, **options, rngs=rngs
            )

        def norm(channels):
            return nnx.BatchNorm(channels, use_fast_variance=False, rngs=rngs)

        self.stem = nnx.Conv(2, 4, (1, 1), rngs=rngs)
        self.large = depthwise(7)
        self.large_bn = norm(4)
        self.mix = nnx.Conv(4, 4, (1, 1), use_bias=False, rngs=rngs)
        self.strided = depthwise(5, strides=2, kernel_dilation=2, padding=((3, 4), (4, 4)))
        self.strided_bn = norm(4)
        self.wide = depthwise(3, 8, padding="CIRCULAR")
        self.wide_bn = norm(8)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.leaky_relu(self.large_bn(self.large(self.stem(x))))
        x = nnx.leaky_relu(self.strided_bn(self.strided(self.mix(x))))
        return self.head(nnx.leaky_relu(self.wide_bn(self.wide(x))).mean((1, 2)))


def drawn(model, seed=0, dtype=jnp.float32):
    """The abstract `model` with random parameters and the statistics of a fresh batch norm."""
    rng = np.random.default_rng(seed)

    def draw(path, v):
        name = path.rpartition("/")[2]
        if name in ("mean", "var"):
            return jnp.full(v.shape, float(name == "var"), dtype)
        if name == "scale":
            return jnp.asarray(1 + rng.normal(size=v.shape) / 4, dtype)
        return jnp.asarray(rng.normal(size=v.shape) / np.sqrt(max(1, np.prod(v.shape[:-1]))), dtype)

    nnx.update(model, paths.map_named(draw, nnx.state(model, (nnx.Param, nnx.BatchStat))))
    return model


def random_scales(branch_sets, seed=0, dtype=jnp.float32):
    """Of both signs."""
    rng = np.random.default_rng(seed)
    entries = {}
    for path, bs in branch_sets.items():
        vectors = {n: jnp.asarray(rng.normal(size=bs.vector_shape) + 0.2, dtype) for n in bs.names}
        entries[path] = LayerScales(bs, vectors)
    return Scales(entries)


class Case(NamedTuple):
    """A network, the shape of its inputs without the batch, and how many layers `find_layers` must see."""

    build: Callable[..., nnx.Module]
    inputs: tuple[int, ...]
    layers: int

    def batches(self, count=3, size=6, dtype=np.float32, seed=0):
        """Inputs and, where the network's outputs are, random targets."""
        rng = np.random.default_rng(seed)
        x = jax.ShapeDtypeStruct((size, *self.inputs), jnp.float32)
        outputs = jax.eval_shape(lambda m, x: m(x), self.abstract(), x).shape
        return [
            {
                "x": rng.normal(size=(size, *self.inputs)).astype(dtype),
                "y": rng.normal(size=outputs).astype(dtype),
            }
            for _ in range(count)
        ]

    def abstract(self):
        return nnx.eval_shape(lambda: self.build(rngs=nnx.Rngs(0)))

    def fresh(self, seed=0, dtype=jnp.float32):
        """A network that has not been trained. Its weights are numpy's, as drawing them one by one would take
        most of a test's time."""
        return drawn(self.abstract(), seed, dtype)


NETWORKS = {
    "ResNet-18": Case(ResNet18, (8, 8, 3), 20),
    "U-Net": Case(UNet, (8, 8, 2), 9),
    "shared head": Case(Pyramid, (6, 6, 2), 4),
    "scanned stack": Case(Scanned, (9, 2), 4),
    "1-D": Case(Line, (9, 2), 4),
    "3-D": Case(Volume, (4, 6, 6, 2), 3),
    "MLP": Case(MLP, (6,), 4),
}

DEPTHWISE = Case(Separable, (8, 9, 2), 6)


def squared_error(model, batch):
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)
