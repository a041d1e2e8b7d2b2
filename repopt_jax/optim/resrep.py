"""ResRep: which channels of a network are removed, decided and carried out by the optimizer.

After a convolution and its batch norm stands a compactor, a D x D 1x1 convolution Q that begins as the
identity (`nn.Compactor`). Its kernel has the shape (*ones, in, out), so that the row q_o of the paper, the
weights of output channel o, is `kernel[..., o]`. Each step moves it by

    u_o = m_o * g_o + strength * q_o / max(|q_o|, eps)

with g the gradient of the loss and m the mask: 1 where the channel is to stay, 0 where it is to go. A masked
row is only pulled to zero, while the rest of the network learns to do without it. From time to time
`resrep_masks` chooses the masks anew by the rows' norms and the network's cost. After the training the rows
that have become zero are removed (`surgery.shrink`), which changes nothing.

Source: ResRep (arXiv 2007.03260), sections 3.3 and 3.4, and its published code.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from repopt_jax.arguments import check_items, check_number, check_transformation
from repopt_jax.core import paths
from repopt_jax.optim.sgd import hidden_paths, replicated_like, require_gradients

Masks = Mapping[str, Any]


class ResRepState(NamedTuple):
    """State of `scale_by_resrep`.

    Attributes:
      masks: path of a compactor's kernel -> (out,) bool, False for the channels that are to be removed. They
        are in the state so that they are checkpointed, sharded and resumed with everything else.
    """

    masks: dict[str, jax.Array]


def scale_by_resrep(
    compactors: Iterable[str], strength: float = 1e-4, *, eps: float = 1e-12
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradient g of every compactor by m * g + strength * q / max(|q|, eps), row by row.

    The second term, the gradient of the group lasso, is that of all rows, masked or not. It is added once for
    each update, so with gradient accumulation it belongs inside `optax.MultiSteps`, on the mean gradient.
    Both come before the momentum::

        optax.chain(scale_by_resrep(compactors), optax.trace(0.99), optax.scale_by_learning_rate(0.01))

    for the compactors alone; `resrep` also trains the other parameters. Other leaves pass unchanged. Leaves
    are found by path, in any pytree. All masks are True at first; `set_masks` writes others.

    Args:
      compactors: paths of the compactors' kernels, each (..., out): `surgery.PruningPlan.compactors`.
      strength: lambda of the lasso.
      eps: smallest norm by which a row is divided; a row of zeros gets the lasso gradient 0.

    Raises:
      ValueError: no compactor; a negative `strength` or an `eps` that is not positive; at `init`, paths that
        the parameters lack or that are no kernels; at `update`, paths that the gradients lack, or no
        `params`. All paths are listed. Paths that `optax.masked` or `optax.partition` hide are skipped.
    """
    check_items("compactors", compactors, "paths of compactors")
    names = tuple(compactors)
    if not names:
        raise ValueError("`compactors` is empty: there is nothing to prune")
    if not strength >= 0 or not eps > 0:
        raise ValueError(f"`strength` is {strength} and `eps` {eps}: they must be at least 0 and more than 0")

    def init_fn(params):
        leaves, _ = paths.named_leaves(params)
        visible = [name for name in names if name not in hidden_paths(names, params)]
        if missing := [name for name in visible if name not in leaves]:
            raise ValueError(f"the parameters lack the compactors {', '.join(missing)}")
        if vectors := [name for name in visible if jnp.ndim(leaves[name]) < 2]:
            raise ValueError(f"{', '.join(vectors)} are no kernels (..., in, out), as compactors are")
        ones = {name: jnp.ones(leaves[name].shape[-1], bool) for name in visible}
        return ResRepState(replicated_like(params, ones))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("`params` is missing: the lasso depends on the compactors' values")
        require_gradients(updates, state.masks)

        def transform(path, g, q):
            if path not in state.masks:
                return g
            wide = jnp.promote_types(q.dtype, jnp.float32)
            lasso = strength * q.astype(wide) / jnp.maximum(_norms(q), eps)
            # Selected, not multiplied: a masked row must not take over NaN from the loss.
            kept = jnp.where(_along_last(state.masks[path], g), g, jnp.zeros_like(g))
            return kept + lasso.astype(g.dtype)

        return paths.map_named(transform, updates, params), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def resrep(
    inner: optax.GradientTransformation,
    compactors: Iterable[str],
    learning_rate: optax.ScalarOrSchedule,
    *,
    strength: float = 1e-4,
    momentum: float = 0.99,
    eps: float = 1e-12,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer of a network with compactors: `scale_by_resrep` and momentum for these, `inner` for the
    rest.

        resrep(optax.sgd(lr, 0.9), plan.compactors, lr)

    Args:
      inner: the whole optimizer of all other parameters, decay and learning rate included.
      compactors: as in `scale_by_resrep`.
      learning_rate: of the compactors, which are not decayed.
      strength, eps: as in `scale_by_resrep`.
      momentum: of the compactors, in [0, 1).

    Raises:
      ValueError: as `scale_by_resrep`, or another momentum.
    """
    check_transformation("inner", inner)
    check_items("compactors", compactors, "paths of compactors")
    check_number("learning_rate", learning_rate)
    if not 0 <= momentum < 1:
        raise ValueError(f"`momentum` is {momentum}: it must be at least 0 and less than 1")
    names = frozenset(compactors)
    rule = optax.chain(
        scale_by_resrep(sorted(names), strength, eps=eps),
        optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
    )

    def labels(params):
        return paths.map_named(lambda path, _: "compactor" if path in names else "other", params)

    return optax.partition({"compactor": rule, "other": inner}, labels)


def get_masks(opt_state: Any) -> dict[str, jax.Array]:
    """Returns the masks in the state of any optimizer that contains `scale_by_resrep`.

    Raises:
      ValueError: it holds none, or several.
    """
    return dict(_resrep_state(opt_state).masks)


def set_masks(opt_state: Any, masks: Masks) -> Any:
    """Returns the state of an optimizer with these masks, {path: (out,) of bool or of 0 and 1}.

    Each mask lies where the one before lay.

    Raises:
      ValueError: the state has no masks; or the given ones are not for exactly its compactors, because a mask
        that is not written would be one of an earlier choice.
    """
    before = _resrep_state(opt_state)
    old, treedef = jax.tree.flatten(before)  # also in `nnx.Optimizer`, where the leaves are in variables
    shapes = {name: tuple(leaf.shape) for name, leaf in zip(sorted(before.masks), old)}
    given = {name: np.asarray(mask) for name, mask in masks.items()}
    if wrong := paths.describe_difference(shapes, {n: m.shape for n, m in given.items()}, noun="masks"):
        raise ValueError(f"`masks` do not fit the optimizer: {wrong}")
    new = [
        jax.make_array_from_callback(leaf.shape, leaf.sharding, given[name].astype(bool).__getitem__)
        for name, leaf in zip(sorted(given), old)
    ]

    def replace(node):
        return jax.tree.unflatten(treedef, new) if isinstance(node, ResRepState) else node

    return jax.tree.map(replace, opt_state, is_leaf=lambda node: isinstance(node, ResRepState))


def row_norms(params: Any, compactors: Iterable[str]) -> dict[str, jax.Array]:
    """Returns the norm of each row of the compactors, {path: (out,)}, in float32 or wider.

    Raises:
      ValueError: paths that `params` lack, all listed.
    """
    leaves, _ = paths.named_leaves(params)
    names = list(compactors)
    if missing := [name for name in names if name not in leaves]:
        raise ValueError(f"the parameters lack the compactors {', '.join(missing)}")
    return {name: _norms(leaves[name]).reshape(-1) for name in names}


def masks_are_due(step: int, *, before: int, interval: int) -> bool:
    """Whether the masks are chosen anew after `step` steps: every `interval` steps, later than `before`."""
    return step > before and (step - before) % interval == 0


def resrep_masks(
    norms: Mapping[str, Any],
    masks: Masks,
    cost: Callable[[dict[str, np.ndarray]], float],
    *,
    target: float,
    granularity: int = 4,
    at_least: int = 1,
) -> dict[str, np.ndarray]:
    """Chooses the masks of all compactors anew, as ResRep's controller does.

    The rows of all compactors are one list in ascending order of their norms. From the full widths on, the
    rows of this list are masked one after the other, those of a compactor with `at_least` left excepted,
    until the cost is at most `target` times the full one, or the list ends, or the quota is used up. The
    quota counts what is masked: `granularity` more than the present masks have, or no limit if these already
    reach the target. A row that is masked now may return.

    Args:
      norms: path of a compactor -> (out,), as `row_norms` gives them.
      masks: the present masks, {path: (out,)}.
      cost: of the network with given masks, which does not grow when more is masked:
        `surgery.PruningPlan.macs`.
      target: share of the cost that is to stay, in (0, 1]. With 1 nothing is masked.
      granularity: how many more rows than now may be masked, at least 1.
      at_least: rows that each compactor keeps, at least 1. One with fewer keeps all of them.

    Returns:
      A mask for every compactor, (out,) bool.

    Raises:
      ValueError: an argument out of its range; norms that are not finite; or masks of other compactors.
    """
    check_schedule(target=target, granularity=granularity, at_least=at_least)
    found = {path: np.asarray(norm, np.float64) for path, norm in norms.items()}
    now = {path: np.asarray(mask, bool) for path, mask in masks.items()}
    shapes = ({path: a.shape for path, a in side.items()} for side in (found, now))
    if wrong := paths.describe_difference(*shapes, noun="masks"):
        raise ValueError(f"`masks` do not fit `norms`: {wrong}")
    if bad := [path for path, norm in found.items() if not np.isfinite(norm).all()]:
        raise ValueError(f"the rows of {', '.join(bad)} are not finite")
    full = {path: np.ones(norm.shape, bool) for path, norm in found.items()}
    limit = target * cost(full)
    removable = _removals(found, at_least)
    if cost(now) > limit:
        removable = removable[: sum(int((~mask).sum()) for mask in now.values()) + granularity]

    def masked(count: int) -> dict[str, np.ndarray]:
        new = {path: mask.copy() for path, mask in full.items()}
        for path, row in removable[:count]:
            new[path][row] = False
        return new

    # The smallest count that reaches the target: the cost does not grow with it.
    low, high = 0, len(removable)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(masked(middle)) <= limit else (middle + 1, high)
    return masked(low)


def check_schedule(*, target: float, granularity: int, at_least: int) -> None:
    """Raises ValueError, naming all that are out of their range: see `resrep_masks`."""
    problems = []
    if not 0 < target <= 1:
        problems.append(f"`target` is {target}: it must be more than 0 and at most 1, the share that stays")
    for name, value in (("granularity", granularity), ("at_least", at_least)):
        if value < 1:
            problems.append(f"`{name}` is {value}: it must be at least 1")
    if problems:
        raise ValueError("; ".join(problems))


def _removals(norms: Mapping[str, np.ndarray], at_least: int) -> list[tuple[str, int]]:
    """Returns (path, row) in ascending order of the norms, without the last `at_least` of each path."""
    order = sorted((norm, path, row) for path, rows in norms.items() for row, norm in enumerate(rows))
    left = {path: rows.size for path, rows in norms.items()}
    chosen = []
    for _, path, row in order:
        if left[path] > at_least:
            left[path] -= 1
            chosen.append((path, row))
    return chosen


def _norms(q: jax.Array) -> jax.Array:
    """Returns the norms of the rows q[..., o], (1, ..., 1, out), in float32 or wider."""
    wide = q.astype(jnp.promote_types(q.dtype, jnp.float32))
    return jnp.sqrt(jnp.sum(wide * wide, axis=tuple(range(q.ndim - 1)), keepdims=True))


def _along_last(mask: jax.Array, g: jax.Array) -> jax.Array:
    return mask.reshape((1,) * (g.ndim - 1) + mask.shape)


def _resrep_state(opt_state: Any) -> ResRepState:
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, ResRepState))
    found = [node for node in nodes if isinstance(node, ResRepState)]
    if len(found) != 1:
        raise ValueError(
            f"`opt_state` has {len(found)} states of `scale_by_resrep`: it must be that of an optimizer with "
            "one"
        )
    return found[0]
