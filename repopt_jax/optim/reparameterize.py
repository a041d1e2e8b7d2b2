"""Any Optax optimizer, exactly, with the branch tensors in the optimizer's state.

The plain network computes with the merged kernel K = sum_b s_b * E_b(w_b); the state holds the w_b. The inner
optimizer is given their gradients, dL/dw_b = E_b^T(s_b * g), and their values. Its updates dw_b move the w_b,
and K moves by dK = sum_b s_b * E_b(dw_b). The inner optimizer may normalise by layer, orthogonalise or factor
its moments; the forward and backward passes remain those of the plain network.

With trainable scales, or branches that are products of tensors, K = A(theta) is not linear. The state then
holds theta, the inner optimizer is given A'(theta)^T g, and the kernel moves by A(theta_new) - K. No search
is needed: the structure is trained on the target itself, as OREPA does in the network (arXiv 2204.00826).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from repopt_jax.arguments import check_transformation
from repopt_jax.core import paths
from repopt_jax.core.parametrization import (
    Parametrization,
    Theta,
    check_kernels,
    check_structures,
    other_kernels,
    parametrizations,
    scale_vectors,
    theta_of,
)
from repopt_jax.core.scales import Scales, check_values, is_concrete
from repopt_jax.optim.sgd import (
    hidden_paths,
    require_gradients,
    state_vectors,
    visible_scales,
)

# Largest relative difference between the merged `weights` and the kernels of the parameters. It allows for
# rounding to half precision and rejects other kernels.
KERNEL_TOLERANCE = 2e-2


class OtherKernelsError(ValueError):
    """The `weights` of `reparameterize` merge into other kernels than those of the parameters."""


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


class TrainedStructureState(NamedTuple):
    """State of `reparameterize` with trainable scales.

    Attributes:
      theta: path of a kernel -> {"weights": {stage: tensor}, "scales": {stage: factor}}, in the kernel's
        dtype or float32, whichever is wider.
      inner: state of the inner optimizer, for a tree in which theta takes the place of every such kernel.
    """

    theta: dict[str, Theta]
    inner: Any


def reparameterize(
    inner: optax.GradientTransformation,
    scales: Scales | Mapping[str, Parametrization],
    *,
    weights: Mapping[str, Any] | None = None,
    keep_weights: bool = True,
    trainable_scales: bool = False,
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

    With `trainable_scales=True` the scales are trained with the weights, and `scales` are their initial
    values; or instead of scales, any structures without batch norms inside (`find_parametrizations`)::

        structures = find_parametrizations(model, "orepa")
        model, theta = reinitialize(model, structures, rngs=rngs, return_weights=True)
        inner = optax.adamw(1e-3, mask=decay_mask(structures))
        tx = reparameterize(inner, structures, weights=theta, trainable_scales=True)

    `inner` then sees `stages/1/0/conv/kernel/weights/1x1` and `stages/1/0/conv/kernel/scales/1x1`;
    `decay_mask` decays what the structure decays. This is the same training as that of a network of
    `nn.Merged` layers (mode "online" of `prepare`). `update` needs the parameters, and every step moves each
    kernel to A(theta) whatever else has changed it, so that nothing may follow in the chain. The state holds
    theta, so that it goes into checkpoints with the parameters and is loaded into
    `jax.eval_shape(tx.init, params)`: with parameters that have been trained `init` itself refuses the
    `weights` of the start. Of a kernel that is sharded, arrays of theta are sharded along the axes that are
    as long as the kernel's.

    Cost: let n be the total size of the branch tensors, in a layer of 3x3 + 1x1 + identity about 1.11 times
    the size of the kernel. The state holds n numbers for the w_b, and for each moment that `inner` keeps n
    numbers instead of the kernel's size. The forward and backward passes cost no more. SGD, Adam and Lion do
    not need the branch tensors: use `repopt_sgd`, `repopt_adamw`, `repopt_lion`.

    Args:
      inner: the optimizer. Extra arguments of `update` are passed on to it.
      scales: the scales or, with `trainable_scales`, structures by the kernels' paths.
      weights: path -> branch -> w_b, as `reinitialize(..., return_weights=True)` gives them with the model;
        for structures path -> theta. A merged kernel does not determine its branches; if they are not given,
        `init` takes those of least norm. With constant scales this makes a difference only for rules that
        depend on the weights, such as LAMB's ratio, but not for decoupled decay. The transformation keeps
        references to these arrays.
      keep_weights: False leaves the branch tensors out of the state, for an `inner` that depends only on
        gradients, such as `optax.scale_by_adam()` with decay outside; it is then given no parameters.
      trainable_scales: whether the scales are trained.

    Raises:
      ValueError: scales that are NaN, infinite or all zero in a layer; at `init`, scales or weights that do
        not fit the parameters, or weights whose merge is not the kernel; at `update`, gradients that lack a
        kernel, or no `params` although `inner` needs them.
      TypeError: structures without `trainable_scales`.
    """
    check_transformation("inner", inner)
    if not keep_weights and (weights is not None or trainable_scales):
        unused = "`weights` are given" if weights is not None else "`trainable_scales` is True"
        raise ValueError(f"{unused} and `keep_weights` is False: the branch tensors would not be used")
    if trainable_scales:
        check_structures("scales", scales)
        return _with_trained_scales(inner, scales, weights)
    if not isinstance(scales, Scales):
        raise TypeError(
            f"`scales` is a {type(scales).__name__}: it must be a `Scales`, or with trainable_scales=True a "
            "mapping of the kernels' paths to structures (`find_parametrizations`)"
        )
    check_values(scales)
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


