"""The rule of iteration: gradients of the merged kernel, transformed so that it moves as the sum of its
branches would.

A step of SGD on the branches w_b moves K = sum_b s_b * E_b(w_b) by dK = -lr * P(g), g = dL/dK (see
`branches`). Momentum, Nesterov's look-ahead and decoupled-from-P weight decay are linear, so it is enough to
put P where the gradient comes in. The gradient of the branches has the square norm sum_b |E_b^T(s_b * g)|^2 =
<g, P(g)>, by which clipping must go. Adam and sign rules are in `adaptive`, everything else in
`reparameterize`. Trees in, trees out: nothing here knows Flax.
Source: "Re-parameterizing Your Optimizers rather than Architectures" (ICLR 2023), section 3.2 and appendix A.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from repopt_jax.core import paths
from repopt_jax.core.scales import Scales, check_finite, check_fit, is_concrete
from repopt_jax.optim import chains


class RepOptMaskState(NamedTuple):
    """State of `repopt_mask` and `clip_by_repopt_global_norm`.

    Attributes:
      scales: path of a kernel -> branch -> (*stack, out) vector. In the state, so that it is checkpointed,
        sharded and resumed with everything else and never becomes a constant of the compiled program. The
        multiplier itself is not stored.
    """

    scales: dict[str, dict[str, jax.Array]]


def repopt_mask(scales: Scales) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradient g of every kernel that `scales` name by P(g); other leaves pass unchanged.

    Exact for optimizers that are linear in the gradient: SGD, momentum, Nesterov, with or without decay. It
    must come before weight decay, momentum and the learning rate. Clip with `clip_by_repopt_global_norm`,
    before
    it: where an ordinary clipping can be seen in the same `optax.chain`, a `ClippingWarning` says so::

        optax.chain(repopt_mask(scales), optax.add_decayed_weights(4e-5), optax.sgd(lr, 0.9, nesterov=True))

    Where every branch places coordinates, P(g) = m * g and m is rebuilt inside the update from the scale
    vectors and iota comparisons, which the compiler fuses into the update. Other branch sets take P by
    transposition, exactly. In kernels of stacked layers each layer has its own P. Leaves are found by path,
    in any pytree: plain dicts, `nnx.State`, Linen or Equinox parameters.

    Raises:
      ValueError: NaN or infinite scales; at `init`, paths of `scales` that the parameters lack or that have
        another shape, all listed. (Paths that `optax.masked` or `optax.partition` hide are left alone.)
    """
    check_finite(scales)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        chains.warn_of_clipping("repopt_mask")
        branch_sets = scales.branch_sets

        def transform(path, g):
            return branch_sets[path].precondition(g, state.scales[path]) if path in state.scales else g

        return paths.map_named(transform, updates), state

    return optax.GradientTransformationExtraArgs(_init_with(scales), update_fn)


def clip_by_repopt_global_norm(
    max_norm: jax.typing.ArrayLike, scales: Scales
) -> optax.GradientTransformationExtraArgs:
    """Clips by the global norm that the gradient of the multi-branch network has: the clipping that keeps the
    equivalence.

    g becomes g * min(1, max_norm / n), n = `repopt_global_norm(g, scales)`. It takes the plain gradient, so
    it is
    the first of the chain, before `repopt_mask` or `scale_by_repopt_adam`::

        optax.chain(clip_by_repopt_global_norm(5.0, scales), repopt_mask(scales), ...)

    In a layer with the identity, n counts the gradient of its weight u: the network with branches clips by
    the norm of everything that it trains.

    Raises:
      ValueError: as `repopt_mask`.
    """
    check_finite(scales)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        norm = _global_norm(updates, scales, state.scales)
        factor = jnp.where(norm < max_norm, 1, max_norm / norm)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformationExtraArgs(_init_with(scales), update_fn)


def repopt_global_norm(gradients: Any, scales: Scales) -> jax.Array:
    """Norm of the gradient of the multi-branch network, from that of the plain one: a scalar, float32 or
    wider.

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
) -> optax.GradientTransformationExtraArgs:
    """SGD that trains a plain network as its multi-branch counterpart would: `repopt_mask`, decay, momentum.

    Args:
      learning_rate: a number or an Optax schedule.
      scales: searched, or without a search (`Scales.ones`, `Scales.depth_rule`).
      momentum: None for none.
      nesterov: Nesterov's look-ahead.
      weight_decay: coefficient of the L2 term, added to the transformed gradient. For the equivalence the
        merged kernels must be decayed as the branches (the identity's weight included) are.
      mask: which parameters are decayed, as in `optax.add_decayed_weights`.
    """
    return optax.chain(
        repopt_mask(scales),
        optax.add_decayed_weights(weight_decay, mask),
        optax.sgd(learning_rate, momentum, nesterov),
    )


def gradient_multipliers(params: Any, scales: Scales, power: int = 2) -> Any:
    """The dense multipliers m as a pytree like `params`, ones where `scales` name nothing: for looking at,
    and for parity.

    Args:
      params: a pytree of parameters.
      scales: the scales.
      power: 2 for m of the SGD family, 1 for the factor of a sign rule's update.

    Raises:
      ValueError: the scales do not fit `params`, or a branch set has no elementwise multiplier.
    """
    check_fit(scales, params)

    def multiplier(path, p):
        if path not in scales.entries:
            return jnp.ones_like(p)
        entry = scales.entries[path]
        # Squared in float32 or wider: the square of a small scale is no number of half precision.
        wide = jnp.promote_types(p.dtype, jnp.float32)
        return entry.branches.multiplier(entry.vectors, power=power, dtype=wide).astype(p.dtype)

    return paths.map_named(multiplier, params)


def _init_with(scales: Scales):
    """An `init` that checks the fit and puts the vectors of what it sees into the state."""

    def init_fn(params):
        return RepOptMaskState(state_vectors(scales, params))

    return init_fn


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
    """The vectors of `visible_scales` as an optimizer's state holds them.

    Where the parameters lie on a mesh the vectors lie on it too, whole on every device: left to themselves
    they would be laid out anew by the first compiled step, and the second step would be compiled again.
    """
    # Copies: a step that is given the state to overwrite must not take the caller's scales with it.
    vectors = jax.tree.map(jnp.array, visible_scales(scales, params).vectors)
    meshes = [
        leaf.sharding.mesh
        for leaf in jax.tree.leaves(params)
        if is_concrete(leaf) and isinstance(getattr(leaf, "sharding", None), jax.NamedSharding)
    ]
    return jax.device_put(vectors, jax.NamedSharding(meshes[0], jax.P())) if meshes else vectors


def visible_scales(scales: Scales, params: Any) -> Scales:
    """The entries that no `optax.MaskedNode` of `params` hides, checked to fit: what an optimizer's `init`
    takes.

    Raises:
      ValueError: paths that the parameters lack or that have another shape.
    """
    nodes, _ = paths.named_leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    hidden = [path for path, node in nodes.items() if isinstance(node, optax.MaskedNode)]

    def is_hidden(path):
        return any(path == h or path.startswith(f"{h}/") or h == "" for h in hidden)

    visible = Scales({p: e for p, e in scales.entries.items() if not is_hidden(p)}, scales.metadata)
    check_fit(visible, params)
    return visible
