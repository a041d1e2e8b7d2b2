"""The VGG-style networks of RepVGG and RepOptimizer, one table of variants.

Five stages of 3x3 blocks, the first a single block, then global average pooling and a dense classifier.

Paths: block i of stage s is `stages/{s}/{i}`, its kernel `stages/{s}/{i}/conv/kernel`; the classifier is
`head`. Sources: RepVGG (arXiv 2101.03697) tables 2 and 4, RepOptimizer (arXiv 2205.15242) section 4 and
appendix B.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from flax import nnx

from repopt_jax.arguments import check_count
from repopt_jax.core.structure import Geometry
from repopt_jax.models.network import Classifier, LayerSpec, check_variant
from repopt_jax.nn.block import SqueezeExcite, block
from repopt_jax.nn.rngs import check_rngs


@dataclasses.dataclass(frozen=True)
class VGGVariant:
    """One network.

    Attributes:
      name: key in `VGG_VARIANTS`.
      blocks: number of blocks of stages 1 to 4; stage 0 is one block.
      widths: output channels of stages 0 to 4.
      strides: strides of the first blocks of stages 0 to 4.
      groups: feature groups of every second block (counted through the network, stage 0 being block 0):
        RepVGG's g2 and g4.
      pre_se: if not 0, every block has squeeze-and-excitation before its ReLU, with its width divided by this
        number: RepVGG-D2se.
    """

    name: str
    blocks: tuple[int, int, int, int]
    widths: tuple[int, int, int, int, int]
    strides: tuple[int, int, int, int, int] = (2, 2, 2, 2, 2)
    groups: int = 1
    pre_se: int = 0

    @property
    def architecture(self) -> str:
        """The network's name in scales files."""
        return self.name

    def layers(self, in_channels: int = 3) -> dict[str, LayerSpec]:
        """Returns the convolution of every block. The depth rule counts the blocks of a stage from 0."""
        return {
            f"{spec.path}/conv/kernel": LayerSpec(spec.geometry, spec.index)
            for spec in block_specs(self, in_channels)
        }


def _imagenet(
    name: str, blocks: tuple[int, int, int, int], a: float, b: float, groups: int = 1, pre_se: int = 0
) -> VGGVariant:
    """Computes widths from RepVGG's multipliers, a for stages 1 to 3, b for 4; stage 0 has at most 64."""
    widths = (min(64, int(64 * a)), int(64 * a), int(128 * a), int(256 * a), int(512 * b))
    return VGGVariant(name, blocks, widths, groups=groups, pre_se=pre_se)


_A, _B, _L = (2, 4, 14, 1), (4, 6, 16, 1), (8, 14, 24, 1)  # RepVGG calls the last one D

