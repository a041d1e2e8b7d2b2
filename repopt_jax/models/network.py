"""The base classes of networks: stages of plain blocks that declare which layers can be re-parameterized.

A network does not depend on the way of training. `layers` names the kernels that a structure can replace,
with what is particular to them: the depth rule's number, and descriptions other than the general ones.
`surgery` uses it to make a network ready for training.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax.arguments import check_count
from repopt_jax.core.branches import BranchSet
from repopt_jax.core.published import STRUCTURES, repopt
from repopt_jax.core.scales import Scales
from repopt_jax.core.structure import Description, Geometry
from repopt_jax.nn.block import classifier


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """A layer that can be re-parameterized.

    Attributes:
      geometry: the layer's geometry.
      depth: l of the depth rule sqrt(2 / l), 0 for the scale 1; None if none is published, so that
        `surgery.depth_scales` counts.
      structures: name of a structure, or "search" -> the description for this layer in place of the general
        one.
    """

    geometry: Geometry
    depth: int | None = None
    structures: Mapping[str, Description] = dataclasses.field(default_factory=dict)


class Network(nnx.Module):
    """A plain network. Subclasses declare which layers can be re-parameterized."""

    @property
    @abc.abstractmethod
    def architecture(self) -> str:
        """The network's name in scales files."""

    @abc.abstractmethod
    def layers(self) -> dict[str, LayerSpec]:
        """Returns the kernels that can be re-parameterized: path -> `LayerSpec`."""

    def branch_sets(self) -> dict[str, BranchSet]:
        """Returns the branches of the hyper-search by the paths of `layers`."""
        search = self.descriptions("search")
        return {path: search[path](spec.geometry).branch_set() for path, spec in self.layers().items()}

    def descriptions(self, structure: str) -> dict[str, Description]:
        """Returns each layer's description of a structure in `STRUCTURES`, or of "search", by path."""
        general = repopt if structure == "search" else STRUCTURES[structure]
        return {path: spec.structures.get(structure, general) for path, spec in self.layers().items()}

    def depths(self) -> dict[str, int]:
        """Returns l of the published depth rule by path; empty if none is published."""
        return {path: spec.depth for path, spec in self.layers().items() if spec.depth is not None}

    def unit_scales(self) -> Scales:
        """Returns scales that are all 1, without a search."""
        return Scales.ones(self.branch_sets()).with_metadata(architecture=self.architecture)


def check_variant(variant: Any, kind: type) -> None:
    """Raises TypeError if an argument `variant` is no row of the table that it must be of."""
    if not isinstance(variant, kind):
        shown = repr(variant) if isinstance(variant, str) else f"of type {type(variant).__name__}"
        raise TypeError(f"`variant` is {shown}: it must be a {kind.__name__}; `models.create` takes names")


class OfVariant(Network):
    """A classifying network that is made from a row of a table.

    Args:
      variant: the row, which defines `architecture` and `layers(in_channels)`.
      num_classes: number of classes.
      in_channels: channels of the images.

    Raises:
      ValueError: no class.
      TypeError: numbers of another type.
    """

    def __init__(self, variant: Any, *, num_classes: int, in_channels: int):
        check_count("num_classes", num_classes)
        check_count("in_channels", in_channels)
        self.variant = variant
        self.in_channels = in_channels

    @property
    def architecture(self) -> str:
        return self.variant.architecture

    def layers(self) -> dict[str, LayerSpec]:
        return self.variant.layers(self.in_channels)


class Classifier(OfVariant):
    """Stages of blocks, global average pooling, and a dense layer.

    `__call__`: images (batch, height, width, in_channels) -> logits (batch, num_classes), float32 or wider.

    Args:
      variant: the row that it is made from, which defines `architecture` and `layers(in_channels)`.
      stages: the blocks.
      width: output channels of the last block.
      num_classes: number of classes.
      in_channels: channels of the images.
      features: layer from pooled maps (batch, 1, 1, width) to the features of the classifier, followed by a
        ReLU; or None.
      dropout: rate before the classifier, in training mode. Above 0 it needs `rngs` with a `dropout`
        (or a default) stream.
      dtype: computation dtype.
      rngs: `nnx.Rngs`.
    """

    def __init__(
        self,
        variant: Any,
        stages: Sequence[Sequence[nnx.Module]],
        width: int,
        *,
        num_classes: int,
        in_channels: int,
        features: nnx.Conv | None = None,
        dropout: float = 0.0,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(variant, num_classes=num_classes, in_channels=in_channels)
        self.stages: nnx.List[nnx.List[nnx.Module]] = nnx.List([nnx.List(blocks) for blocks in stages])
        self.features: nnx.Conv | None = nnx.data(features)
        self.dropout: nnx.Dropout | None = nnx.data(nnx.Dropout(dropout, rngs=rngs) if dropout else None)
        width = width if features is None else features.out_features
        self.head: nnx.Linear = classifier(width, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.mean(run_stages(self.stages, x)[-1], axis=(1, 2), keepdims=True)
        if self.features is not None:
            x = nnx.relu(self.features(x))
        x = x.reshape(x.shape[0], x.shape[-1])
        if self.dropout is not None:
            x = self.dropout(x)
        return self.head(x).astype(jnp.promote_types(x.dtype, jnp.float32))


def run_stages(stages: nnx.List[nnx.List[Any]], x: jax.Array) -> list[jax.Array]:
    """Returns the feature map after each stage."""
    maps = []
    for stage in stages:
        for block in stage:
            x = block(x)
        maps.append(x)
    return maps
