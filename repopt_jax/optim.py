"""The rule of iteration: gradients of the merged kernel, transformed so that it moves as the sum of its
branches would.

A step of SGD on the branches w_b moves K = sum_b s_b * E_b(w_b) by dK = -lr * P(g), g = dL/dK (see
`branches`). Momentum, Nesterov's look-ahead and decoupled-from-P weight decay are linear, so it is enough to
put P where the gradient comes in. Trees in, trees out: nothing here knows Flax.
Source: "Re-parameterizing Your Optimizers rather than Architectures" (ICLR 2023), section 3.2 and appendix A.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from repopt_jax import paths
from repopt_jax.scales import Scales, check_finite, check_fit


class RepOptMaskState(NamedTuple):
    """State of `repopt_mask`.

    Attributes:
      scales: path of a kernel -> branch -> (out,) vector. In the state, so that it is checkpointed, sharded
        and resumed with everything else and never becomes a constant of the compiled program. The multiplier
        itself is not stored.
    """

    scales: dict[str, dict[str, jax.Array]]


def repopt_mask(scales: Scales) -> optax.GradientTransformation:
    """Replaces the gradient g of every kernel that `scales` name by P(g); other leaves pass unchanged.

    Exact for optimizers that are linear in the gradient: SGD, momentum, Nesterov, with or without decay. It
    must come before weight decay, momentum and the learning rate, and no clipping by the ordinary global norm
    may stand in the same chain::

        optax.chain(repopt_mask(scales), optax.add_decayed_weights(4e-5), optax.sgd(lr, 0.9, nesterov=True))

    Where every branch places coordinates, P(g) = m * g and m is rebuilt inside the update from the scale
    vectors and iota comparisons, which the compiler fuses into the update. Other branch sets take P by
    transposition, exactly. Leaves are found by path, in any pytree: plain dicts, `nnx.State`, Linen or
    Equinox parameters.

    Raises:
      ValueError: NaN or infinite scales; at `init`, paths of `scales` that the parameters lack or that have
        another shape, all listed. (Paths that `optax.masked` or `optax.partition` hide are left alone.)
    """
    check_finite(scales)

    def init_fn(params):
        visible = _visible(scales, params)
        check_fit(visible, params)
        return RepOptMaskState(jax.tree.map(jnp.asarray, visible.vectors))

    def update_fn(updates, state, params=None):
        del params
        branch_sets = scales.branch_sets

        def transform(path, g):
            return branch_sets[path].precondition(g, state.scales[path]) if path in state.scales else g

        return paths.map_named(transform, updates), state

    return optax.GradientTransformation(init_fn, update_fn)


def repopt_sgd(
    learning_rate: optax.ScalarOrSchedule,
    scales: Scales,
    *,
    momentum: float | None = 0.9,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    mask: Any = None,
) -> optax.GradientTransformation:
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


def _visible(scales: Scales, params: Any) -> Scales:
    """The entries that no `optax.MaskedNode` of `params` hides."""
    nodes, _ = paths.named_leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    hidden = [path for path, node in nodes.items() if isinstance(node, optax.MaskedNode)]

    def is_hidden(path):
        return any(path == h or path.startswith(f"{h}/") or h == "" for h in hidden)

    return Scales({p: e for p, e in scales.entries.items() if not is_hidden(p)}, scales.metadata)
