"""The rule of initialization: kernels drawn as the sum of their branches.

Source: "Re-parameterizing Your Optimizers rather than Architectures" (ICLR 2023), section 3.2.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, overload

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax.core import paths
from repopt_jax.core.branches import BranchSet
from repopt_jax.core.parametrization import Parametrization, Theta, check_kernels
from repopt_jax.core.scales import Scales, check_finite, check_fit, check_scales
from repopt_jax.nn.rngs import check_rngs
from repopt_jax.surgery.layers import check_aliases
from repopt_jax.surgery.modules import copy_leaf, is_abstract, key_of
from repopt_jax.surgery.trained import Keep, branches_of, check_keep, kept_branches, require_untrained

M = TypeVar("M")
Weights = dict[str, dict[str, jax.Array]]


@overload
def reinitialize(
    model: M,
    scales: Scales | Mapping[str, Parametrization],
    *,
    rngs: nnx.Rngs,
    branch_sets: Mapping[str, BranchSet] | None = None,
    trained: bool | None = None,
    allow_trained: bool = False,
    keep: Keep = None,
    return_weights: Literal[False] = False,
) -> M: ...


@overload
def reinitialize(
    model: M,
    scales: Scales,
    *,
    rngs: nnx.Rngs,
    branch_sets: Mapping[str, BranchSet] | None = None,
    trained: bool | None = None,
    allow_trained: bool = False,
    keep: Keep = None,
    return_weights: Literal[True],
) -> tuple[M, Weights]: ...


@overload
def reinitialize(
    model: M,
    scales: Mapping[str, Parametrization],
    *,
    rngs: nnx.Rngs,
    branch_sets: None = None,
    trained: bool | None = None,
    allow_trained: bool = False,
    keep: Keep = None,
    return_weights: Literal[True],
) -> tuple[M, dict[str, Theta]]: ...


def reinitialize(
    model: Any,
    scales: Scales | Mapping[str, Parametrization],
    *,
    rngs: nnx.Rngs,
    branch_sets: Mapping[str, BranchSet] | None = None,
    trained: bool | None = None,
    allow_trained: bool = False,
    keep: Keep = None,
    return_weights: bool = False,
) -> Any:
    """Redraws every kernel that `scales` name as K = sum_b s_b * E_b(w_b): the rule of initialization.

    Each w_b is drawn as its branch's own layer would be; the identity's weight is the searched u.

    Args:
      model: an NNX model, or any pytree of parameters (Linen, Equinox, plain dicts). Of an abstract one
        (`nnx.eval_shape`, `jax.eval_shape`) the result is abstract.
      scales: the scales; every one of their paths must be in the model. Or structures by the kernels' paths
        (`find_parametrizations`), whose kernels become A(theta) for a theta that is drawn.
      branch_sets: the layers and branches that the scales must have exactly, as returned by `find_branches`;
        by default those that the model declares in its `branch_sets()`. If a model declares none, the scales
        may cover any part of it.
      rngs: `nnx.Rngs` with the stream `params`. Each path has its own key, so adding a layer does not change
        how others are drawn.
      trained: whether the model has been trained; None to look at its batch norms, or without any at its
        biases.
      allow_trained: whether to discard the kernels of a model that has been trained, or of which that cannot
        be told.
      keep: "split" keeps all kernels as they are. What is returned as weights then merges into them
        (`branches_of`): branches of least norm or, of structures in which a chain is a product of tensors
        (OREPA), nearest to a fresh draw.
      return_weights: whether to return the branch tensors w_b as well, path -> branch -> array (for
        structures path -> theta), which `reparameterize` keeps. They have the widest dtype of the kernels,
        and at least float32.

    Returns:
      A new model (or tree), the given one being unchanged; or a pair of it and the branch tensors.

    Raises:
      ValueError: the scales do not fit (every missing, extra or misshapen path); they name a shared layer by
        another path than its own; they are NaN or infinite; the model has been trained, or may have been; or
        its kernels are to be kept and the branches cannot express them, with every path.
    """
    check_rngs(rngs)
    check_keep(keep, allow_trained)
    if is_abstract(model):
        given: dict[str, Any] = {
            "branch_sets": branch_sets,
            "trained": False,
            "return_weights": return_weights,
        }
        return nnx.eval_shape(lambda m: reinitialize(m, scales, **given, rngs=nnx.Rngs(0)), model)
    if not isinstance(scales, Mapping) or not all(
        isinstance(one, Parametrization) for one in scales.values()
    ):
        check_scales(scales)
    if isinstance(model, nnx.Module):
        check_aliases(model, scales.entries if isinstance(scales, Scales) else scales)
    if isinstance(scales, Scales):
        check_finite(scales)
        check_fit(scales, model if branch_sets is None else branch_sets)
        if branch_sets is not None:
            check_fit(scales, arrays_of(model))
    else:
        check_kernels(scales, paths.named_leaves(arrays_of(model))[0])
        if branch_sets is not None:
            raise ValueError("`branch_sets` are given with structures, which have their own: leave them out")
    lost = "re-initialising would discard its kernels"
    require_untrained(model, trained=trained, allow_trained=allow_trained, keep=keep, lost=lost)
    if keep == "split":
        if isinstance(scales, Scales):
            weights = branches_of(model, scales)
        else:
            weights = kept_branches(model, scales, rngs=rngs)
        fresh = with_kernels(model, {})
    elif isinstance(scales, Scales):
        weights = sample_weights(scales, rngs.params(), dtype=_widest_dtype(model, scales.entries))
        fresh = with_kernels(model, merge_weights(scales, weights))
    else:
        key, dtype = rngs.params(), _widest_dtype(model, scales)
        weights = {path: one.sample(key_of(path, key), dtype=dtype) for path, one in scales.items()}
        fresh = with_kernels(model, {path: scales[path].merge(theta) for path, theta in weights.items()})
    return (fresh, weights) if return_weights else fresh


def sample_weights(scales: Scales, key: jax.Array, *, dtype: Any = jnp.float32) -> Weights:
    """Draws the branch tensors w_b of every layer of `scales`: path -> branch -> array."""
    weights = {}
    for path, entry in scales.entries.items():
        drawn = entry.branches.sample(key_of(path, key), dtype=dtype)
        searched = {b.name: entry.vectors[b.name] for b in entry.branches.branches if not b.has_scale}
        weights[path] = drawn | {name: u.astype(dtype) for name, u in searched.items()}
    return weights


def _widest_dtype(model: Any, kernels: Iterable[str]) -> Any:
    """Returns the dtype in which branches of these kernels are drawn: theirs, and at least float32."""
    leaves, _ = paths.named_leaves(arrays_of(model))
    dtypes = (jax.dtypes.canonicalize_dtype(leaves[path].dtype) for path in kernels)
    return functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))


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


def arrays_of(model: Any) -> Any:
    """Returns the state of an NNX model, or the given tree."""
    return nnx.state(model) if isinstance(model, nnx.Module) else model
