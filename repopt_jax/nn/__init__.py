"""Layers and blocks."""

from repopt_jax.nn.blocks import FusedBlock as FusedBlock
from repopt_jax.nn.blocks import PlainBlock as PlainBlock
from repopt_jax.nn.blocks import RepVGGBlock as RepVGGBlock
from repopt_jax.nn.blocks import SqueezeExcite as SqueezeExcite
from repopt_jax.nn.csla import CSLAConv as CSLAConv
from repopt_jax.nn.csla import FrozenScale as FrozenScale
