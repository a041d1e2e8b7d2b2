"""Any Optax optimizer, exactly, with the branch tensors in the optimizer's state.

The plain network computes with the merged kernel K = sum_b s_b * E_b(w_b); the state holds the w_b. The inner
optimizer is given their gradients, dL/dw_b = E_b^T(s_b * g), and their values. Its updates dw_b move the w_b,
and K moves by dK = sum_b s_b * E_b(dw_b). The inner optimizer may normalise by layer, orthogonalise or factor
its moments; the forward and backward passes remain those of the plain network.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from repopt_jax.core import paths
from repopt_jax.core.scales import Scales, check_values, is_concrete
from repopt_jax.optim.sgd import require_gradients, state_vectors, visible_scales

# Largest relative difference between the merged `weights` and the kernels of the parameters. It allows for
# rounding to half precision and rejects other kernels.
KERNEL_TOLERANCE = 2e-2


class ReparameterizeState(NamedTuple):
    """State of `reparameterize`.

    Attributes:
      scales: path of a kernel -> branch -> (*stack, out) vector.
      weights: path of a kernel -> branch -> w_b, in the kernel's dtype; empty with `keep_weights=False`.
      inner: state of the inner optimizer, for a tree in which every such kernel is a dict of its branches; or
        `NoInner()`, with which the branches move by their gradients.
    """

    scales: dict[str, dict[str, jax.Array]]
    weights: dict[str, dict[str, jax.Array]]
    inner: Any


class NoInner(NamedTuple):
    """Takes the place of the inner optimizer's state so that `update` skips the inner optimizer.

    `check_optimizer` uses it, because only transformations around `reparameterize` can be wrong.
    """


def reparameterize(
    inner: optax.GradientTransformation,
    scales: Scales,
    *,
    weights: Mapping[str, Mapping[str, jax.Array]] | None = None,
    keep_weights: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Trains a plain network as `inner` would train its multi-branch counterpart, for any Optax optimizer.

    `inner` is the whole optimizer, weight decay, clipping and learning rate included::

        tx = reparameterize(optax.adafactor(1e-3), scales)
        model, weights = reinitialize(model, scales, rngs=rngs, return_weights=True)
        tx = reparameterize(optax.lamb(1e-3), scales, weights=weights)

    `inner` sees a tree of plain nested dicts, one level for each part of a path, in which a kernel that
    `scales` name is a dict of its branches (`stages/1/0/conv/kernel/1x1`). Masks and labels of `inner` refer
    to these paths. The branch tensors of stacked layers remain stacked, as in a multi-branch network with
    stacked layers: a rule that depends on a whole tensor (LAMB's ratio, a factored moment) treats the stack
    as one tensor.

    Cost: let n be the total size of the branch tensors, in a layer of 3x3 + 1x1 + identity about 1.11 times
    the size of the kernel. The state holds n numbers for the w_b, and for each moment that `inner` keeps n
    numbers instead of the kernel's size. The forward and backward passes cost no more. SGD, Adam and Lion do
    not need the branch tensors: use `repopt_sgd`, `repopt_adamw`, `repopt_lion`.

    Args:
      inner: the optimizer. Extra arguments of `update` are passed on to it.
      scales: the scales.
      weights: path -> branch -> w_b, as `reinitialize(..., return_weights=True)` gives them with the model. A
        merged kernel does not determine its branches; if they are not given, `init` takes those of least
        norm. This makes a difference only for rules that depend on the weights, such as LAMB's ratio, but not
        for decoupled decay. The transformation keeps references to these arrays.
      keep_weights: False leaves the branch tensors out of the state, for an `inner` that depends only on
        gradients, such as `optax.scale_by_adam()` with decay outside; it is then given no parameters.

    Raises:
      ValueError: scales that are NaN, infinite or all zero in a layer; at `init`, scales or weights that do
        not fit the parameters, or weights whose merge is not the kernel; at `update`, gradients that lack a
        kernel, or no `params` although `inner` needs them.
    """
    check_values(scales)
    if weights is not None and not keep_weights:
        raise ValueError("`weights` are given and `keep_weights` is False: they would not be used")
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        visible = visible_scales(scales, params)
        leaves, _ = paths.named_leaves(params)
        vectors = state_vectors(scales, params)
        split = {}
        for path, branches in visible.branch_sets.items():
            leaf = leaves[path]
            if not keep_weights:
                split[path] = _branch_gradients(branches, jnp.zeros_like(leaf), vectors[path])
            elif weights is None:
                split[path] = branches.split(leaf, vectors[path])
            else:
                given = {n: jnp.array(w, leaf.dtype) for n, w in weights.get(path, {}).items()}
                split[path] = _sharded_as_splits(given, branches, leaf, vectors[path])
        if weights is not None:
            _check_weights(visible, split, leaves)
        state = inner.init(paths.nested(leaves | split))
        return ReparameterizeState(vectors, split if keep_weights else {}, state)

    def update_fn(updates, state, params=None, **extra_args):
        require_gradients(updates, state.scales)
        branch_sets = scales.branch_sets
        gradients, _ = paths.named_leaves(updates)
        branch_gradients = {
            path: _branch_gradients(branch_sets[path], gradients[path], vectors)
            for path, vectors in state.scales.items()
        }
        moves, inner_state = paths.nested(gradients | branch_gradients), state.inner
        if not isinstance(inner_state, NoInner):
            inner_params = None
            if params is not None and keep_weights:
                inner_params = paths.nested(paths.named_leaves(params)[0] | state.weights)
            moves, inner_state = inner.update(moves, inner_state, inner_params, **extra_args)

        weights = {}
        for path in state.weights:
            weights[path] = optax.apply_updates(state.weights[path], paths.at(moves, path))

        def merged_move(path, g):
            if path not in state.scales:
                return paths.at(moves, path)
            wide = jnp.promote_types(g.dtype, jnp.float32)
            branch_moves = paths.at(moves, path)
            move = branch_sets[path].merge(_cast(branch_moves, wide), _cast(state.scales[path], wide))
            # In the inner optimizer's dtype, which may be wider than g's, because the w_b have moved in it.
            return move.astype(jnp.result_type(*branch_moves.values()))

        return (
            paths.map_named(merged_move, updates),
            ReparameterizeState(state.scales, weights, inner_state),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _branch_gradients(branches, g, vectors):
    """Returns E_b^T(s_b * g) in g's dtype, summed in float32 or wider."""
    wide = jnp.promote_types(g.dtype, jnp.float32)
    return _cast(branches.branch_gradients(g.astype(wide), _cast(vectors, wide)), g.dtype)


def _sharded_as_splits(given, branches, leaf, vectors):
    """Shards the given branch tensors as those that are split from the sharded kernel."""
    if not (is_concrete(leaf) and isinstance(getattr(leaf, "sharding", None), jax.NamedSharding)):
        return given
    shardings = {name: w.sharding for name, w in branches.split(leaf, vectors).items()}
    return {name: jax.device_put(w, shardings.get(name)) for name, w in given.items()}


def _check_weights(scales: Scales, weights, leaves) -> None:
    expected = {
        f"{path}/{name}": shape
        for path, branches in scales.branch_sets.items()
        for name, shape in branches.shapes().items()
    }
    found = {f"{path}/{name}": w.shape for path, ws in weights.items() for name, w in ws.items()}
    if difference := paths.describe_difference(expected, found, noun="branch tensors"):
        raise ValueError(f"`weights` do not fit the scales: {difference}")
    wrong = []
    for path, entry in scales.entries.items():
        kernel = entry.branches.merge(weights[path], entry.vectors)
        if is_concrete(kernel) and is_concrete(leaves[path]):
            k = np.asarray(leaves[path], np.float64)
            if not np.abs(np.asarray(kernel, np.float64) - k).max() <= KERNEL_TOLERANCE * np.abs(k).max():
                wrong.append(path)
    if wrong:
        raise ValueError(
            f"`weights` merge into other kernels than those of the parameters at {', '.join(wrong)}: give "
            "the weights that `reinitialize` returned with this very model"
        )


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), tree)
