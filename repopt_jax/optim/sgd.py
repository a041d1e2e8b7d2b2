"""The rule of iteration for SGD: transforms gradients so that kernels move as the sum of their branches.

A step of SGD on the branches w_b moves K = sum_b s_b * E_b(w_b) by dK = -lr * P(g), with g = dL/dK and P as
in `core.branches`. Momentum, Nesterov's look-ahead and weight decay that is added after P are linear, so it
is enough to apply P to the incoming gradient. The gradient of the branches has the squared norm
sum_b |E_b^T(s_b * g)|^2 = <g, P(g)>; clipping must use that norm. Adam and sign rules are in `adaptive`, all
other optimizers in `reparameterize`.
Source: "Re-parameterizing Your Optimizers rather than Architectures" (ICLR 2023), section 3.2 and appendix A.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from repopt_jax.arguments import check_number
from repopt_jax.core import paths
from repopt_jax.core.scales import Scales, check_fit, check_values, is_concrete


class RepOptMaskState(NamedTuple):
    """State of `repopt_mask`.

    Attributes:
      scales: path of a kernel -> branch -> vector (*stack, out). The vectors are in the state so that they
        are checkpointed, sharded and resumed with everything else and never become constants of the compiled
        program. The multiplier itself is not stored.
    """

    scales: dict[str, dict[str, jax.Array]]


class RepOptClipState(NamedTuple):
    """State of `clip_by_repopt_global_norm`: the scale vectors, as in `RepOptMaskState`."""

    scales: dict[str, dict[str, jax.Array]]


def repopt_mask(scales: Scales, normalise: bool = False) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradient g of every kernel that `scales` name by P(g); other leaves pass unchanged.

    Exact for optimizers that are linear in the gradient: SGD, momentum, Nesterov, with or without decay. It
    must come before weight decay, momentum and the learning rate. To clip, put `clip_by_repopt_global_norm`
    before it; clipping by the ordinary norm breaks the equivalence. `check_optimizer` finds such mistakes::

        optax.chain(repopt_mask(scales), optax.add_decayed_weights(4e-5), optax.sgd(lr, 0.9, nesterov=True))

    Kernels of any origin will do, those of a trained network too: the branches of every split of K move it in
    the same way, so that none has to be found. `reinitialize` is for a training from scratch.

    Where every branch places coordinates, P(g) = m * g, and m is rebuilt inside the update from the scale
    vectors and iota comparisons, which the compiler fuses into the update. For other branch sets P is
    computed by transposition, which is exact as well. In kernels of stacked layers each layer has its own P.
    Leaves are found by path, in any pytree: plain dicts, `nnx.State`, Linen or Equinox parameters.

    With `normalise` each layer's P(g) is divided by c, the mean of m over the layer's kernel entries
    (`BranchSet.mean_multiplier`). The scales then only share out a layer's learning rate among its entries,
    and no longer set it. What it is equal to is the multi-branch network whose branches have the gradients
    divided by c, before decay and momentum:

        lr / c as the learning rate of the layer's branches, and decay * c as their decay: the decay of K
        is added behind the mask and is not divided, so that lr * decay stays what it was; or
        the ordinary optimizer as it is, on branches with the constant scales s_b / sqrt(c), the identity's
        being 1 / sqrt(c), and weights sqrt(c) times as large: the same kernels.

    Without decay it is a learning rate for each layer and nothing else. c is computed from the vectors of the
    state in each update; nothing is stored.

    Args:
      scales: those of a search, or without one `Scales.ones` or `Scales.depth_rule`.
      normalise: whether each layer's multiplier is divided by its mean.

    Raises:
      ValueError: scales that are NaN, infinite or all zero in a layer; at `init`, paths of `scales` that the
        parameters lack or that have another shape; at `update`, paths that the gradients lack. All are
        listed. Paths that `optax.masked` or `optax.partition` hide are skipped.
    """
    check_values(scales)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        require_gradients(updates, state.scales)
        branch_sets = scales.branch_sets

        def transform(path, g):
            if path not in state.scales:
                return g
            return branch_sets[path].precondition(g, state.scales[path], normalise=normalise)

        return paths.map_named(transform, updates), state

    def init_fn(params):
        return RepOptMaskState(state_vectors(scales, params))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def clip_by_repopt_global_norm(
    max_norm: jax.typing.ArrayLike, scales: Scales
) -> optax.GradientTransformationExtraArgs:
    """Clips by the global norm of the multi-branch network's gradient, which keeps the equivalence.

    g becomes g * min(1, max_norm / n), n = `repopt_global_norm(g, scales)`. It takes the plain gradient, so
    it comes first in the chain, before `repopt_mask` or `scale_by_repopt_adam`::

        optax.chain(clip_by_repopt_global_norm(5.0, scales), repopt_mask(scales), ...)

    In a layer with the identity, n includes the gradient of its weight u, because the multi-branch network
    clips by the norm of everything that it trains. With a normalised mask n is the same: the gradient is
    clipped before the mask divides it.

    Raises:
      ValueError: as `repopt_mask`; or `max_norm` is not above 0.
    """
    check_number("max_norm", max_norm, more_than=0)
    check_values(scales)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        require_gradients(updates, state.scales)
        norm = _global_norm(updates, scales, state.scales)
        factor = jnp.where(norm < max_norm, 1, max_norm / norm)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    def init_fn(params):
        return RepOptClipState(state_vectors(scales, params))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def repopt_global_norm(gradients: Any, scales: Scales) -> jax.Array:
    """Returns the norm of the multi-branch network's gradient, from the plain one, in float32 or wider.

    n^2 = sum <g, P(g)> over the kernels that `scales` name + sum |g|^2 over the other leaves.

    Raises:
      ValueError: the scales do not fit.
    """
    check_fit(scales, gradients)
    return _global_norm(gradients, scales, scales.vectors)


