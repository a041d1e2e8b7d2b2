"""VGG-style networks: RepOpt-VGG and RepVGG, one table of variants and one network for all kinds.

Five stages of 3x3 blocks, the first a single block, then global average pooling and a linear classifier. The
kind of block is an argument:

    target   plain blocks: what RepOptimizer trains and what is deployed
    search   CSLA blocks with trainable scales: what the hyper-search trains
    csla     CSLA blocks with constant scales: the twin of `target` under RepOptimizer
    repvgg   three normalised branches a block, merged for inference

Sources: RepVGG (arXiv 2101.03697) tables 2 and 4, RepOptimizer (arXiv 2205.15242) section 4 and appendix B.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax.core.branches import BranchSet, default_branches
from repopt_jax.core.scales import Scales, check_fit
from repopt_jax.nn.blocks import (
    PlainBlock,
    RepVGGBlock,
    SqueezeExcite,
    batch_norm,
    bias_init,
    conv,
    kernel_init,
)
from repopt_jax.nn.csla import CSLAConv, Form

Kind = Literal["target", "search", "csla", "repvgg"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclasses.dataclass(frozen=True)
class VGGVariant:
    """One network.

    Attributes:
      name: key in `VGG_VARIANTS`.
      blocks: number of blocks of stages 1 to 4; stage 0 is one block.
      widths: output channels of stages 0 to 4.
      strides: of the first block of stages 0 to 4.
      groups: of every second block (counted through the network, stage 0 being block 0): RepVGG's g2 and g4.
      pre_se: if not 0, every block has squeeze-and-excitation before its ReLU, of its width divided by this:
        RepVGG-D2se.
    """

    name: str
    blocks: tuple[int, int, int, int]
    widths: tuple[int, int, int, int, int]
    strides: tuple[int, int, int, int, int] = (2, 2, 2, 2, 2)
    groups: int = 1
    pre_se: int = 0


def _imagenet(
    name: str, blocks: tuple[int, int, int, int], a: float, b: float, groups: int = 1, pre_se: int = 0
) -> VGGVariant:
    """Widths from RepVGG's multipliers: `a` for stages 1 to 3, `b` for stage 4, stage 0 never wider than
    64."""
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
        # For images of 32 pixels and fewer: strides of their own, so that maps do not shrink to one pixel,
        # where every tap but the centre sees only padding and a search learns nothing.
        VGGVariant("cifar-small", (4, 4, 4, 1), (16, 16, 32, 64, 128), (1, 1, 2, 2, 1)),
        VGGVariant("cifar-A0", _A, (48, 48, 96, 192, 512), (1, 1, 2, 2, 2)),
        VGGVariant("digits", (2, 2, 2, 1), (16, 16, 32, 64, 64), (1, 1, 2, 2, 1)),
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
    def branch_set(self) -> BranchSet:
        """3x3 + 1x1, and the identity where width and resolution stay."""
        kernel = (3, 3, self.inputs // self.groups, self.outputs)
        return default_branches(kernel, groups=self.groups, stride=self.stride)


class RepOptVGG(nnx.Module):
    """RepOpt-VGG and RepVGG. `__call__`: images (batch, height, width, in_channels) -> logits (batch,
    num_classes), float32.

    Args:
      variant: a row of `VGG_VARIANTS`, or one of your own.
      kind: target, search, csla or repvgg; see the module's text.
      num_classes: size of the classifier.
      in_channels: of the images.
      post_se: squeeze-and-excitation (a quarter of the width) after every block's ReLU: the paper's "L2+SE".
      form: how search and csla blocks compute, "merged" or "branches"; see `nn.CSLAConv`.
      scales: for search and csla, where the scales start; the depth rule sqrt(2/l) if None.
      dtype: computation dtype, such as `jnp.bfloat16`; parameters are float32.
      rngs: `nnx.Rngs`.

    Raises:
      ValueError: an unknown kind, `scales` that do not fit, or `post_se` with a variant that has its own.
    """

    def __init__(
        self,
        variant: VGGVariant,
        *,
        kind: Kind = "target",
        num_classes: int,
        in_channels: int = 3,
        post_se: bool = False,
        form: Form = "merged",
        scales: Scales | None = None,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        if kind not in KINDS:
            raise ValueError(f"`kind` is {kind!r}: it must be one of {', '.join(KINDS)}")
        if post_se and variant.pre_se:
            raise ValueError(
                f"`post_se` is True, but every block of {variant.name} has squeeze-and-excitation before its "
                "ReLU already"
            )
        se_divisor = 4 if post_se else variant.pre_se
        self.variant = variant
        self.kind = kind
        self.in_channels = in_channels
        if kind in ("search", "csla"):
            scales = scales or self.depth_scales()
            check_fit(scales, self)
        stages: list[list[nnx.Module]] = [[] for _ in range(5)]
        for spec in block_specs(variant, in_channels):
            se = None
            if se_divisor:
                se = SqueezeExcite(spec.outputs, spec.outputs // se_divisor, dtype=dtype, rngs=rngs)
            block = _block(spec, kind, se, variant.pre_se > 0, form, scales, dtype, rngs)
            stages[spec.stage].append(block)
        self.stages = nnx.List([nnx.List(blocks) for blocks in stages])
        width = variant.widths[-1]
        self.head = nnx.Linear(
            width, num_classes, kernel_init=kernel_init, bias_init=bias_init(width), dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2))).astype(jnp.promote_types(x.dtype, jnp.float32))

    def branch_sets(self) -> dict[str, BranchSet]:
        """Path of each re-parameterized kernel of the target network -> its branches."""
        return {
            f"{spec.path}/conv/kernel": spec.branch_set
            for spec in block_specs(self.variant, self.in_channels)
        }

    def depth_scales(self) -> Scales:
        """Scales without a search by the depth rule: 1 for the block that opens a stage, then sqrt(2/l), l =
        1, 2, ..."""
        depths = {f"{s.path}/conv/kernel": s.index for s in block_specs(self.variant, self.in_channels)}
        return Scales.depth_rule(self.branch_sets(), depths).with_metadata(architecture=self.variant.name)

    def unit_scales(self) -> Scales:
        """Scales without a search: all ones."""
        return Scales.ones(self.branch_sets()).with_metadata(architecture=self.variant.name)


def block_specs(variant: VGGVariant, in_channels: int = 3) -> Iterator[BlockSpec]:
    """The blocks of a variant in order."""
    inputs, count = in_channels, 0
    for stage, (blocks, width, stride) in enumerate(
        zip((1, *variant.blocks), variant.widths, variant.strides)
    ):
        for index in range(blocks):
            groups = variant.groups if count and count % 2 == 0 else 1
            yield BlockSpec(stage, index, inputs, width, stride if index == 0 else 1, groups)
            inputs, count = width, count + 1


def _block(spec, kind, se, se_first, form, scales, dtype, rngs) -> nnx.Module:
    if kind == "repvgg":
        return RepVGGBlock(
            spec.inputs,
            spec.outputs,
            stride=spec.stride,
            groups=spec.groups,
            se=se,
            se_first=se_first,
            dtype=dtype,
            rngs=rngs,
        )
    if kind == "target":
        layer = conv(
            spec.inputs, spec.outputs, 3, stride=spec.stride, groups=spec.groups, dtype=dtype, rngs=rngs
        )
    else:
        layer = CSLAConv(
            spec.branch_set,
            strides=spec.stride,
            padding=((1, 1), (1, 1)),
            scales=scales.entries[f"{spec.path}/conv/kernel"].vectors,
            trainable_scales=kind == "search",
            form=form,
            dtype=dtype,
            rngs=rngs,
        )
    return PlainBlock(layer, batch_norm(spec.outputs, dtype=dtype, rngs=rngs), se, se_first=se_first)
