"""Layers and the block that networks are made of."""

from repopt_jax.nn.block import ACTIVATIONS as ACTIVATIONS
from repopt_jax.nn.block import Block as Block
from repopt_jax.nn.block import SqueezeExcite as SqueezeExcite
from repopt_jax.nn.branched import Branched as Branched
from repopt_jax.nn.branched import FrozenScale as FrozenScale
from repopt_jax.nn.branched import StructuredLayer as StructuredLayer
from repopt_jax.nn.merged import Merged as Merged
