"""EfficientRep: a plain backbone of 3x3 blocks that returns feature maps at four strides, for detectors.

Stage 0 is the stem, one 3x3 block of stride 2. Stages 1 to 4 are each a 3x3 block of stride 2 and then
`repeats` 3x3 blocks of stride 1, so their maps have strides 4, 8, 16 and 32. If `sppf` is set, the last map
goes through `SimSPPF`.

Paths: block i of stage s is `stages/{s}/{i}`, its kernel `stages/{s}/{i}/conv/kernel`; `sppf/{cv1,cv2}`.
Source: YOLOv6 (arXiv 2209.02976), section 2.1, and its published code. Its batch norms have eps 1e-3 and
momentum 0.97, ours 1e-5 and 0.9.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax.arguments import check_count
from repopt_jax.models.network import LayerSpec, Network, check_variant, run_stages
from repopt_jax.models.vgg import BlockSpec
from repopt_jax.nn.block import Block, block
from repopt_jax.nn.rngs import check_rngs


@dataclasses.dataclass(frozen=True)
class BackboneVariant:
    """One backbone.

    Attributes:
      name: key in `BACKBONES`.
      widths: output channels of stages 0 to 4.
      repeats: number of blocks of stages 1 to 4 after the strided one; stage 0 is one block.
      sppf: whether the last map goes through `SimSPPF`.
    """

    name: str
    widths: tuple[int, int, int, int, int]
    repeats: tuple[int, int, int, int]
    sppf: bool = False


def _yolov6(name: str, width: float, depth: float = 0.33) -> BackboneVariant:
    """YOLOv6's multipliers of 64 to 1024 channels and of 6, 12, 18 and 6 blocks."""
    a, b, c, d, e = (int(base * width) for base in (64, 128, 256, 512, 1024))
    repeats = tuple(max(round(n * depth), 1) for n in (6, 12, 18, 6))
    return BackboneVariant(name, (a, b, c, d, e), repeats, sppf=True)  # pyright: ignore[reportArgumentType]


BACKBONES: dict[str, BackboneVariant] = {
    variant.name: variant
    for variant in (
        _yolov6("efficientrep-N", 0.25),
        _yolov6("efficientrep-T", 0.375),
        _yolov6("efficientrep-S", 0.5),
        # A face detector's backbone, given as block counts 1/3/3/4/3, of which the first is the stem's.
        BackboneVariant("face", (32, 64, 128, 192, 384), (3, 3, 4, 3)),
        # For scenes of 64 pixels.
        BackboneVariant("scenes", (16, 24, 32, 48, 64), (1, 1, 1, 1)),
    )
}


class EfficientRep(Network):
    """The backbone.

    `__call__`: images (batch, height, width, in_channels) -> the maps of stages 1 to 4, each (batch,
    ceil(height / stride), ceil(width / stride), width of the stage), with strides 4, 8, 16, 32.

    Args:
      variant: a row of `BACKBONES`, or one of your own.
      in_channels: channels of the images.
      activation: "relu" or "relu6".
      dtype: computation dtype, such as `jnp.bfloat16`; parameters are float32.
      rngs: `nnx.Rngs`.

    Raises:
      ValueError: an unknown activation.
      TypeError: a number or `rngs` of another type, or no variant.
    """

    def __init__(
        self,
        variant: BackboneVariant,
        *,
        in_channels: int = 3,
        activation: str = "relu",
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        check_variant(variant, BackboneVariant)
        check_count("in_channels", in_channels)
        check_rngs(rngs)
        self.variant = variant
        self.in_channels = in_channels
        stages: list[list[nnx.Module]] = [[] for _ in range(5)]
        for spec in backbone_specs(variant, in_channels):
            stages[spec.stage].append(
                block(
                    spec.inputs,
                    spec.outputs,
                    3,
                    stride=spec.stride,
                    activation=activation,
                    dtype=dtype,
                    rngs=rngs,
                )
            )
        self.stages: nnx.List[nnx.List[nnx.Module]] = nnx.List([nnx.List(blocks) for blocks in stages])
        width = variant.widths[-1]
        sppf = SimSPPF(width, activation=activation, dtype=dtype, rngs=rngs) if variant.sppf else None
        self.sppf: SimSPPF | None = nnx.data(sppf)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        _, a, b, c, d = run_stages(self.stages, x)
        return a, b, c, d if self.sppf is None else self.sppf(d)

    @property
    def architecture(self) -> str:
        return self.variant.name

    def layers(self) -> dict[str, LayerSpec]:
        """Returns the convolution of every block."""
        return {
            f"{spec.path}/conv/kernel": LayerSpec(spec.geometry)
            for spec in backbone_specs(self.variant, self.in_channels)
        }


class SimSPPF(nnx.Module):
    """Pyramid pooling: cv2([z, p(z), p(p(z)), p(p(p(z)))]), z = cv1(x), p the 5x5 maximum of stride 1.

    `cv1` halves the channels, `cv2` restores them; both are 1x1 and are not re-parameterized.
    """

    def __init__(self, channels: int, *, activation: str = "relu", dtype: Any = None, rngs: nnx.Rngs):
        half = channels // 2
        options = {"activation": activation, "dtype": dtype, "rngs": rngs}
        self.cv1: Block = block(channels, half, 1, **options)
        self.cv2: Block = block(4 * half, channels, 1, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        maps = [self.cv1(x)]
        for _ in range(3):
            maps.append(nnx.max_pool(maps[-1], (5, 5), padding="SAME"))
        return self.cv2(jnp.concatenate(maps, axis=-1))


def backbone_specs(variant: BackboneVariant, in_channels: int = 3) -> Iterator[BlockSpec]:
    """Yields the blocks of a variant in order."""
    inputs = in_channels
    for stage, (repeats, width) in enumerate(zip((0, *variant.repeats), variant.widths)):
        for index in range(1 + repeats):
            yield BlockSpec(stage, index, inputs, width, 1 if index else 2, 1)
            inputs = width
