"""Gradient and structural re-parameterization for JAX.

The names and the subpackages are imported when they are first used (PEP 562): `import repopt_jax` does not
import JAX, and a program that uses `repopt_jax.optim` does not import Flax. What needs a package of an extra
that is not installed says so then, with the command that installs it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from repopt_jax._version import __version__ as __version__

if TYPE_CHECKING:  # what type checkers and editors see; `_NAMES` and `_SUBPACKAGES` say the same
    from repopt_jax import bench as bench
    from repopt_jax import core as core
    from repopt_jax import data as data
    from repopt_jax import deploy as deploy
    from repopt_jax import detection as detection
    from repopt_jax import export as export
    from repopt_jax import interop as interop
    from repopt_jax import models as models
    from repopt_jax import nn as nn
    from repopt_jax import optim as optim
    from repopt_jax import quantize as quantize
    from repopt_jax import report as report
    from repopt_jax import surgery as surgery
    from repopt_jax import train as train
    from repopt_jax import verify as verify
    from repopt_jax.core import AfterPointwise as AfterPointwise
    from repopt_jax.core import Average as Average
    from repopt_jax.core import Branch as Branch
    from repopt_jax.core import BranchSet as BranchSet
    from repopt_jax.core import Geometry as Geometry
    from repopt_jax.core import Identity as Identity
    from repopt_jax.core import Kernel as Kernel
    from repopt_jax.core import Local as Local
    from repopt_jax.core import Parametrization as Parametrization
    from repopt_jax.core import Pool as Pool
    from repopt_jax.core import Scales as Scales
    from repopt_jax.core import Stage as Stage
    from repopt_jax.core import Structure as Structure
    from repopt_jax.core import default_branches as default_branches
    from repopt_jax.core import load_scales as load_scales
    from repopt_jax.core import paths as paths
    from repopt_jax.core import save_scales as save_scales
    from repopt_jax.core import trace_layers as trace_layers
    from repopt_jax.optim import check_optimizer as check_optimizer
    from repopt_jax.optim import clip_by_repopt_global_norm as clip_by_repopt_global_norm
    from repopt_jax.optim import decay_mask as decay_mask
    from repopt_jax.optim import gradient_multipliers as gradient_multipliers
    from repopt_jax.optim import reparameterize as reparameterize
    from repopt_jax.optim import repopt_adamw as repopt_adamw
    from repopt_jax.optim import repopt_lion as repopt_lion
    from repopt_jax.optim import repopt_mask as repopt_mask
    from repopt_jax.optim import repopt_sgd as repopt_sgd
    from repopt_jax.optim import repopt_sign_mask as repopt_sign_mask
    from repopt_jax.optim import resrep_masks as resrep_masks
    from repopt_jax.optim import scale_by_repopt_adam as scale_by_repopt_adam
    from repopt_jax.optim import scale_by_resrep as scale_by_resrep
    from repopt_jax.surgery import Mode as Mode
    from repopt_jax.surgery import SearchTree as SearchTree
    from repopt_jax.surgery import branches_of as branches_of
    from repopt_jax.surgery import count_macs as count_macs
    from repopt_jax.surgery import depth_scales as depth_scales
    from repopt_jax.surgery import extract_scales as extract_scales
    from repopt_jax.surgery import fast_on_cpu as fast_on_cpu
    from repopt_jax.surgery import find_branches as find_branches
    from repopt_jax.surgery import find_layers as find_layers
    from repopt_jax.surgery import find_parametrizations as find_parametrizations
    from repopt_jax.surgery import find_structures as find_structures
    from repopt_jax.surgery import fuse as fuse
    from repopt_jax.surgery import law_scales as law_scales
    from repopt_jax.surgery import plan_pruning as plan_pruning
    from repopt_jax.surgery import prepare as prepare
    from repopt_jax.surgery import reinitialize as reinitialize
    from repopt_jax.surgery import search_tree as search_tree
    from repopt_jax.surgery import shrink as shrink
    from repopt_jax.surgery import to_repvgg as to_repvgg
    from repopt_jax.surgery import to_resrep as to_resrep
    from repopt_jax.surgery import to_search as to_search
    from repopt_jax.surgery import to_structure as to_structure
    from repopt_jax.surgery import transfer_scales as transfer_scales
    from repopt_jax.surgery import weight_decay_mask as weight_decay_mask
    from repopt_jax.verify import verify_equivalence as verify_equivalence

_SUBPACKAGES = (
    *("bench", "core", "data", "deploy", "detection", "export", "interop", "models", "nn", "optim"),
    *("quantize", "report", "surgery", "train", "verify"),
)

# Subpackage -> the names of it that are also names of the package.
_NAMES = {
    "core": (
        *("AfterPointwise", "Average", "Branch", "BranchSet", "Geometry", "Identity", "Kernel"),
        *("Local", "Parametrization", "Pool", "Scales", "Stage", "Structure", "default_branches"),
        *("load_scales", "paths", "save_scales", "trace_layers"),
    ),
    "optim": (
        *("check_optimizer", "clip_by_repopt_global_norm", "decay_mask", "gradient_multipliers"),
        "reparameterize",
        *("repopt_adamw", "repopt_lion", "repopt_mask", "repopt_sgd", "repopt_sign_mask"),
        *("resrep_masks", "scale_by_repopt_adam", "scale_by_resrep"),
    ),
    "surgery": (
        *("Mode", "SearchTree", "branches_of", "count_macs", "depth_scales", "extract_scales"),
        *("fast_on_cpu", "find_branches", "find_layers", "find_parametrizations", "find_structures"),
        *("fuse", "law_scales", "plan_pruning", "prepare", "reinitialize", "search_tree", "shrink"),
        *("to_repvgg", "to_resrep", "to_search", "to_structure", "transfer_scales", "weight_decay_mask"),
    ),
    "verify": ("verify_equivalence",),
}

_HOME = {name: subpackage for subpackage, names in _NAMES.items() for name in names}

__all__ = sorted({*_SUBPACKAGES, *_HOME})  # pyright: ignore[reportUnsupportedDunderAll]

if not TYPE_CHECKING:  # a type checker that saw it would accept every name

    def __getattr__(name: str) -> Any:
        if name in _SUBPACKAGES:
            return importlib.import_module(f"{__name__}.{name}")
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value  # the next use finds it without this function
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBPACKAGES, *_HOME})
