"""Structural changes of NNX models, each of which returns a new model."""

from repopt_jax import extras

extras.require("flax", by=__name__)

from repopt_jax.surgery.choose import Choice, find_structures
from repopt_jax.surgery.cpu import fast_on_cpu
from repopt_jax.surgery.custom_l2 import custom_l2
from repopt_jax.surgery.decay import weight_decay_mask
from repopt_jax.surgery.fuse import fuse, output_difference
from repopt_jax.surgery.layers import find_branches, find_layers
from repopt_jax.surgery.macs import count_macs
from repopt_jax.surgery.prepare import Mode, prepare
from repopt_jax.surgery.reinitialize import reinitialize
from repopt_jax.surgery.resrep import PruningPlan, kept_rows, plan_pruning, resized, shrink, to_resrep
from repopt_jax.surgery.search import (
    csla_twin,
    depth_scales,
    extract_scales,
    law_scales,
    to_search,
    transfer_scales,
)
from repopt_jax.surgery.searchtree import SearchTree, search_tree
from repopt_jax.surgery.structures import find_parametrizations, to_repvgg, to_structure
from repopt_jax.surgery.trained import branches_of

__all__ = [
    "Choice",
    "Mode",
    "PruningPlan",
    "SearchTree",
    "branches_of",
    "count_macs",
    "csla_twin",
    "custom_l2",
    "depth_scales",
    "extract_scales",
    "fast_on_cpu",
    "find_branches",
    "find_layers",
    "find_parametrizations",
    "find_structures",
    "fuse",
    "kept_rows",
    "law_scales",
    "output_difference",
    "plan_pruning",
    "prepare",
    "reinitialize",
    "resized",
    "search_tree",
    "shrink",
    "to_repvgg",
    "to_resrep",
    "to_search",
    "to_structure",
    "transfer_scales",
    "weight_decay_mask",
]
