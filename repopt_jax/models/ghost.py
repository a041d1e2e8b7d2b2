"""RepGhostNet and RepOpt-GhostNet: one table of widths and one network for all kinds.

A stem, nine stages of ghost bottlenecks, a 1x1 block, global average pooling, a 1x1 convolution, dropout and
a linear classifier. Each bottleneck holds two ghost modules; the kind is what their cheap layer, a depthwise
3x3, is made of:

    target    a convolution and a batch norm: what RepOptimizer trains (RepOpt-GhostNet)
    search    CSLA branches 3x3 + identity with trainable scales, and a batch norm
    csla      the same with constant scales: the twin of `target` under RepOptimizer
    repghost  a normalised 3x3 and a normalised identity, merged for inference (RepGhostNet)

Parameter paths, for stage a and bottleneck b (a batch norm has scale, bias, mean, var):

    stem/conv/kernel, stem/bn/*
    blocks/a/b/ghost1/primary/conv/kernel, .../primary/bn/*                       1x1; ghost2 likewise
    blocks/a/b/ghost1/cheap/conv/kernel, .../cheap/bn/*                           what scales are for
    blocks/a/b/ghost1/cheap/bn_identity/*                                         kind repghost
    blocks/a/b/ghost1/cheap/conv/weights/{3x3,identity}, .../conv/scales/3x3      kinds search and csla
    blocks/a/b/depthwise/conv/kernel, .../depthwise/bn/*                          where the stride is 2
    blocks/a/b/se/{down,up}/{kernel,bias}                                         where the row says so
    blocks/a/b/shortcut/{0,1}/conv/kernel, .../bn/*                               depthwise, then 1x1
    blocks/9/0/conv/kernel, blocks/9/0/bn/*                                       after the last stage
    conv_head/{kernel,bias}, head/{kernel,bias}                                   head is the classifier

`fuse` makes `primary`, `cheap`, `depthwise` and the entries of `shortcut` plain convolutions
(`.../cheap/{kernel,bias}`); `stem` and `blocks/9/0` keep the level `conv`.

Sources: RepGhost (arXiv 2211.06088), section 3; RepOptimizer (arXiv 2205.15242), appendix D. There the search
is described for a 1x1; published code, and this, re-initialise the depthwise 3x3.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax.core.branches import BranchSet
from repopt_jax.core.scales import Scales, check_fit
from repopt_jax.nn.blocks import ConvNorm, PlainBlock, SqueezeExcite, batch_norm, bias_init, conv, kernel_init
from repopt_jax.nn.csla import CSLAConv, Form
from repopt_jax.nn.ghost import GhostBottleneck, GhostModule, RepGhostConv, ghost_branches

GhostKind = Literal["target", "search", "csla", "repghost"]
GHOST_KINDS: tuple[str, ...] = get_args(GhostKind)
Cheap = Callable[[str, int], ConvNorm | RepGhostConv]


@dataclasses.dataclass(frozen=True)
class GhostRow:
    """One bottleneck at width 1.

    Attributes:
      size: side of its depthwise kernels, those of the ghost modules (3) excepted.
      hidden: channels between its two ghost modules.
      outputs: channels of its result.
      se: whether it has squeeze-and-excitation, of a quarter of the hidden channels.
      stride: 1 or 2.
    """

    size: int
    hidden: int
    outputs: int
    se: bool
    stride: int


_STAGES = (
    (GhostRow(3, 8, 16, False, 1),),
    (GhostRow(3, 24, 24, False, 2),),
    (GhostRow(3, 36, 24, False, 1),),
    (GhostRow(5, 36, 40, True, 2),),
    (GhostRow(5, 60, 40, True, 1),),
    (GhostRow(3, 120, 80, False, 2),),
    (
        GhostRow(3, 100, 80, False, 1),
        GhostRow(3, 120, 80, False, 1),
        GhostRow(3, 120, 80, False, 1),
        GhostRow(3, 240, 112, True, 1),
        GhostRow(3, 336, 112, True, 1),
    ),
    (GhostRow(5, 336, 160, True, 2),),
    (
        GhostRow(5, 480, 160, False, 1),
        GhostRow(5, 480, 160, True, 1),
        GhostRow(5, 480, 160, False, 1),
        GhostRow(5, 480, 160, True, 1),
    ),
)


@dataclasses.dataclass(frozen=True)
class GhostVariant:
    """One network.

    Attributes:
      name: key in `GHOST_VARIANTS`.
      width: multiplier of every number of channels of `stem` and `stages`, rounded to a multiple of 4.
      stages: rows of bottlenecks.
      stem: channels of the strided 3x3 convolution that opens the network, at width 1.
      features: channels before the classifier, at every width.
    """

    name: str
    width: float
    stages: tuple[tuple[GhostRow, ...], ...] = _STAGES
    stem: int = 16
    features: int = 1280


GHOST_VARIANTS: dict[str, GhostVariant] = {
    name: GhostVariant(name, float(name))
    for name in ("0.5", "0.58", "0.8", "1.0", "1.11", "1.3", "1.5", "2.0")
}


@dataclasses.dataclass(frozen=True)
class GhostSpec:
    """Place and shape of one bottleneck: `blocks/{stage}/{index}`.

    `depth` counts, from 1, the bottlenecks since the last one that changed width or resolution.
    """

    stage: int
    index: int
    inputs: int
    hidden: int
    outputs: int
    size: int
    stride: int
    se_hidden: int
    depth: int

    @property
    def path(self) -> str:
        return f"blocks/{self.stage}/{self.index}"

    @property
    def modules(self) -> tuple[tuple[str, int, int, int], ...]:
        """Name, inputs, outputs and number n for the depth rule of its ghost modules."""
        return (
            ("ghost1", self.inputs, self.hidden, 2 * self.depth - 1),
            ("ghost2", self.hidden, self.outputs, 2 * self.depth),
        )


class RepGhostNet(nnx.Module):
    """RepGhostNet and RepOpt-GhostNet. `__call__`: images (batch, height, width, in_channels) -> logits
    (batch, num_classes), float32.

    Args:
      variant: a row of `GHOST_VARIANTS`, or one of your own.
      kind: target, search, csla or repghost; see the module's text, which also lists the parameters' paths.
      num_classes: size of the classifier.
      in_channels: of the images.
      dropout: rate before the classifier, in training mode. Above 0 it needs an `rngs` with a `dropout` (or a
        default) stream.
      form: how search and csla layers compute, "merged" or "branches"; see `nn.CSLAConv`.
      scales: for search and csla, where the scales start; the depth rule if None.
      dtype: computation dtype, such as `jnp.bfloat16`; parameters are float32.
      rngs: `nnx.Rngs`.

    Raises:
      ValueError: an unknown kind, or `scales` that do not fit.
    """

    def __init__(
        self,
        variant: GhostVariant,
        *,
        kind: GhostKind = "target",
        num_classes: int,
        in_channels: int = 3,
        dropout: float = 0.2,
        form: Form = "merged",
        scales: Scales | None = None,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        if kind not in GHOST_KINDS:
            raise ValueError(f"`kind` is {kind!r}: it must be one of {', '.join(GHOST_KINDS)}")
        self.variant = variant
        self.kind = kind
        self.in_channels = in_channels
        vectors = {}
        if kind in ("search", "csla"):
            scales = scales or self.depth_scales()
            check_fit(scales, self)
            vectors = scales.vectors
        stem, last = _channels(variant.stem, variant), _last_channels(variant)
        blocks: list[list[nnx.Module]] = [[] for _ in variant.stages]

        def cheap(path: str, channels: int) -> ConvNorm | RepGhostConv:
            given = vectors.get(f"{path}/cheap/conv/kernel")
            return _cheap(channels, kind, given, form, dtype, rngs)

        def plain(inputs: int, outputs: int, size: int, *, stride: int = 1) -> PlainBlock:
            layer = conv(inputs, outputs, size, stride=stride, dtype=dtype, rngs=rngs)
            return PlainBlock(layer, batch_norm(outputs, dtype=dtype, rngs=rngs))

        self.stem = plain(in_channels, stem, 3, stride=2)
        for spec in ghost_specs(variant):
            blocks[spec.stage].append(_bottleneck(spec, cheap, dtype, rngs))
        width = _channels(variant.stages[-1][-1].outputs, variant)
        blocks.append([plain(width, last, 1)])
        self.blocks = nnx.List([nnx.List(stage) for stage in blocks])
        self.conv_head = conv(last, variant.features, 1, bias=True, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs if dropout else None)
        self.head = nnx.Linear(
            variant.features,
            num_classes,
            kernel_init=kernel_init,
            bias_init=bias_init(variant.features),
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for stage in self.blocks:
            for block in stage:
                x = block(x)
        x = nnx.relu(self.conv_head(jnp.mean(x, axis=(1, 2), keepdims=True)))
        x = self.dropout(x.reshape(x.shape[0], -1))
        return self.head(x).astype(jnp.promote_types(x.dtype, jnp.float32))

    def branch_sets(self) -> dict[str, BranchSet]:
        """Path of each re-parameterized kernel of the target network -> its branches."""
        return {
            f"{spec.path}/{name}/cheap/conv/kernel": ghost_branches(outputs)
            for spec in ghost_specs(self.variant)
            for name, _, outputs, _ in spec.modules
        }

    def depth_scales(self) -> Scales:
        """Scales without a search by the published depth rule: sqrt(2/(n + 1)) for the n-th ghost module
        since width or resolution changed, n = 1, 2, ..."""
        depths = {
            f"{spec.path}/{name}/cheap/conv/kernel": n + 1
            for spec in ghost_specs(self.variant)
            for name, _, _, n in spec.modules
        }
        return Scales.depth_rule(self.branch_sets(), depths).with_metadata(architecture=_name(self.variant))

    def unit_scales(self) -> Scales:
        """Scales without a search: all ones."""
        return Scales.ones(self.branch_sets()).with_metadata(architecture=_name(self.variant))


def ghost_specs(variant: GhostVariant) -> Iterator[GhostSpec]:
    """The bottlenecks of a variant in order."""
    inputs, depth = _channels(variant.stem, variant), 0
    for stage, rows in enumerate(variant.stages):
        for index, row in enumerate(rows):
            hidden, outputs = _channels(row.hidden, variant), _channels(row.outputs, variant)
            depth = depth + 1 if row.stride == 1 and inputs == outputs else 1
            se_hidden = divisible(hidden / 4) if row.se else 0
            yield GhostSpec(stage, index, inputs, hidden, outputs, row.size, row.stride, se_hidden, depth)
            inputs = outputs


def divisible(channels: float, by: int = 4) -> int:
    """The multiple of `by` nearest to `channels`, at least `by`, and never less than nine tenths of
    `channels`."""
    rounded = max(by, int(channels + by / 2) // by * by)
    return rounded if rounded >= 0.9 * channels else rounded + by


def _channels(number: float, variant: GhostVariant) -> int:
    return divisible(number * variant.width)


def _last_channels(variant: GhostVariant) -> int:
    """Channels of the 1x1 block after the last stage: twice the last bottleneck's hidden ones."""
    return _channels(2 * variant.stages[-1][-1].hidden, variant)


