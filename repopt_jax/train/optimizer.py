"""The optimizer of a run: clip -> multiplier -> weight decay -> SGD with momentum, in that order.

The order is the method: the multiplier belongs to the gradient alone, so decay comes after it, and both
before the momentum. Decay before the multiplier trains another network.
"""

import math
from collections.abc import Sequence
from typing import Any

import optax

from repopt_jax import paths
from repopt_jax.optim import repopt_mask
from repopt_jax.scales import Scales
from repopt_jax.train.config import OptimConfig

# Whether a parameter is decayed, as published: kernels are, and of the vectors only those that stand for an
# identity kernel, because in a plain network that kernel is part of the decayed one. The first match counts.
DECAY_RULES: tuple[tuple[str, bool], ...] = (
    (r"(.*/)?bn_identity/scale", True),
    (r"(.*/)?weights/[^/]+", True),
    (r"(.*/)?kernel", True),
    (r"(.*/)?scales/[^/]+", False),
    (r"(.*/)?bn[^/]*/(scale|bias)", False),
    (r"(.*/)?bias", False),
)


def make_optimizer(
    optim: OptimConfig, schedule: optax.Schedule, *, scales: Scales | None = None
) -> optax.GradientTransformation:
    """The chain above, without the parts that `optim` and `scales` do not ask for.

    Args:
      optim: momentum, decay and clipping.
      schedule: learning rate of each step.
      scales: multiplies the gradients by `repopt_mask`.

    Raises:
      ValueError: clipping together with scales. The ordinary global norm is not the norm that the network
        with branches would have clipped by, so the two would no longer be trained alike.
    """
    if scales is not None and optim.clip_norm is not None:
        raise ValueError(
            f"`clip_norm`={optim.clip_norm} cannot be used with `scales`: clipping by the ordinary global "
            "norm breaks the equivalence with the network that has branches; set `clip_norm` to None"
        )
    parts = []
    if optim.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(optim.clip_norm))
    if scales is not None:
        parts.append(repopt_mask(scales))
    if optim.weight_decay:
        parts.append(optax.add_decayed_weights(optim.weight_decay, mask=decay_mask))
    parts.append(optax.sgd(schedule, optim.momentum, nesterov=optim.nesterov))
    return optax.chain(*parts)


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
