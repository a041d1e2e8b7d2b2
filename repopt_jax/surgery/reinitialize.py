"""The rule of initialization: kernels drawn as the sum of their branches.

Source: "Re-parameterizing Your Optimizers rather than Architectures" (ICLR 2023), section 3.2.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from repopt_jax.core import paths
from repopt_jax.core.branches import BranchSet
from repopt_jax.core.scales import Scales, check_finite, check_fit, is_concrete
from repopt_jax.surgery.layers import check_aliases
from repopt_jax.surgery.modules import copy_leaf, join, named_modules
from repopt_jax.surgery.structures import key_of

M = TypeVar("M")
Weights = dict[str, dict[str, jax.Array]]


@overload
def reinitialize(
    model: M,
    scales: Scales,
    *,
    rngs: nnx.Rngs,
    branch_sets: Mapping[str, BranchSet] | None = None,
    allow_trained: bool = False,
    return_weights: Literal[False] = False,
) -> M: ...


@overload
def reinitialize(
    model: M,
    scales: Scales,
    *,
    rngs: nnx.Rngs,
    branch_sets: Mapping[str, BranchSet] | None = None,
    allow_trained: bool = False,
    return_weights: Literal[True],
) -> tuple[M, Weights]: ...


def reinitialize(
    model: Any,
    scales: Scales,
    *,
    rngs: nnx.Rngs,
    branch_sets: Mapping[str, BranchSet] | None = None,
    allow_trained: bool = False,
    return_weights: bool = False,
) -> Any:
    """Redraws every kernel that `scales` name as K = sum_b s_b * E_b(w_b): the rule of initialization.

    Each w_b is drawn as its branch's own layer would be; the identity's weight is the searched u.

    Args:
      model: an NNX model, or any pytree of parameters (Linen, Equinox, plain dicts).
      scales: the scales; every one of their paths must be in the model.
      branch_sets: the layers and branches that the scales must have exactly, as returned by `find_branches`;
        by default those that the model declares in its `branch_sets()`. If a model declares none, the scales
        may cover any part of it.
      rngs: `nnx.Rngs` with the stream `params`. Each path has its own key, so adding a layer does not change
        how others are drawn.
      allow_trained: whether to redraw even if the running statistics of a batch norm show that the model has
        been trained. (This cannot be detected without batch norms.)
      return_weights: whether to return the branch tensors w_b as well, path -> branch -> array, which
        `reparameterize` keeps.

    Returns:
      A new model (or tree), the given one being unchanged; or a pair of it and the branch tensors.

    Raises:
      ValueError: the scales do not fit (every missing, extra or misshapen path); they name a shared layer by
        another path than its own; they are NaN or infinite; or the model has been trained.
    """
    check_finite(scales)
    if isinstance(model, nnx.Module):
        check_aliases(model, scales.entries)
    if branch_sets is None:
        check_fit(scales, model)
    else:
        check_fit(scales, branch_sets)
        check_fit(scales, arrays_of(model))
    if isinstance(model, nnx.Module) and not allow_trained:
        _check_fresh(model)
    weights = sample_weights(scales, rngs.params())
    fresh = with_kernels(model, merge_weights(scales, weights))
    return (fresh, weights) if return_weights else fresh


def sample_weights(scales: Scales, key: jax.Array, *, dtype: Any = jnp.float32) -> Weights:
    """Draws the branch tensors w_b of every layer of `scales`: path -> branch -> array."""
    weights = {}
    for path, entry in scales.entries.items():
        drawn = entry.branches.sample(key_of(path, key), dtype=dtype)
        searched = {b.name: entry.vectors[b.name] for b in entry.branches.branches if not b.has_scale}
        weights[path] = drawn | {name: u.astype(dtype) for name, u in searched.items()}
    return weights


def merge_weights(scales: Scales, weights: Mapping[str, Mapping[str, jax.Array]]) -> dict[str, jax.Array]:
    """Merges K = sum_b s_b * E_b(w_b) for every layer: path -> merged kernel."""
    return {
        path: entry.branches.merge(weights[path], entry.vectors) for path, entry in scales.entries.items()
    }


def with_kernels(model: Any, kernels: Mapping[str, jax.Array]) -> Any:
    """Returns a copy of an NNX model or a pytree with these kernels by path, cast to the leaves' dtypes.

    Raises:
      ValueError: paths that the model lacks. (A search network or one with branches has no merged kernels.)
    """
    graph, tree = nnx.split(model) if isinstance(model, nnx.Module) else (None, model)
    names, _ = paths.named_leaves(tree)
    if missing := [path for path in kernels if path not in names]:
        raise ValueError(
            f"the model has no kernels at {', '.join(missing)}: only a plain network, not one that was "
            "made by `to_search` or `to_structure`, has merged kernels"
        )
    tree = paths.map_named(
        lambda path, leaf: kernels[path].astype(leaf.dtype) if path in kernels else copy_leaf(leaf), tree
    )
    return tree if graph is None else nnx.merge(graph, tree, copy=True)


def _check_fresh(model: nnx.Module) -> None:
    """Raises ValueError if a batch norm's running statistics show that the model has been trained.

    They move at the first training step.
    """
    trained = []
    for path, module in named_modules(model):
        if isinstance(module, nnx.BatchNorm):
            for name, start in (("mean", 0.0), ("var", 1.0)):
                value = getattr(module, name)[...]
                if is_concrete(value) and not np.all(np.asarray(value) == start):
                    trained.append(join(path, name))
    if trained:
        raise ValueError(
            f"the model has been trained (batch statistics {paths.listed(trained)} have moved) and "
            "re-initialising would discard its kernels: give a fresh model, or allow_trained=True"
        )


def arrays_of(model: Any) -> Any:
    """Returns the state of an NNX model, or the given tree."""
    return nnx.state(model) if isinstance(model, nnx.Module) else model
