"""Layers and blocks."""

from repopt_jax.nn.blocks import ACTIVATIONS as ACTIVATIONS
from repopt_jax.nn.blocks import Activated as Activated
from repopt_jax.nn.blocks import ConvNorm as ConvNorm
from repopt_jax.nn.blocks import FusedBlock as FusedBlock
from repopt_jax.nn.blocks import PlainBlock as PlainBlock
from repopt_jax.nn.blocks import RepVGGBlock as RepVGGBlock
from repopt_jax.nn.blocks import SqueezeExcite as SqueezeExcite
from repopt_jax.nn.csla import CSLAConv as CSLAConv
from repopt_jax.nn.csla import FrozenScale as FrozenScale
from repopt_jax.nn.ghost import GhostBottleneck as GhostBottleneck
from repopt_jax.nn.ghost import GhostModule as GhostModule
from repopt_jax.nn.ghost import RepGhostConv as RepGhostConv
from repopt_jax.nn.mobileone import MobileOneBlock as MobileOneBlock
from repopt_jax.nn.normed import NormedBranches as NormedBranches
from repopt_jax.nn.normed import PassThrough as PassThrough
