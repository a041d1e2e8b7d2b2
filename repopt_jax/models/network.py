"""What all networks here are: stages of blocks built plain, which say of themselves which layers can be
re-parameterized.

A network knows nothing of ways of training. `layers` names the kernels that a structure can take the place
of, and what is particular to them: the number in the depth rule, and descriptions other than the general
ones. Surgery does the rest."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax.core.branches import BranchSet
from repopt_jax.core.scales import Scales
from repopt_jax.core.structure import STRUCTURES, Description, Geometry, repopt
from repopt_jax.nn.block import classifier


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """A layer that can be re-parameterized.

    Attributes:
      geometry: of the layer.
      depth: l of the depth rule sqrt(2 / l), 0 for the scale 1; None where nothing is published, for
        `surgery.depth_scales` to count.
      structures: name of a structure, or "search" -> the description that this layer has for it in place of
        the general one.
    """

    geometry: Geometry
    depth: int | None = None
    structures: Mapping[str, Description] = dataclasses.field(default_factory=dict)


class Network(nnx.Module):
    """A network built plain. Subclasses say which layers can be re-parameterized."""

    @property
    @abc.abstractmethod
    def architecture(self) -> str:
        """What files of scales call it."""

    @abc.abstractmethod
    def layers(self) -> dict[str, LayerSpec]:
        """Path of each kernel that can be re-parameterized -> its place."""

    def branch_sets(self) -> dict[str, BranchSet]:
        """Path of each of these kernels -> the branches of its hyper-search."""
        search = self.descriptions("search")
        return {path: search[path](spec.geometry).branch_set() for path, spec in self.layers().items()}

    def descriptions(self, structure: str) -> dict[str, Description]:
        """Path of each of these kernels -> its description for a structure of `STRUCTURES`, or for
        "search"."""
        general = repopt if structure == "search" else STRUCTURES[structure]
        return {path: spec.structures.get(structure, general) for path, spec in self.layers().items()}

    def depths(self) -> dict[str, int]:
        """Path of each of these kernels -> its number in the published depth rule; empty where there is
        none."""
        return {path: spec.depth for path, spec in self.layers().items() if spec.depth is not None}

    def unit_scales(self) -> Scales:
        """Scales without a search: all ones."""
        return Scales.ones(self.branch_sets()).with_metadata(architecture=self.architecture)


class Classifier(Network):
    """Stages of blocks, global average pooling, and a dense layer.

    `__call__`: images (batch, height, width, in_channels) -> logits (batch, num_classes), float32 or wider.

    Args:
      variant: the row that it was made from; it says `architecture` and `layers(in_channels)`.
      stages: the blocks.
      width: channels of the last block.
      num_classes: size of the classifier.
      in_channels: of the images.
      features: layer from pooled maps (batch, 1, 1, width) to the features of the classifier, followed by a
        ReLU; None for none.
      dropout: rate before the classifier, in training mode. Above 0 it needs `rngs` with a `dropout` (or a
        default) stream.
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
        if num_classes < 1:
            raise ValueError(f"`num_classes` is {num_classes}: a classifier needs one class at least")
        self.variant = variant
        self.in_channels = in_channels
        self.stages = nnx.List([nnx.List(blocks) for blocks in stages])
        self.features = nnx.data(features)
        self.dropout = nnx.data(nnx.Dropout(dropout, rngs=rngs) if dropout else None)
        width = width if features is None else features.out_features
        self.head = classifier(width, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.mean(run_stages(self.stages, x)[-1], axis=(1, 2), keepdims=True)
        if self.features is not None:
            x = nnx.relu(self.features(x))
        x = x.reshape(x.shape[0], -1)
        if self.dropout is not None:
            x = self.dropout(x)
        return self.head(x).astype(jnp.promote_types(x.dtype, jnp.float32))

    @property
    def architecture(self) -> str:
        return self.variant.architecture

    def layers(self) -> dict[str, LayerSpec]:
        return self.variant.layers(self.in_channels)


def run_stages(stages: nnx.List, x: jax.Array) -> list[jax.Array]:
    """The map after each stage."""
    maps = []
    for stage in stages:
        for block in stage:
            x = block(x)
        maps.append(x)
    return maps
