"""RepGhostNet and RepOpt-GhostNet: ghost bottlenecks built plain, one table of widths.

A stem, nine stages of ghost bottlenecks, a 1x1 block, global average pooling, a 1x1 convolution, dropout and
a dense classifier. Each bottleneck holds two ghost modules, which compute half of the work of a dense
convolution with a cheap depthwise 3x3. That cheap layer is replaced by a structure: `repghost`, or in a
search `repopt_ghost`.

Parameter paths, for stage a and bottleneck b (a batch norm has scale, bias, mean, var):

    stages/0/0/{conv/kernel,bn/*}                                          the stem
    stages/a/b/ghost1/primary/{conv/kernel,bn/*}                           1x1; ghost2 likewise; a = 1 to 9
    stages/a/b/ghost1/cheap/{conv/kernel,bn/*}                             re-parameterized
    stages/a/b/depthwise/{conv/kernel,bn/*}                                if the stride is 2
    stages/a/b/se/{down,up}/{kernel,bias}                                  if the row has `se`
    stages/a/b/shortcut/{0,1}/{conv/kernel,bn/*}                           depthwise, then 1x1
    stages/10/0/{conv/kernel,bn/*}                                         after the last stage
    features/{kernel,bias}, head/{kernel,bias}                             head is the classifier

Sources: RepGhost (arXiv 2211.06088), section 3; RepOptimizer (arXiv 2205.15242), appendix D. That appendix
describes the search for a 1x1 layer; its published code, and this module, re-initialise the depthwise 3x3.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from repopt_jax.arguments import check_count
from repopt_jax.core.published import repopt_ghost
from repopt_jax.core.structure import Geometry
from repopt_jax.models.network import Classifier, LayerSpec, check_variant
from repopt_jax.nn.block import Block, SqueezeExcite, block, conv
from repopt_jax.nn.rngs import check_rngs


@dataclasses.dataclass(frozen=True)
class GhostRow:
    """One bottleneck at width 1.

    Attributes:
      size: side of its depthwise kernels, except those of the ghost modules (3).
      hidden: channels between its two ghost modules.
      outputs: output channels.
      se: whether it has squeeze-and-excitation with a quarter of the hidden channels.
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

    @property
    def architecture(self) -> str:
        """The network's name in scales files."""
        return f"GhostNet-{self.name}"

    def layers(self, in_channels: int = 3) -> dict[str, LayerSpec]:
        """Returns the cheap layers.

        The published depth rule is sqrt(2 / (n + 1)) for the n-th ghost module since width or resolution
        changed, n = 1, 2, ...
        """
        del in_channels  # only the stem depends on it, and it is not re-parameterized
        return {
            f"{spec.path}/{name}/cheap/conv/kernel": LayerSpec(
                Geometry((3, 3), outputs, outputs, outputs), n + 1, {"search": repopt_ghost}
            )
            for spec in ghost_specs(self)
            for name, _, outputs, n in spec.modules
        }


GHOST_VARIANTS: dict[str, GhostVariant] = {
    name: GhostVariant(name, float(name))
    for name in ("0.5", "0.58", "0.8", "1.0", "1.11", "1.3", "1.5", "2.0")
}
# An unpublished variant for the embedded digits, which compiles in seconds.
GHOST_VARIANTS["digits"] = GhostVariant(
    "digits",
    0.5,
    ((GhostRow(3, 8, 16, False, 1),), (GhostRow(3, 24, 24, True, 2),)),
    features=64,
)


@dataclasses.dataclass(frozen=True)
class GhostSpec:
    """Place and shape of one bottleneck: `stages/{stage}/{index}`.

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
        return f"stages/{self.stage}/{self.index}"

    @property
    def modules(self) -> tuple[tuple[str, int, int, int], ...]:
        """Name, inputs, outputs and the depth rule's n of both ghost modules."""
        return (
            ("ghost1", self.inputs, self.hidden, 2 * self.depth - 1),
            ("ghost2", self.hidden, self.outputs, 2 * self.depth),
        )


