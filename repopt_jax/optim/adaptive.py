"""Adam and sign rules that move a merged kernel as they would move its branches.

Where every embedding places coordinates, branch b has the gradient s_b * g at each entry that it reaches. Its
moments are then s_b * m and s_b^2 * v, where m and v are the moments of the plain gradient g, so neither the
branch tensors nor their moments need to be kept:

    Adam   dw_b = -lr * s_b * mhat / (sqrt(s_b^2 * vhat + eps_root) + eps)
           dK   = -lr * sum_b E_b(1) * s_b^2 * mhat / (sqrt(s_b^2 * vhat + eps_root) + eps)
    Lion   dw_b = -lr * sign(s_b * c)
           dK   = -lr * sum_b E_b(1) * |s_b| * sign(c)

Decoupled weight decay shrinks every branch, and hence K, by the same factor. Layers whose branches mix taps
(average pooling) need the moments of their branches and are handled by `reparameterize`.

Source of the idea: "Re-parameterizing Your Optimizers rather than Architectures" (ICLR 2023), appendix A. The
rule printed there and in the published code differs: it multiplies both the gradient and the update by the
first power of the scales, see `rule="published"`.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from repopt_jax.arguments import check_number
from repopt_jax.core import paths
from repopt_jax.core.scales import LayerScales, Scales, check_scales, check_values
from repopt_jax.optim.reparameterize import reparameterize
from repopt_jax.optim.sgd import require_gradients, state_vectors

Rule = Literal["exact", "published"]
RULES: tuple[str, ...] = get_args(Rule)


class ScaleByRepOptAdamState(NamedTuple):
    """State of `scale_by_repopt_adam`: step count, moments of the plain gradient, and the scale vectors."""

    count: jax.typing.ArrayLike
    mu: Any
    nu: Any
    scales: dict[str, dict[str, jax.Array]]


class RepOptSignMaskState(NamedTuple):
    """State of `repopt_sign_mask`: the scale vectors, as in `RepOptMaskState`."""

    scales: dict[str, dict[str, jax.Array]]


def repopt_adamw(
    learning_rate: optax.ScalarOrSchedule,
    scales: Scales,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any = None,
    nesterov: bool = False,
    rule: Rule = "exact",
) -> optax.GradientTransformationExtraArgs:
    """AdamW that trains a plain network as `optax.adamw` would train its multi-branch counterpart.

    It is a chain of `scale_by_repopt_adam`, decoupled weight decay, and the learning rate. It is exact for
    scales of any sign, eps included.

    Args:
      learning_rate: a number or an Optax schedule.
      scales: those of a search, or without one `Scales.ones` or `Scales.depth_rule`.
      b1, b2, eps, eps_root, mu_dtype, nesterov: as in `optax.adamw`.
      weight_decay: coefficient for merged kernels and other parameters. It corresponds to a multi-branch
        network that decays all its branches equally, the identity's weight included.
      mask: which parameters are decayed, as in `optax.adamw`.
      rule: see `scale_by_repopt_adam`.

    Raises:
      TypeError, ValueError: as `scale_by_repopt_adam`.
    """
    check_number("learning_rate", learning_rate)
    check_number("weight_decay", weight_decay, at_least=0)
    return optax.chain(
        scale_by_repopt_adam(scales, b1, b2, eps, eps_root, mu_dtype=mu_dtype, nesterov=nesterov, rule=rule),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def repopt_lion(
    learning_rate: optax.ScalarOrSchedule,
    scales: Scales,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Lion that trains a plain network as `optax.lion` would train its multi-branch counterpart.

    It is a chain of `optax.scale_by_lion`, `repopt_sign_mask`, decoupled weight decay, and the learning rate.
    The arguments are those of `optax.lion` and `repopt_adamw`.

    Raises:
      TypeError, ValueError: as `scale_by_repopt_adam`.
    """
    check_scales(scales)
    check_number("learning_rate", learning_rate)
    check_number("weight_decay", weight_decay, at_least=0)
    _check_rates(b1=b1, b2=b2)
    lion = optax.scale_by_lion(b1, b2, mu_dtype)
    return optax.chain(
        _elementwise_or_by_branch(scales, lambda placed: optax.chain(lion, repopt_sign_mask(placed)), lion),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_repopt_adam(
    scales: Scales,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    rule: Rule = "exact",
) -> optax.GradientTransformationExtraArgs:
    """Replaces `optax.scale_by_adam`: moves the kernels in `scales` as Adam would move their branches.

    Other leaves are moved as by `optax.scale_by_adam`. It takes the plain gradient, so no `repopt_mask` comes
    before it. To clip, put `clip_by_repopt_global_norm` before it.

    Args:
      scales: the scales.
      b1, b2, eps, eps_root, mu_dtype, nesterov: as in `optax.scale_by_adam`.
      rule: "exact" is the equation at the top of this module. "published" is what the RepOptimizers code
        does, for comparison: with M = sum_b s_b * E_b(1), signed, the gradient is multiplied by M before both
        moments and mhat by M again, so that the update is M * (M * mhat) / (sqrt(M^2 * vhat + eps_root) +
        eps), about |M| * mhat / sqrt(vhat). This differs from the branches' update at entries where scales of
        different signs are summed.

    Raises:
      TypeError: a rate or `eps` that is no number.
      ValueError: such a number out of its range; an unknown rule; scales that are NaN, infinite or all zero
        in a layer; "published" with a branch set that has no elementwise multiplier; at `init`, scales that
        do not fit the parameters; at `update`, gradients that lack a kernel.
    """
    check_scales(scales)
    _check_rates(b1=b1, b2=b2)
    check_number("eps", eps, at_least=0)
    check_number("eps_root", eps_root, at_least=0)
    if rule not in RULES:
        raise ValueError(f"`rule` is {rule!r}: it must be one of {', '.join(RULES)}")
    inner = optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
    if rule == "published" and (
        mixing := [p for p, e in scales.entries.items() if not e.branches.elementwise]
    ):
        raise ValueError(
            f"`rule` 'published' has no form for branches that mix taps or channels, at {', '.join(mixing)}: "
            "use 'exact'"
        )

    def direction(entry: LayerScales, vectors, m, v):
        if rule == "published":
            ones = {name: jnp.ones(shape, m.dtype) for name, shape in entry.branches.shapes().items()}
            big_m = entry.branches.merge(ones, {name: s.astype(m.dtype) for name, s in vectors.items()})
            return big_m * big_m * m / (jnp.sqrt(big_m * big_m * v + eps_root) + eps)
        return entry.branches.sum_at_taps(
            lambda s, m, v: s * s * m / (jnp.sqrt(s * s * v + eps_root) + eps), vectors, m, v, dtype=m.dtype
        )

    def elementwise(scales: Scales) -> optax.GradientTransformationExtraArgs:
        def init_fn(params):
            start: Any = inner.init(params)
            return ScaleByRepOptAdamState(start.count, start.mu, start.nu, state_vectors(scales, params))

        def update_fn(updates, state, params=None, **extra_args):
            del params, extra_args
            require_gradients(updates, state.scales)
            mu = optax.tree.update_moment(updates, state.mu, b1, 1)
            nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
            count = optax.safe_increment(state.count)
            if nesterov:
                ahead = optax.tree.bias_correction(mu, b1, optax.safe_increment(count))
                now = optax.tree.bias_correction(updates, b1, count)
                mu_hat = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, ahead, now)
            else:
                mu_hat = optax.tree.bias_correction(mu, b1, count)
            nu_hat = optax.tree.bias_correction(nu, b2, count)

            def transform(path, m, v):
                if path not in state.scales:
                    return m / (jnp.sqrt(v + eps_root) + eps)
                wide = jnp.promote_types(m.dtype, jnp.float32)
                d = direction(scales.entries[path], state.scales[path], m.astype(wide), v.astype(wide))
                return d.astype(m.dtype)

            directions = paths.map_named(transform, mu_hat, nu_hat)
            mu = optax.tree.cast(mu, mu_dtype)
            return directions, ScaleByRepOptAdamState(count, mu, nu, state.scales)

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return _elementwise_or_by_branch(scales, elementwise, inner)