def _name(variant: GhostVariant) -> str:
    return f"GhostNet-{variant.name}"


def _cheap(channels, kind, scales, form, dtype, rngs) -> ConvNorm | RepGhostConv:
    if kind == "repghost":
        return RepGhostConv(channels, dtype=dtype, rngs=rngs)
    if kind == "target":
        layer = conv(channels, channels, 3, groups=channels, dtype=dtype, rngs=rngs)
    else:
        layer = CSLAConv(
            ghost_branches(channels),
            padding=((1, 1), (1, 1)),
            scales=scales,
            trainable_scales=kind == "search",
            form=form,
            dtype=dtype,
            rngs=rngs,
        )
    return ConvNorm(layer, batch_norm(channels, dtype=dtype, rngs=rngs))


def _bottleneck(spec: GhostSpec, cheap: Cheap, dtype: Any, rngs: nnx.Rngs) -> GhostBottleneck:
    """`cheap(path, channels)` makes the cheap layer of the ghost module at `path`."""

    def conv_norm(inputs: int, outputs: int, size: int, *, stride: int = 1, groups: int = 1) -> ConvNorm:
        layer = conv(inputs, outputs, size, stride=stride, groups=groups, dtype=dtype, rngs=rngs)
        return ConvNorm(layer, batch_norm(outputs, dtype=dtype, rngs=rngs))

    def depthwise(channels: int) -> ConvNorm:
        return conv_norm(channels, channels, spec.size, stride=spec.stride, groups=channels)

    ghost1, ghost2 = (
        GhostModule(
            conv_norm(inputs, outputs, 1), cheap(f"{spec.path}/{name}", outputs), relu=name == "ghost1"
        )
        for name, inputs, outputs, _ in spec.modules
    )
    se = None
    if spec.se_hidden:
        se = SqueezeExcite(spec.hidden, spec.se_hidden, hard=True, dtype=dtype, rngs=rngs)
    plain = spec.stride == 1 and spec.inputs == spec.outputs
    return GhostBottleneck(
        ghost1,
        ghost2,
        depthwise=depthwise(spec.hidden) if spec.stride > 1 else None,
        se=se,
        shortcut=None if plain else (depthwise(spec.inputs), conv_norm(spec.inputs, spec.outputs, 1)),
    )
