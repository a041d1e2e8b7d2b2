"""RepMLPNet: stages of dense layers over maps, whose branches inside the maps are a structure (`repmlp`).

Every stage begins with a block that makes the map smaller, a 4x4 convolution of stride 4 in the first stage,
2x2 of stride 2 in the others. Then come units y = x + mixer(norm(x)), z = y + down(up(y)). The mixer is a
dense layer over the positions of a map, gated by the mean of its input; `up` and `down` are 1x1 blocks, of
which the first normalises its input too. A batch norm, global average pooling and a dense layer end the
network.

Parameter paths, for stage s and unit u = 1, 2, ... (a batch norm has scale, bias, mean, var):

    stages/s/0/{conv/kernel,bn/*}                                  makes the map smaller
    stages/s/u/norm/*                                              before the mixer
    stages/s/u/mixer/gate/{down,up}/{kernel,bias}                  the two layers of the gate
    stages/s/u/mixer/fc/{conv/kernel,bn/*}                         re-parameterized
    stages/s/u/up/{pre/*,conv/kernel,bn/*}                         pre is the norm of the input
    stages/s/u/down/{conv/kernel,bn/*}
    head/{pre/*,conv/kernel,conv/bias}                             the last norm and the classifier

Source: RepMLPNet (arXiv 2112.11081) and its published code.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax.arguments import check_count
from repopt_jax.core.published import repopt_mlp
from repopt_jax.core.structure import Geometry
from repopt_jax.models.network import LayerSpec, OfVariant, check_variant, run_stages
from repopt_jax.nn.block import (
    Block,
    PooledBlock,
    PreNorm,
    SqueezeExcite,
    batch_norm,
    block,
    classifier,
    kernel_init,
)
from repopt_jax.nn.geometry import convolution_of, joined
from repopt_jax.nn.rngs import check_rngs


@dataclasses.dataclass(frozen=True)
class RepMLPVariant:
    """One network.

    Attributes:
      name: key in `REPMLP_VARIANTS`.
      widths: channels of each stage.
      units: number of units of each stage.
      sides: side of the square tiles of each stage over whose positions the mixers are dense: of the whole
        map for images of `image_size`, a divisor of the map's side for others.
      sets: number of kernels of the mixers of each stage; channel c has kernel c mod `sets`.
      patch: side of the pixels' squares that the first block takes, its window and stride.

    Raises:
      ValueError: at construction, if the four do not have one number for each stage, or the sets of a stage
        do not divide its channels.
    """

    name: str
    widths: tuple[int, ...]
    units: tuple[int, ...]
    sides: tuple[int, ...]
    sets: tuple[int, ...]
    patch: int = 4

    def __post_init__(self) -> None:
        if len({len(v) for v in (self.widths, self.units, self.sides, self.sets)}) != 1:
            raise ValueError(
                f"variant {self.name} has {len(self.widths)} `widths`, {len(self.units)} `units`, "
                f"{len(self.sides)} `sides` and {len(self.sets)} `sets`: each needs one for every stage"
            )
        for stage, (width, sets) in enumerate(zip(self.widths, self.sets)):
            if sets < 1 or width % sets:
                raise ValueError(
                    f"`sets` is {sets} in stage {stage}: it must divide the stage's {width} channels"
                )

    @property
    def architecture(self) -> str:
        """The network's name in scales files."""
        return f"RepMLPNet-{self.name}"

    @property
    def image_size(self) -> int:
        """Side of the smallest images: every map is a whole number of tiles where theirs is a multiple."""
        return math.lcm(*(self.patch * 2**stage * side for stage, side in enumerate(self.sides)))

    def layers(self, in_channels: int = 3) -> dict[str, LayerSpec]:
        """Returns the dense layer of every mixer."""
        del in_channels  # only the first block depends on it, and it is not re-parameterized
        return {
            f"stages/{stage}/{unit}/mixer/fc/conv/kernel": LayerSpec(
                mixer_geometry(sets, side), structures={"search": repopt_mlp}
            )
            for stage, (units, side, sets) in enumerate(zip(self.units, self.sides, self.sets))
            for unit in range(1, 1 + units)
        }