def _check_rates(**rates: Any) -> None:
    """Decay rates of moments."""
    for name, value in rates.items():
        check_number(name, value, at_least=0, less_than=1)


def repopt_sign_mask(scales: Scales) -> optax.GradientTransformationExtraArgs:
    """Multiplies the *update* of every kernel that `scales` name by sum_b |s_b| * E_b(1), after a sign rule.

    Rules that take the sign of the gradient or of its moving average need it. It comes after the sign rule
    and before weight decay and the learning rate::

        optax.chain(optax.scale_by_sign(), repopt_sign_mask(scales), optax.scale_by_learning_rate(1e-3))
        optax.chain(optax.scale_by_lion(), repopt_sign_mask(scales), optax.add_decayed_weights(1e-3), ...)

    It is exact for signSGD, Signum and Lion and for scales of any sign. (A branch whose scale is 0 does not
    move K and contributes 0.)

    Raises:
      ValueError: scales that are NaN, infinite or all zero in a layer; a branch set without an elementwise
        multiplier, for which `repopt_lion` and `reparameterize` are exact; at `init`, scales that do not fit
        the parameters; at `update`, gradients that lack a kernel.
    """
    check_scales(scales)
    check_values(scales)
    if mixing := [path for path, entry in scales.entries.items() if not entry.branches.elementwise]:
        raise ValueError(
            f"the branches of {', '.join(mixing)} mix taps or channels, so a sign rule has no multiplier "
            "there: use `repopt_lion`, or `reparameterize` with the sign rule inside"
        )

    def init_fn(params):
        return RepOptSignMaskState(state_vectors(scales, params))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        require_gradients(updates, state.scales)
        branch_sets = scales.branch_sets

        def transform(path, u):
            if path not in state.scales:
                return u
            wide = jnp.promote_types(u.dtype, jnp.float32)
            m = branch_sets[path].multiplier(state.scales[path], power=1, dtype=wide)
            return (u * m).astype(u.dtype)

        return paths.map_named(transform, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _elementwise_or_by_branch(
    scales: Scales,
    elementwise: Callable[[Scales], optax.GradientTransformation],
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Returns `elementwise(scales)`, with `inner` on the branches of layers whose branches mix taps."""
    check_values(scales)
    mixing = {path: entry for path, entry in scales.entries.items() if not entry.branches.elementwise}
    placed = {path: entry for path, entry in scales.entries.items() if path not in mixing}
    rule = elementwise(Scales(placed, scales.metadata))
    if not mixing:
        return optax.with_extra_args_support(rule)

    def is_mixing(params):
        return paths.map_named(lambda path, _: path in mixing, params)

    def is_placed(params):
        return paths.map_named(lambda path, _: path not in mixing, params)

    return optax.chain(
        optax.masked(rule, is_placed),
        optax.masked(reparameterize(inner, Scales(mixing, scales.metadata), keep_weights=False), is_mixing),
    )