def ghostnet(
    variant: GhostVariant,
    *,
    num_classes: int,
    in_channels: int = 3,
    dropout: float = 0.2,
    dtype: Any = None,
    rngs: nnx.Rngs,
) -> Classifier:
    """Builds a plain GhostNet: images (batch, height, width, in_channels) -> float32 (batch, num_classes).

    Args:
      variant: a row of `GHOST_VARIANTS`, or one of your own.
      num_classes: number of classes.
      in_channels: channels of the images.
      dropout: rate before the classifier, in training mode. Above 0 it needs `rngs` with a `dropout`
        (or a default) stream.
      dtype: computation dtype, such as `jnp.bfloat16`; parameters are float32.
      rngs: `nnx.Rngs`.
    """
    check_variant(variant, GhostVariant)
    check_count("num_classes", num_classes)
    check_rngs(rngs)
    options = {"dtype": dtype, "rngs": rngs}
    stem, last = _channels(variant.stem, variant), _last_channels(variant)
    stages: list[list[nnx.Module]] = [[] for _ in range(len(variant.stages) + 2)]
    stages[0] = [block(in_channels, stem, 3, stride=2, **options)]
    for spec in ghost_specs(variant):
        stages[spec.stage].append(GhostBottleneck(spec, **options))
    width = _channels(variant.stages[-1][-1].outputs, variant)
    stages[-1] = [block(width, last, 1, **options)]
    features = conv(last, variant.features, 1, bias=True, **options)
    sizes = {"num_classes": num_classes, "in_channels": in_channels}
    return Classifier(variant, stages, last, features=features, dropout=dropout, **sizes, **options)


class GhostBottleneck(nnx.Module):
    """ghost2(se(depthwise(ghost1(x)))) + shortcut(x): (batch, h, w, in) -> (batch, h', w', out).

    `depthwise` is the strided convolution of bottlenecks with stride 2. `shortcut` is a depthwise and a 1x1
    convolution if width or resolution change, else the identity.
    """

    def __init__(self, spec: GhostSpec, *, dtype: Any = None, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}

        def depthwise(channels: int) -> Block:
            sizes = {"stride": spec.stride, "groups": channels}
            return block(channels, channels, spec.size, activation="none", **sizes, **options)

        self.ghost1: GhostModule = GhostModule(spec.inputs, spec.hidden, activation="relu", **options)
        self.depthwise: Block | None = nnx.data(depthwise(spec.hidden) if spec.stride > 1 else None)
        self.se: SqueezeExcite | None = nnx.data(
            SqueezeExcite(spec.hidden, spec.se_hidden, hard=True, **options) if spec.se_hidden else None
        )
        self.ghost2: GhostModule = GhostModule(spec.hidden, spec.outputs, activation="none", **options)
        self.shortcut: nnx.List[Block] = nnx.List([])
        if spec.stride > 1 or spec.inputs != spec.outputs:
            pointwise = block(spec.inputs, spec.outputs, 1, activation="none", **options)
            self.shortcut = nnx.List([depthwise(spec.inputs), pointwise])

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
    """cheap(primary(x)): a 1x1 block to the module's width, then a depthwise 3x3 block, with `activation`."""

    def __init__(self, inputs: int, outputs: int, *, activation: str, dtype: Any = None, rngs: nnx.Rngs):
        options = {"activation": activation, "dtype": dtype, "rngs": rngs}
        self.primary: Block = block(inputs, outputs, 1, **options)
        self.cheap: Block = block(outputs, outputs, 3, groups=outputs, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.cheap(self.primary(x))


def ghost_specs(variant: GhostVariant) -> Iterator[GhostSpec]:
    """Yields the bottlenecks of a variant in order."""
    inputs, depth = _channels(variant.stem, variant), 0
    for stage, rows in enumerate(variant.stages, start=1):
        for index, row in enumerate(rows):
            hidden, outputs = _channels(row.hidden, variant), _channels(row.outputs, variant)
            depth = depth + 1 if row.stride == 1 and inputs == outputs else 1
            se_hidden = divisible(hidden / 4) if row.se else 0
            yield GhostSpec(stage, index, inputs, hidden, outputs, row.size, row.stride, se_hidden, depth)
            inputs = outputs


def divisible(channels: float, by: int = 4) -> int:
    """Rounds `channels` to a multiple of `by`, at least `by` and at least nine tenths of `channels`."""
    rounded = max(by, int(channels + by / 2) // by * by)
    return rounded if rounded >= 0.9 * channels else rounded + by


def _channels(number: float, variant: GhostVariant) -> int:
    return divisible(number * variant.width)


def _last_channels(variant: GhostVariant) -> int:
    """Returns the channels of the 1x1 block after the last stage: twice the last bottleneck's hidden ones."""
    return _channels(2 * variant.stages[-1][-1].hidden, variant)
