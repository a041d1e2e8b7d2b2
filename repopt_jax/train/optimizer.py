"""The optimizer of a run.

The order of its parts is the method. Clipping takes the plain gradient and comes first; what follows, and in
which order, the ready-made optimizers with scales know (`repopt_sgd`: multiplier, decay, momentum).
"""

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from repopt_jax.core import paths
from repopt_jax.core.scales import Scales
from repopt_jax.optim.adaptive import repopt_adamw, repopt_lion
from repopt_jax.optim.sgd import clip_by_repopt_global_norm, repopt_sgd
from repopt_jax.train.config import OptimConfig


def make_optimizer(
    optim: OptimConfig,
    schedule: optax.Schedule,
    *,
    batch_size: int,
    decayed: Any,
    scales: Scales | None = None,
    normalise: bool = False,
    rates: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
    """Clipping, where `optim` asks for it, then the optimizer that it names.

    Args:
      optim: the optimizer, its constants, decay and clipping.
      schedule: learning rate of each step.
      batch_size: over all devices; for `optim.decay_scaling`.
      decayed: which parameters are decayed, as the mask of `optax.add_decayed_weights`:
        `surgery.decay.weight_decay_mask` of the network.
      scales: the optimizer and the norm by which it clips become those of the network with branches:
        `repopt_sgd`, `repopt_adamw`, `repopt_lion`; `clip_by_repopt_global_norm`.
      normalise: of SGD with scales, as in `repopt_mask`.
      rates: what comes between clipping and an optimizer without scales.
    """
    constants = {**optim.constants(), "weight_decay": weight_decay(optim, batch_size), "mask": decayed}
    if normalise and scales is not None:
        constants["normalise"] = True
    plain, repopt = READY[optim.name]
    tx = plain(schedule, **constants) if scales is None else repopt(schedule, scales, **constants)
    parts = [] if rates is None else [rates]
    if (norm := optim.clip_norm) is not None:
        clip = optax.clip_by_global_norm(norm) if scales is None else clip_by_repopt_global_norm(norm, scales)
        parts.insert(0, clip)
    return optax.chain(*parts, tx) if parts else tx


def weight_decay(optim: OptimConfig, batch_size: int) -> float:
    """The coefficient of weight decay for this batch."""
    return optim.weight_decay * (decay_factor(batch_size) if optim.decay_scaling == "batch" else 1)


def decay_factor(batch_size: int) -> float:
    """batch * max(1, round(64 / batch)) / 64, by which YOLOv6 multiplies the weight decay.

    There, gradients are accumulated over round(64 / batch) steps, so this is the images of an update over 64:
    1 for every batch that divides 64, 1.125 for 24, 2 for 128.
    """
    return batch_size * max(1, round(64 / batch_size)) / 64


def decayed_sgd(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float, mask: Any, **constants: Any
) -> optax.GradientTransformation:
    """`repopt_sgd` without scales: decay, then `optax.sgd` with its `constants`."""
    return optax.chain(optax.add_decayed_weights(weight_decay, mask), optax.sgd(learning_rate, **constants))


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


def hold_scales(
    inner: optax.GradientTransformation, scales: Collection[str], *, after: int
) -> optax.GradientTransformation:
    """`inner`, but after the first `after` updates the parameters with the paths `scales` stay as they are.

    From then on the network is the CSLA network of these scales: their gradient is 0 for `inner`, so that it
    counts for nothing in a clipping norm, and their update is 0 whatever momentum or decay would add. The
    identity's u is a weight and is trained on.
    """

    def hold(tree, held):
        def keep(path, leaf):
            return jnp.where(held, jnp.zeros_like(leaf), leaf) if path in scales else leaf

        return paths.map_named(keep, tree)

    def init_fn(params):
        return HoldScalesState(jnp.zeros((), jnp.int32), inner.init(params))

    def update_fn(updates, state, params=None):
        held = state.count >= after
        updates, inner_state = inner.update(hold(updates, held), state.inner, params)
        return hold(updates, held), HoldScalesState(state.count + 1, inner_state)

    return optax.GradientTransformation(init_fn, update_fn)


def make_schedule(
    optim: OptimConfig, *, epochs: int, steps_per_epoch: int, batch_size: int | None = None
) -> optax.Schedule:
    """Learning rate of step t, counted from 0: linear from `start` over the W warm-up steps to the peak, then
    a cosine to `least`.

        start + (peak - start) * (t + 1) / W                             for t < W: no step at rate 0
        least + (peak - least) * (1 + cos(pi * (t - W) / (T - W))) / 2   from there to the last step, T

    With `optim.cosine_over` "run" the cosine is that of t / T. With `optim.schedule_by` "epoch", t, W and T
    count epochs and the rise is start + (peak - start) * t / W: the rate at the start of the epoch. These two
    are the forms of timm's `CosineLRScheduler`, "run" by its default; by steps, the published code applies
    each rate one or two steps later than this.

    Args:
      optim: the rates, warm-up and form.
      epochs, steps_per_epoch: the length.
      batch_size: over all devices; what `optim.base_batch` is compared with.

    Raises:
      ValueError: `optim.base_batch` without `batch_size`.
    """
    if optim.base_batch is not None and batch_size is None:
        raise ValueError(f"`batch_size` is missing: the rate is for {optim.base_batch} images (`base_batch`)")
    factor = batch_size / optim.base_batch if batch_size and optim.base_batch else 1
    start, peak, least = (
        factor * rate for rate in (optim.warmup_start, optim.learning_rate, optim.min_learning_rate)
    )
    by_epoch = optim.schedule_by == "epoch"
    unit = 1 if by_epoch else steps_per_epoch
    total = epochs * unit
    warmup = min(math.ceil(optim.warmup_epochs * unit), total - 1)
    before = warmup if optim.cosine_over == "run" else 0
    fall = optax.cosine_decay_schedule(peak, total - warmup + before, alpha=least / peak if peak else 0.0)
    schedule = fall
    if warmup > 0:
        first = start if by_epoch else start + (peak - start) / warmup
        rise = optax.linear_schedule(first, peak, warmup if by_epoch else max(warmup - 1, 1))
        schedule = optax.join_schedules([rise, lambda t: fall(t + before)], [warmup])

    def of_epoch(step: Any) -> Any:
        return schedule(step // steps_per_epoch)

    return of_epoch if by_epoch else schedule
