"""Layers and the block that networks are made of."""

from repopt_jax import extras

extras.require("flax", by=__name__)

from repopt_jax.nn.block import (
    ACTIVATIONS,
    Block,
    ChannelAffine,
    PooledBlock,
    PreNorm,
    SharedNorm,
    SqueezeExcite,
)
from repopt_jax.nn.branched import Branched, FrozenScale, StructuredLayer
from repopt_jax.nn.compactor import Compacted, Compactor
from repopt_jax.nn.convolution import conv_general_dilated, product_of_tiles, xla_convolutions
from repopt_jax.nn.merged import Merged, MergedGeneral

__all__ = [
    "ACTIVATIONS",
    "Block",
    "Branched",
    "ChannelAffine",
    "Compacted",
    "Compactor",
    "FrozenScale",
    "Merged",
    "MergedGeneral",
    "PooledBlock",
    "PreNorm",
    "SharedNorm",
    "SqueezeExcite",
    "StructuredLayer",
    "conv_general_dilated",
    "product_of_tiles",
    "xla_convolutions",
]
