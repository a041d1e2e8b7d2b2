"""The optimizer of a run, and which of its parameters are decayed.

The order of its parts is the method. Clipping takes the plain gradient and comes first; what follows, and in
which order, the ready-made optimizers with scales know (`repopt_sgd`: multiplier, decay, momentum).
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from repopt_jax import paths
from repopt_jax.adaptive import repopt_adamw, repopt_lion
from repopt_jax.optim import clip_by_repopt_global_norm, repopt_sgd
from repopt_jax.scales import Scales
from repopt_jax.train.config import OPTIMIZERS, OptimConfig

# Paths of the scales that a search trains.
SEARCHED = r"(.*/)?scales/[^/]+"

# Whether a parameter is decayed, as published: kernels are, and of the vectors only those that stand for an
# identity kernel, because in a plain network that kernel is part of the decayed one. The first match counts.
DECAY_RULES: tuple[tuple[str, bool], ...] = (
    (r"(.*/)?bn_identity/scale", True),
    (r"(.*/)?weights/[^/]+", True),
    (r"(.*/)?norms/identity/scale", True),
    (r"(.*/)?kernel", True),
    (SEARCHED, False),
    (r"(.*/)?norms/[^/]+/(scale|bias)", False),
    (r"head/(box|keypoint)_scale", False),
    (r"(.*/)?bn[^/]*/(scale|bias)", False),
    (r"(.*/)?bias", False),
)


def make_optimizer(
    optim: OptimConfig, schedule: optax.Schedule, *, batch_size: int, scales: Scales | None = None
) -> optax.GradientTransformation:
    """Clipping, where `optim` asks for it, then the optimizer that it names.

    Args:
      optim: the optimizer, its constants, decay and clipping.
      schedule: learning rate of each step.
      batch_size: over all devices; for `optim.decay_scaling`.
      scales: the optimizer and the norm by which it clips become those of the network with branches:
        `repopt_sgd`, `repopt_adamw`, `repopt_lion`; `clip_by_repopt_global_norm`.
    """
    own: dict[str, Any] = {field: getattr(optim, field) for field in OPTIMIZERS[optim.name]}
    constants = {field: value for field, value in own.items() if value is not None}
    decay = optim.weight_decay * (decay_factor(batch_size) if optim.decay_scaling == "batch" else 1)
    constants |= {"weight_decay": decay, "mask": decay_mask}
    plain, repopt = READY[optim.name]
    tx = plain(schedule, **constants) if scales is None else repopt(schedule, scales, **constants)
    if optim.clip_norm is None:
        return tx
    if scales is None:
        return optax.chain(optax.clip_by_global_norm(optim.clip_norm), tx)
    return optax.chain(clip_by_repopt_global_norm(optim.clip_norm, scales), tx)


def decay_factor(batch_size: int) -> float:
    """batch * max(1, round(64 / batch)) / 64, by which YOLOv6 multiplies the weight decay.

    There, gradients are accumulated over round(64 / batch) steps, so this is the images of an update over 64:
    1 for every batch that divides 64, 1.125 for 24, 2 for 128.
    """
    return batch_size * max(1, round(64 / batch_size)) / 64


def decayed_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    mask: Any,
) -> optax.GradientTransformation:
    """`repopt_sgd` without scales: decay, then SGD with momentum."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask), optax.sgd(learning_rate, momentum, nesterov)
    )


# Name in a config -> the optimizer without and with scales.
READY: dict[str, tuple[Callable[..., optax.GradientTransformation], ...]] = {
    "sgd": (decayed_sgd, repopt_sgd),
    "adamw": (optax.adamw, repopt_adamw),
    "lion": (optax.lion, repopt_lion),
}


class HoldScalesState(NamedTuple):
    """State of `hold_scales`: () int32, updates made; the inner optimizer's state."""

    count: jax.Array
    inner: Any


def hold_scales(inner: optax.GradientTransformation, *, after: int) -> optax.GradientTransformation:
    """`inner`, but after the first `after` updates the scales of a search stay as they are.

    From then on the network is the CSLA network of these scales: their gradient is 0 for `inner`, so that it
    counts for nothing in a clipping norm, and their update is 0 whatever momentum or decay would add. The
    identity's u is a weight and is trained on.
    """

    def hold(tree, held):
        return paths.map_named(
            lambda path, leaf: jnp.where(held, jnp.zeros_like(leaf), leaf) if _is_searched(path) else leaf,
            tree,
        )

    def init_fn(params):
        return HoldScalesState(jnp.zeros((), jnp.int32), inner.init(params))

    def update_fn(updates, state, params=None):
        held = state.count >= after
        updates, inner_state = inner.update(hold(updates, held), state.inner, params)
        return hold(updates, held), HoldScalesState(state.count + 1, inner_state)

    return optax.GradientTransformation(init_fn, update_fn)


def _is_searched(path: str) -> bool:
    return re.fullmatch(SEARCHED, path) is not None


def decay_mask(params: Any, rules: Sequence[tuple[str, bool]] = DECAY_RULES) -> Any:
    """A tree like `params` that says of each leaf whether it is decayed.

    Raises:
      ValueError: parameters that no rule matches, all of them listed. There is no default: a new kind of
        parameter needs a decision.
    """
    named, treedef = paths.named_leaves(params)
    decayed = paths.match_rules(rules, named)
    return treedef.unflatten([decayed[name] for name in named])


def make_schedule(optim: OptimConfig, *, epochs: int, steps_per_epoch: int) -> optax.Schedule:
    """Learning rate of step t, counted from 0: linear up to the peak over the W warm-up steps, then cosine to
    0.

    peak * (t + 1) / W for t < W, so that no step is spent at rate 0, and
    peak * (1 + cos(pi * (t - W) / (T - W))) / 2 from there to the last step, T.
    """
    peak, total = optim.learning_rate, epochs * steps_per_epoch
    warmup = min(math.ceil(optim.warmup_epochs * steps_per_epoch), total - 1)
    cosine = optax.cosine_decay_schedule(peak, total - warmup)
    if warmup == 0:
        return cosine
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, cosine], [warmup])