_T, _B, _D = (64, 128, 256, 512), (96, 192, 384, 768), (80, 160, 320, 640)
_224, _256 = (56, 28, 14, 7), (64, 32, 16, 8)

REPMLP_VARIANTS: dict[str, RepMLPVariant] = {
    variant.name: variant
    for variant in (
        RepMLPVariant("T224", _T, (2, 2, 6, 2), _224, (1, 4, 16, 128)),
        RepMLPVariant("T256", _T, (2, 2, 6, 2), _256, (1, 4, 16, 128)),
        RepMLPVariant("B224", _B, (2, 2, 12, 2), _224, (1, 4, 32, 128)),
        RepMLPVariant("B256", _B, (2, 2, 12, 2), _256, (1, 4, 32, 128)),
        RepMLPVariant("D256", _D, (2, 2, 18, 2), _256, (1, 4, 16, 128)),
        RepMLPVariant("L256", _B, (2, 2, 18, 2), _256, (1, 4, 32, 256)),
        # An unpublished variant for the embedded digits, which compiles in seconds.
        RepMLPVariant("digits", (16, 32), (1, 1), (4, 2), (2, 8), patch=2),
    )
}


class RepMLPNet(OfVariant):
    """The network.

    `__call__`: images (batch, height, width, in_channels) -> logits (batch, num_classes), float32 or wider.

    Args:
      variant: a row of `REPMLP_VARIANTS`, or one of your own.
      num_classes: number of classes.
      in_channels: channels of the images.
      published_order: as in `Mixer`.
      dtype: computation dtype, such as `jnp.bfloat16`; parameters are float32.
      rngs: `nnx.Rngs`.

    Raises:
      ValueError: no class; from `__call__`, images whose sides are not multiples of `variant.image_size`.
    """

    def __init__(
        self,
        variant: RepMLPVariant,
        *,
        num_classes: int,
        in_channels: int = 3,
        published_order: bool = False,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        check_variant(variant, RepMLPVariant)
        check_count("num_classes", num_classes)
        check_rngs(rngs)
        super().__init__(variant, num_classes=num_classes, in_channels=in_channels)
        options = {"dtype": dtype, "rngs": rngs}
        stages, inputs = [], in_channels
        for stage, (width, units) in enumerate(zip(variant.widths, variant.units)):
            blocks: list[nnx.Module] = [_smaller(inputs, width, 2 if stage else variant.patch, **options)]
            for _ in range(units):
                mixer = Mixer(
                    width,
                    variant.sides[stage],
                    variant.sets[stage],
                    published_order=published_order,
                    **options,
                )
                blocks.append(Unit(width, mixer, **options))
            stages.append(nnx.List(blocks))
            inputs = width
        self.stages: nnx.List[nnx.List[nnx.Module]] = nnx.List(stages)
        self.head: PooledBlock = PooledBlock(
            classifier(inputs, num_classes, **options),
            pre=_pre_norm(inputs, **options),
            activation="none",
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        if any(side % self.variant.image_size or not side for side in x.shape[1:3]):
            raise ValueError(
                f"images of {x.shape[1]} x {x.shape[2]} pixels give maps that are not whole tiles of "
                f"{self.variant.architecture}: resize them to {self.variant.image_size}, or to multiples"
            )
        logits = self.head(run_stages(self.stages, x)[-1])
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


class Unit(nnx.Module):
    """y = x + mixer(norm(x)), then y + down(up(y)): (batch, height, width, channels) -> the same shape.

    `up` is a 1x1 block with GELU to four times the channels, which begins with a batch norm of its own;
    `down` a 1x1 block back, without an activation.
    """

    def __init__(self, channels: int, mixer: "Mixer", *, dtype: Any = None, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        self.norm: PreNorm = _pre_norm(channels, **options)
        self.mixer = mixer
        self.up: Block = block(channels, 4 * channels, 1, activation="gelu", **options)
        self.up.pre = _pre_norm(channels, **options)
        self.down: Block = block(4 * channels, channels, 1, activation="none", **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.mixer(self.norm(x))
        return x + self.down(self.up(x))


class Mixer(nnx.Module):
    """A dense layer over the positions of a map, times a gate: (batch, height, width, channels) -> the same.

    The map is cut into tiles of side x side; in each of them, and for each channel, the output at a position
    is a weighted sum over the tile's positions. Channel c has kernel c mod `sets`. The gate is
    sigmoid(up(relu(down(mean of the whole map)))), one number for each image and channel.

    The dense layer, `fc`, is a depthwise convolution whose window and stride are the tile: it takes the
    `sets` channels that have different kernels, the others being further images, and gives one output channel
    for each position. Its batch norm has one channel for each kernel.

    Args:
      channels: number of channels.
      side: side of the tiles.
      sets: number of kernels; divides `channels`.
      published_order: puts the tiles of a map where the published code puts them if there are several of them
        and `sets` is below `channels`. It then mistakes tiles for groups of channels. Weights that were
        trained with that code on such maps (dense prediction) need it; ImageNet's have one tile.
      dtype: computation dtype.
      rngs: `nnx.Rngs`.

    Raises:
      ValueError: `sets` does not divide the channels; from `__call__`, a map that is not whole tiles.
    """

    def __init__(
        self,
        channels: int,
        side: int,
        sets: int,
        *,
        published_order: bool = False,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        if sets < 1 or channels % sets:
            raise ValueError(f"`sets` is {sets}: it must divide the {channels} channels")
        self.sets: int = sets
        self.side: int = side
        self.published_order: bool = published_order
        self.gate: SqueezeExcite = SqueezeExcite(channels, channels // 4, dtype=dtype, rngs=rngs)
        geometry = mixer_geometry(sets, side)
        layer = _conv(geometry, dtype=dtype, rngs=rngs)
        norm = batch_norm(geometry.outputs, shared=geometry.taps, dtype=dtype, rngs=rngs)
        self.fc: Block = Block(layer, norm, activation="none")

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        side, sets = self.side, self.sets
        if height % side or width % side:
            raise ValueError(
                f"the map has {height} x {width} positions, which are not whole tiles of {side} x {side}: "
                f"give a map whose sides are multiples of {side}"
            )
        repeats = channels // sets
        apart = jnp.moveaxis(x.reshape(batch, height, width, repeats, sets), 3, 1)
        y = self.fc(apart.reshape(batch * repeats, height, width, sets))
        if self.published_order:
            y = jnp.moveaxis(y.reshape(batch, repeats, *y.shape[1:]), 1, 3).reshape(y.shape)
        y = joined(y, (side, side)).reshape(batch, repeats, height, width, sets)
        return jnp.moveaxis(y, 1, 3).reshape(x.shape) * self.gate.gate(x)


def mixer_geometry(sets: int, side: int) -> Geometry:
    """Returns the geometry of a mixer's dense layer."""
    window = (side, side)
    return Geometry(window, sets, sets * side**2, sets, strides=window, padding=((0, 0), (0, 0)))


def _pre_norm(channels: int, **options: Any) -> PreNorm:
    return batch_norm(channels, kind=PreNorm, **options)  # pyright: ignore[reportReturnType]


def _smaller(inputs: int, outputs: int, factor: int, **options: Any) -> Block:
    """Makes a block that gives one position for each square of `factor` x `factor`."""
    window = (factor, factor)
    geometry = Geometry(window, inputs, outputs, strides=window, padding=((0, 0), (0, 0)))
    return Block(_conv(geometry, **options), batch_norm(outputs, **options))


def _conv(geometry: Geometry, *, dtype: Any, rngs: nnx.Rngs) -> nnx.Conv:
    """Makes a convolution of tiles with PyTorch's initialisation."""
    return nnx.Conv(
        geometry.inputs,
        geometry.outputs,
        geometry.window,
        strides=geometry.strides,
        padding=geometry.padding,
        feature_group_count=geometry.groups,
        use_bias=False,
        kernel_init=kernel_init,
        conv_general_dilated=convolution_of(geometry),
        dtype=dtype,
        rngs=rngs,
    )