def repopt_sgd(
    learning_rate: optax.ScalarOrSchedule,
    scales: Scales,
    *,
    momentum: float | None = 0.9,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    mask: Any = None,
    normalise: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """SGD that trains a plain network as SGD would train its multi-branch counterpart.

    A chain of `repopt_mask`, weight decay, and `optax.sgd`.

    Args:
      learning_rate: a number or an Optax schedule.
      scales: those of a search, or without one `Scales.ones` or `Scales.depth_rule`.
      momentum: None for plain SGD.
      nesterov: whether momentum is Nesterov's.
      weight_decay: coefficient of the L2 term, added to the transformed gradient. It corresponds to a
        multi-branch network that decays all its branches equally, the identity's weight included.
      mask: which parameters are decayed, as in `optax.add_decayed_weights`.
      normalise: as in `repopt_mask`: each layer's multiplier is divided by its mean, and the decay is not.

    Raises:
      TypeError, ValueError: numbers of another type, or out of their range; scales as `repopt_mask`.
    """
    check_number("learning_rate", learning_rate)
    check_number("momentum", momentum, at_least=0, at_most=1, optional=True)
    check_number("weight_decay", weight_decay, at_least=0)
    return optax.chain(
        repopt_mask(scales, normalise),
        optax.add_decayed_weights(weight_decay, mask),
        optax.sgd(learning_rate, momentum, nesterov),
    )


def gradient_multipliers(params: Any, scales: Scales, power: int = 2, normalise: bool = False) -> Any:
    """Returns the dense multipliers m as a pytree like `params`, for inspection and parity tests.

    Parameters that `scales` do not name have ones.

    Args:
      params: a pytree of parameters.
      scales: the scales.
      power: 2 for m of the SGD family, 1 for the factor of a sign rule's update.
      normalise: whether each layer's multiplier is divided by its mean, as in `repopt_mask`.

    Raises:
      ValueError: the scales do not fit `params`, or a branch set has no elementwise multiplier.
    """
    check_fit(scales, params)

    def multiplier(path, p):
        if path not in scales.entries:
            return jnp.ones_like(p)
        branches, vectors = scales.entries[path].branches, scales.entries[path].vectors
        # Squared in float32 or wider: the square of a small scale underflows in half precision.
        wide = jnp.promote_types(p.dtype, jnp.float32)
        m = branches.multiplier(vectors, power=power, dtype=wide)
        if normalise:
            m = m / branches.mean_multiplier(vectors, power=power, dtype=wide, keepdims=True)
        return m.astype(p.dtype)

    return paths.map_named(multiplier, params)


def _global_norm(gradients: Any, scales: Scales, vectors: dict[str, dict[str, jax.Array]]) -> jax.Array:
    branch_sets = scales.branch_sets
    leaves, _ = paths.named_leaves(gradients)
    squares = []
    for path, g in leaves.items():
        g = g.astype(jnp.promote_types(g.dtype, jnp.float32))
        p = branch_sets[path].precondition(g, vectors[path]) if path in vectors else g
        squares.append(jnp.sum(g * p))
    return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))


def state_vectors(scales: Scales, params: Any) -> dict[str, dict[str, jax.Array]]:
    """Returns the vectors of `visible_scales`, as an optimizer's state holds them."""
    # Copies, because a step that donates its state must not delete the caller's scales.
    return replicated_like(params, jax.tree.map(jnp.array, visible_scales(scales, params).vectors))


def replicated_like(params: Any, vectors: Any) -> Any:
    """Returns `vectors`, replicated on the mesh over which the parameters are sharded, if they are.

    If they were left on one device, the first compiled step would move them, and the second step would be
    compiled again.
    """
    meshes = [
        leaf.sharding.mesh
        for leaf in jax.tree.leaves(params)
        if is_concrete(leaf) and isinstance(getattr(leaf, "sharding", None), jax.NamedSharding)
    ]
    return jax.device_put(vectors, jax.NamedSharding(meshes[0], jax.P())) if meshes else vectors


def visible_scales(scales: Scales, params: Any) -> Scales:
    """Returns the entries that no `optax.MaskedNode` of `params` hides, after checking that they fit.

    Raises:
      ValueError: paths that the parameters lack or that have another shape.
    """
    hidden = hidden_paths(scales.entries, params)
    visible = Scales({p: e for p, e in scales.entries.items() if p not in hidden}, scales.metadata)
    check_fit(visible, params)
    return visible


def require_gradients(updates: Any, vectors: Iterable[str]) -> None:
    """Raises ValueError, with every path, if `updates` lack a kernel of the optimizer's state.

    It would silently be trained without its scales, or not at all. Kernels that an `optax.MaskedNode` hides
    may be absent.
    """
    leaves, _ = paths.named_leaves(updates)
    missing = [path for path in vectors if path not in leaves]
    if missing := sorted(set(missing) - hidden_paths(missing, updates)):
        raise ValueError(
            f"the gradients lack kernels that the optimizer was initialised with: {', '.join(missing)}; give "
            "`update` gradients of the same tree of parameters as `init`"
        )


def hidden_paths(names: Iterable[str], tree: Any) -> set[str]:
    """Returns those of `names` at or below an `optax.MaskedNode` of `tree`."""
    nodes, _ = paths.named_leaves(tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    hidden = [path for path, node in nodes.items() if isinstance(node, optax.MaskedNode)]
    return {name for name in names if any(h in ("", name) or name.startswith(f"{h}/") for h in hidden)}
