"""Layers and the block that networks are made of."""

from repopt_jax.nn.block import ACTIVATIONS as ACTIVATIONS
from repopt_jax.nn.block import Block as Block
from repopt_jax.nn.block import ChannelAffine as ChannelAffine
from repopt_jax.nn.block import PooledBlock as PooledBlock
from repopt_jax.nn.block import PreNorm as PreNorm
from repopt_jax.nn.block import SharedNorm as SharedNorm
from repopt_jax.nn.block import SqueezeExcite as SqueezeExcite
from repopt_jax.nn.branched import Branched as Branched
from repopt_jax.nn.branched import FrozenScale as FrozenScale
from repopt_jax.nn.branched import StructuredLayer as StructuredLayer
from repopt_jax.nn.compactor import Compacted as Compacted
from repopt_jax.nn.compactor import Compactor as Compactor
from repopt_jax.nn.convolution import conv_general_dilated as conv_general_dilated
from repopt_jax.nn.convolution import product_of_tiles as product_of_tiles
from repopt_jax.nn.convolution import xla_convolutions as xla_convolutions
from repopt_jax.nn.merged import Merged as Merged
from repopt_jax.nn.merged import MergedGeneral as MergedGeneral