def _with_trained_scales(
    inner: optax.GradientTransformation,
    scales: Scales | Mapping[str, Parametrization],
    given: Mapping[str, Any] | None,
) -> optax.GradientTransformationExtraArgs:
    """Does the work of `reparameterize` for kernels K = A(theta)."""
    if isinstance(scales, Scales):
        check_values(scales)
        given = None if given is None else theta_of(scales, given)
    structures = parametrizations(scales) if isinstance(scales, Scales) else dict(scales)
    initial = scale_vectors(scales) if isinstance(scales, Scales) else {}
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        leaves, _ = paths.named_leaves(params)
        hidden = hidden_paths(structures, params)
        visible = {path: s for path, s in structures.items() if path not in hidden}
        check_kernels(visible, leaves)
        theta = {}
        for path, structure in visible.items():
            kernel = leaves[path]
            kernel = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
            if given is None:
                theta[path] = structure.split(kernel, scales=initial.get(path))
            else:
                copies = jax.tree.map(lambda x, k=kernel: jnp.array(x, k.dtype), dict(given.get(path, {})))
                theta[path] = _sharded_as_kernel(copies, structure, leaves[path])
        _check_theta(visible, theta, leaves)
        return TrainedStructureState(theta, inner.init(paths.nested(leaves | theta)))

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "`params` are missing: with trainable scales the kernels move to A(theta), so `update` needs "
                "the parameters, `tx.update(gradients, state, params)`"
            )
        require_gradients(updates, state.theta)
        gradients, _ = paths.named_leaves(updates)
        leaves, _ = paths.named_leaves(params)
        of_theta = {p: structures[p].gradients(theta, gradients[p]) for p, theta in state.theta.items()}
        moves, inner_state = inner.update(
            paths.nested(gradients | of_theta),
            state.inner,
            paths.nested(leaves | state.theta),
            **extra_args,
        )
        theta: dict[str, Any] = {
            path: optax.apply_updates(old, paths.at(moves, path)) for path, old in state.theta.items()
        }

        def move(path, g):
            del g
            if path not in theta:
                return paths.at(moves, path)
            kernel = structures[path].merge(theta[path])
            return kernel - leaves[path].astype(kernel.dtype)

        return paths.map_named(move, updates), TrainedStructureState(theta, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def decay_mask(structures: Scales | Mapping[str, Parametrization], default: Any = None) -> Any:
    """Returns the weight-decay mask of an optimizer inside `reparameterize(..., trainable_scales=True)`.

        optax.adamw(1e-3, weight_decay=0.05, mask=decay_mask(structures))

    Tensors and scales are decayed as the stages of the structure say: kernels and the identity's vector are,
    scales are not, except OREPA's. So this is `weight_decay_mask` of the network of `nn.Merged` layers.

    Args:
      structures: those of `reparameterize`.
      default: a function from a tree of parameters to a tree of booleans, for all other parameters
        (`surgery.weight_decay_mask` of the plain network); by default arrays of more than one axis are
        decayed.
    """
    check_structures("structures", structures)
    known = parametrizations(structures) if isinstance(structures, Scales) else dict(structures)
    flat = {
        f"{path}/{inside}": decayed
        for path, one in known.items()
        for inside, decayed in one.structure.decayed().items()
    }

    def mask(params: Any) -> Any:
        leaves, _ = paths.named_leaves(params)
        others = {path: leaf for path, leaf in leaves.items() if path not in flat}
        if default is None:
            chosen = {path: leaf.ndim > 1 for path, leaf in others.items()}
        else:
            chosen, _ = paths.named_leaves(default(paths.nested(others)))
        return paths.map_named(lambda path, _: flat[path] if path in flat else chosen[path], params)

    return mask


def _check_theta(structures, theta, leaves) -> None:
    """Raises ValueError if theta has other shapes than the structures, or merges into other kernels."""
    expected, found = {}, {}
    for path, structure in structures.items():
        shapes = structure.shapes()
        expected |= {f"{path}/{kind}/{key}": s for kind in shapes for key, s in shapes[kind].items()}
        entries = {kind: theta[path].get(kind, {}) for kind in shapes}
        found |= {f"{path}/{kind}/{key}": w.shape for kind in shapes for key, w in entries[kind].items()}
    if difference := paths.describe_difference(expected, found, noun="arrays"):
        raise ValueError(f"`weights` do not fit the structures: {difference}")
    _check_merged({path: (structure.merge, (theta[path],)) for path, structure in structures.items()}, leaves)


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


def _sharded_as_kernel(theta: Any, structure: Parametrization, leaf: Any) -> Any:
    """Shards each array of theta along the axes that are as long as the kernel's, as these are sharded.

    What has no such axis is replicated, and so is all of a kernel with several axes of inputs or outputs.
    """
    if not (is_concrete(leaf) and isinstance(getattr(leaf, "sharding", None), jax.NamedSharding)):
        return theta
    spec = (*leaf.sharding.spec, *[None] * (leaf.ndim - len(leaf.sharding.spec)))
    stack, one = spec[: len(structure.stack)], spec[len(structure.stack) :]
    if structure.layout == "oi...":
        one = (*one[2:], one[1], one[0])
    elif structure.layout != "...io":
        one = (None,) * len(structure.structure.layer.kernel)
    kernel = structure.structure.layer.kernel

    def put(x: jax.Array) -> jax.Array:
        axes = x.ndim - len(stack)  # those of a kernel, or the outputs alone
        own = zip(x.shape[len(stack) :], kernel[-axes:], one[-axes:])
        found = jax.P(*stack, *(axis if size == whole else None for size, whole, axis in own))
        return jax.device_put(x, jax.NamedSharding(leaf.sharding.mesh, found))

    return jax.tree.map(put, theta)


def _check_weights(scales: Scales, weights, leaves) -> None:
    expected = {
        f"{path}/{name}": shape
        for path, branches in scales.branch_sets.items()
        for name, shape in branches.shapes().items()
    }
    found = {f"{path}/{name}": w.shape for path, ws in weights.items() for name, w in ws.items()}
    if difference := paths.describe_difference(expected, found, noun="branch tensors"):
        raise ValueError(f"`weights` do not fit the scales: {difference}")
    _check_merged({p: (e.branches.merge, (weights[p], e.vectors)) for p, e in scales.entries.items()}, leaves)


def _check_merged(merges: Mapping[str, tuple[Any, tuple[Any, ...]]], leaves: Mapping[str, Any]) -> None:
    """Raises ValueError with the paths whose branches, (how they are merged, arrays), give other kernels."""
    if wrong := other_kernels(merges, leaves, KERNEL_TOLERANCE):
        raise OtherKernelsError(
            f"`weights` merge into other kernels than those of the parameters at {', '.join(wrong)}: give "
            "the weights that `reinitialize` returned with this very model"
        )


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), tree)