VGG_VARIANTS: dict[str, VGGVariant] = {
    variant.name: variant
    for variant in (
        _imagenet("A0", _A, 0.75, 2.5),
        _imagenet("A1", _A, 1, 2.5),
        _imagenet("A2", _A, 1.5, 2.75),
        _imagenet("B0", _B, 1, 2.5),
        _imagenet("B1", _B, 2, 4),
        _imagenet("B1g2", _B, 2, 4, groups=2),
        _imagenet("B1g4", _B, 2, 4, groups=4),
        _imagenet("B2", _B, 2.5, 5),
        _imagenet("B2g2", _B, 2.5, 5, groups=2),
        _imagenet("B2g4", _B, 2.5, 5, groups=4),
        _imagenet("B3", _B, 3, 5),
        _imagenet("B3g2", _B, 3, 5, groups=2),
        _imagenet("B3g4", _B, 3, 5, groups=4),
        _imagenet("L1", _L, 2, 4),
        _imagenet("L2", _L, 2.5, 5),
        _imagenet("D2se", _L, 2.5, 5, pre_se=16),
        # For images of at most 32 pixels, with smaller strides so that maps do not shrink to one pixel, where
        # every tap but the centre samples only padding and a search learns nothing.
        VGGVariant("cifar-small", (4, 4, 4, 1), (16, 16, 32, 64, 128), (1, 1, 2, 2, 1)),
        VGGVariant("cifar-A0", _A, (48, 48, 96, 192, 512), (1, 1, 2, 2, 2)),
        VGGVariant("cifar-A0-narrow", _A, (16, 16, 32, 64, 128), (1, 1, 2, 2, 2)),
        VGGVariant("digits", (2, 2, 2, 1), (16, 16, 32, 64, 64), (1, 1, 2, 2, 1)),
        # 32 narrow layers in a row, which plain SGD trains badly: what branches are good for, in half a
        # minute.
        VGGVariant("cifar-deep", (1, 14, 1, 15), (16, 16, 16, 32, 32), (2, 1, 1, 2, 1)),
        VGGVariant("digits-deep", (1, 14, 1, 15), (8, 8, 8, 16, 16), (1, 1, 1, 2, 1)),
    )
}


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """Place and shape of one block: `stages/{stage}/{index}`."""

    stage: int
    index: int
    inputs: int
    outputs: int
    stride: int
    groups: int

    @property
    def path(self) -> str:
        return f"stages/{self.stage}/{self.index}"

    @property
    def geometry(self) -> Geometry:
        return Geometry((3, 3), self.inputs, self.outputs, self.groups, strides=self.stride)


def vgg(
    variant: VGGVariant,
    *,
    num_classes: int,
    in_channels: int = 3,
    post_se: bool = False,
    activation: str = "relu",
    dtype: Any = None,
    rngs: nnx.Rngs,
) -> Classifier:
    """Builds a plain VGG: images (batch, height, width, in_channels) -> logits (batch, num_classes), float32.

    Args:
      variant: a row of `VGG_VARIANTS`, or one of your own.
      num_classes: number of classes.
      in_channels: channels of the images.
      post_se: squeeze-and-excitation (a quarter of the width) after every block's ReLU: the paper's "L2+SE".
      activation: "relu" or "relu6".
      dtype: computation dtype, such as `jnp.bfloat16`; parameters are float32.
      rngs: `nnx.Rngs`.

    Raises:
      ValueError: `post_se` with a variant that has `pre_se`; no class; an unknown activation.
    """
    check_variant(variant, VGGVariant)
    check_count("num_classes", num_classes)
    check_rngs(rngs)
    if post_se and variant.pre_se:
        raise ValueError(
            f"`post_se` is True, but every block of {variant.name} has squeeze-and-excitation before its "
            "ReLU already"
        )
    divisor = 4 if post_se else variant.pre_se
    stages: list[list[nnx.Module]] = [[] for _ in range(5)]
    for spec in block_specs(variant, in_channels):
        se = SqueezeExcite(spec.outputs, spec.outputs // divisor, dtype=dtype, rngs=rngs) if divisor else None
        stages[spec.stage].append(
            block(
                spec.inputs,
                spec.outputs,
                3,
                stride=spec.stride,
                groups=spec.groups,
                se=se,
                se_first=variant.pre_se > 0,
                activation=activation,
                dtype=dtype,
                rngs=rngs,
            )
        )
    options = {"num_classes": num_classes, "in_channels": in_channels, "dtype": dtype, "rngs": rngs}
    return Classifier(variant, stages, variant.widths[-1], **options)


def block_specs(variant: VGGVariant, in_channels: int = 3) -> Iterator[BlockSpec]:
    """Yields the blocks of a variant in order."""
    inputs, count = in_channels, 0
    for stage, (blocks, width, stride) in enumerate(
        zip((1, *variant.blocks), variant.widths, variant.strides)
    ):
        for index in range(blocks):
            groups = variant.groups if count and count % 2 == 0 else 1
            yield BlockSpec(stage, index, inputs, width, stride if index == 0 else 1, groups)
            inputs, count = width, count + 1
