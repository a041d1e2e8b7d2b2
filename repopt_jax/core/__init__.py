"""The method's algebra: kernel maps, branches, scales, and pytrees by path. Nothing here knows Flax."""

from repopt_jax.core.branches import AfterPointwise, Average, Branch, BranchSet, Identity, Kernel, Local, Pool
from repopt_jax.core.law import compare_with_law, search_lambda
from repopt_jax.core.parametrization import Parametrization
from repopt_jax.core.published import STRUCTURES, default_branches
from repopt_jax.core.scales import Scales, load_scales, save_scales
from repopt_jax.core.structure import Geometry, Stage, Structure
from repopt_jax.core.tracing import trace_layers

__all__ = [
    "STRUCTURES",
    "AfterPointwise",
    "Average",
    "Branch",
    "BranchSet",
    "Geometry",
    "Identity",
    "Kernel",
    "Local",
    "Parametrization",
    "Pool",
    "Scales",
    "Stage",
    "Structure",
    "compare_with_law",
    "default_branches",
    "load_scales",
    "save_scales",
    "search_lambda",
    "trace_layers",
]
