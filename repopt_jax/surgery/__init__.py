"""Structural changes of NNX models, each of which returns a new model."""

from repopt_jax.surgery.choose import Choice as Choice
from repopt_jax.surgery.choose import find_structures as find_structures
from repopt_jax.surgery.cpu import fast_on_cpu as fast_on_cpu
from repopt_jax.surgery.custom_l2 import custom_l2 as custom_l2
from repopt_jax.surgery.decay import weight_decay_mask as weight_decay_mask
from repopt_jax.surgery.fuse import fuse as fuse
from repopt_jax.surgery.layers import find_branches as find_branches
from repopt_jax.surgery.layers import find_layers as find_layers
from repopt_jax.surgery.prepare import Mode as Mode
from repopt_jax.surgery.prepare import prepare as prepare
from repopt_jax.surgery.reinitialize import reinitialize as reinitialize
from repopt_jax.surgery.search import csla_twin as csla_twin
from repopt_jax.surgery.search import depth_scales as depth_scales
from repopt_jax.surgery.search import extract_scales as extract_scales
from repopt_jax.surgery.search import to_search as to_search
from repopt_jax.surgery.searchtree import SearchTree as SearchTree
from repopt_jax.surgery.searchtree import search_tree as search_tree
from repopt_jax.surgery.structures import find_parametrizations as find_parametrizations
from repopt_jax.surgery.structures import to_repvgg as to_repvgg
from repopt_jax.surgery.structures import to_structure as to_structure
from repopt_jax.surgery.trained import branches_of as branches_of
