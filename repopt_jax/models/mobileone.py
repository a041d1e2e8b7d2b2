"""MobileOne: a chain of depthwise and 1x1 blocks, whose copies and branches are a structure (`mobileone`).

There are five stages, then global average pooling and a dense classifier. Stage 0 is one strided 3x3 block;
the others are pairs of a depthwise 3x3 and a 1x1 block, the first pair of each strided.

Paths: block i of stage s is `stages/{s}/{i}`, the depthwise block of pair u at 2u, its 1x1 block at 2u + 1;
the classifier is `head`. Source: MobileOne (arXiv 2206.04040), section 3.3, and its published code.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from flax import nnx

from repopt_jax.arguments import check_count
from repopt_jax.core.published import mobileone as copied
from repopt_jax.core.structure import Geometry
from repopt_jax.models.network import Classifier, LayerSpec, check_variant
from repopt_jax.nn.block import SqueezeExcite, block
from repopt_jax.nn.rngs import check_rngs


@dataclasses.dataclass(frozen=True)
class MobileOneVariant:
    """One network.

    Attributes:
      name: key in `MOBILEONE_VARIANTS`.
      widths: output channels of stages 0 to 4.
      copies: number of parallel copies of the convolution in every block of stages 1 to 4; stage 0 has one.
      pairs: number of pairs of depthwise and 1x1 blocks in stages 1 to 4.
      se_pairs: number of pairs, counted from the stage's end, in which both blocks have
        squeeze-and-excitation with a sixteenth of the width.
    """

    name: str
    widths: tuple[int, int, int, int, int]
    copies: int = 1
    pairs: tuple[int, int, int, int] = (2, 8, 10, 1)
    se_pairs: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def architecture(self) -> str:
        """The network's name in scales files."""
        return f"MobileOne-{self.name}"

    def layers(self, in_channels: int = 3) -> dict[str, LayerSpec]:
        """Returns the convolution of every block, with this variant's number of copies for `mobileone`."""
        return {
            f"{spec.path}/conv/kernel": LayerSpec(
                spec.geometry, structures={"mobileone": functools.partial(copied, copies=spec.copies)}
            )
            for spec in mobileone_specs(self, in_channels)
        }


def _imagenet(name: str, multipliers: tuple[float, float, float, float], **options: Any) -> MobileOneVariant:
    """Computes widths from the paper's multipliers of 64, 128, 256 and 512; stage 0 has at most 64."""
    a, b, c, d = (int(base * m) for base, m in zip((64, 128, 256, 512), multipliers))
    return MobileOneVariant(name, (min(64, a), a, b, c, d), **options)


MOBILEONE_VARIANTS: dict[str, MobileOneVariant] = {
    variant.name: variant
    for variant in (
        _imagenet("s0", (0.75, 1, 1, 2), copies=4),
        _imagenet("s1", (1.5, 1.5, 2, 2.5)),
        _imagenet("s2", (1.5, 2, 2.5, 4)),
        _imagenet("s3", (2, 2.5, 3, 4)),
        _imagenet("s4", (3, 3.5, 3.5, 4), se_pairs=(0, 0, 5, 1)),
        # An unpublished variant for the embedded digits, which compiles in seconds.
        MobileOneVariant("digits", (8, 8, 8, 16, 16), copies=2, pairs=(1, 1, 1, 1)),
    )
}


@dataclasses.dataclass(frozen=True)
class MobileOneSpec:
    """Place and shape of one block: `stages/{stage}/{index}`."""

    stage: int
    index: int
    inputs: int
    outputs: int
    size: int
    stride: int
    groups: int
    copies: int
    se: bool

    @property
    def path(self) -> str:
        return f"stages/{self.stage}/{self.index}"

    @property
    def geometry(self) -> Geometry:
        return Geometry((self.size, self.size), self.inputs, self.outputs, self.groups, strides=self.stride)


def mobileone(
    variant: MobileOneVariant,
    *,
    num_classes: int,
    in_channels: int = 3,
    activation: str = "relu",
    dtype: Any = None,
    rngs: nnx.Rngs,
) -> Classifier:
    """Builds a plain MobileOne: images (batch, height, width, in_channels) -> float32 (batch, num_classes).

    This is the deployed form with batch norms; the training form is `to_structure(model, "mobileone", ...)`.

    Args:
      variant: a row of `MOBILEONE_VARIANTS`, or one of your own.
      num_classes: number of classes.
      in_channels: channels of the images.
      activation: "relu" or "relu6".
      dtype: computation dtype, such as `jnp.bfloat16`; parameters are float32.
      rngs: `nnx.Rngs`.
    """
    check_variant(variant, MobileOneVariant)
    check_count("num_classes", num_classes)
    check_rngs(rngs)
    stages: list[list[nnx.Module]] = [[] for _ in range(5)]
    for spec in mobileone_specs(variant, in_channels):
        se = SqueezeExcite(spec.outputs, spec.outputs // 16, dtype=dtype, rngs=rngs) if spec.se else None
        stages[spec.stage].append(
            block(
                spec.inputs,
                spec.outputs,
                spec.size,
                stride=spec.stride,
                groups=spec.groups,
                se=se,
                se_first=True,
                activation=activation,
                dtype=dtype,
                rngs=rngs,
            )
        )
    options = {"num_classes": num_classes, "in_channels": in_channels, "dtype": dtype, "rngs": rngs}
    return Classifier(variant, stages, variant.widths[-1], **options)


def mobileone_specs(variant: MobileOneVariant, in_channels: int = 3) -> Iterator[MobileOneSpec]:
    """Yields the blocks of a variant in order."""
    width, *widths = variant.widths
    yield MobileOneSpec(0, 0, in_channels, width, 3, 2, 1, 1, se=False)
    for stage, (pairs, se_pairs, outputs) in enumerate(zip(variant.pairs, variant.se_pairs, widths), start=1):
        for u in range(pairs):
            stride, se = 1 if u else 2, u >= pairs - se_pairs
            yield MobileOneSpec(stage, 2 * u, width, width, 3, stride, width, variant.copies, se)
            yield MobileOneSpec(stage, 2 * u + 1, width, outputs, 1, 1, 1, variant.copies, se)
            width = outputs
