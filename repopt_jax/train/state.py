"""The state of a run, and the two pure functions that move and measure it: arrays in, arrays out.

The network travels as a static graph definition and two plain dicts, `params` (what is trained) and `rest`
(batch statistics, constant scales). Batch statistics are over the global batch, on however many devices it
lies.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

Batch = dict[str, jax.Array]
Means = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything that a step reads and writes.

    Attributes:
      step: () int32, finished steps.
      params: trained arrays, by pure-dict path.
      rest: the network's other arrays.
      opt_state: the optimizer's state; with scales, their vectors are in it.
      window: sums of loss and correct answers, and the number of images, since the last line of the log.
        Here, not on the host, so that a resumed run writes the same line as an unbroken one.
      bad_step: () int32, first step whose loss was not finite, or -1.
      marks: scale vectors at the last record of their statistics (search), else empty.
    """

    step: jax.Array
    params: dict[str, Any]
    rest: dict[str, Any]
    opt_state: Any
    window: dict[str, jax.Array]
    bad_step: jax.Array
    marks: dict[str, Any]


class Network(NamedTuple):
    """A model taken apart into what is static and what are arrays (plain dicts)."""

    graphdef: Any
    params: dict[str, Any]
    rest: dict[str, Any]


def split_model(model: nnx.Module) -> Network:
    """Takes `model` apart; the arrays are those of the model, not copies."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return Network(graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(rest))


def merge_model(graphdef: Any, params: Any, rest: Any) -> Any:
    """The model again. Its variables are new: changing them leaves `params` and `rest` as they are."""
    # Without `copy`, variables of an outer trace would be written inside `grad`, which JAX refuses.
    return nnx.merge(graphdef, params, rest, copy=True)


def init_state(
    network: Network, tx: optax.GradientTransformation, *, marks: dict[str, Any] | None = None
) -> TrainState:
    """The state before the first step. It owns its buffers: the step that receives it gives them away."""
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=network.params,
        rest=network.rest,
        opt_state=tx.init(network.params),
        window=_zero_sums(),
        bad_step=jnp.full((), -1, jnp.int32),
        marks=marks or {},
    )
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)


def make_train_step(
    graphdef: Any,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    label_smoothing: float = 0.0,
    log_every: int = 1,
    sharding: Any = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Means]]:
    """The jitted training step. The state that it is given is donated: use the one that it returns.

    Args:
      graphdef: of the network.
      tx: the optimizer.
      schedule: for the log; the optimizer applies its own copy.
      label_smoothing: share of the label's probability that is spread over all classes.
      log_every: steps after which the running means start anew.
      sharding: of the returned state, a tree like it; left to the compiler when None.

    Returns:
      `step(state, {"image": (N, H, W, C) float32, "label": (N,) int32}) -> (state, means)`, the means being
      loss and accuracy since the log's last line, this step's learning rate "lr", and "bad_step".
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Means]:
        def loss_fn(params):
            model = merge_model(graphdef, params, state.rest)
            model.train()
            logits = model(batch["image"])
            loss = cross_entropy(logits, batch["label"], label_smoothing=label_smoothing).mean()
            return loss, (loss, count_correct(logits, batch["label"]), split_model(model).rest)

        grads, (loss, correct, rest) = jax.grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        size = batch["label"].shape[0]
        window = _add_sums(_reset_sums(state.window, state.step % log_every == 0), loss * size, correct, size)
        bad_step = jnp.where((state.bad_step < 0) & ~jnp.isfinite(loss), state.step + 1, state.bad_step)
        means = {**_means(window), "lr": jnp.asarray(schedule(state.step)), "bad_step": bad_step}
        params: Any = optax.apply_updates(state.params, updates)
        state = TrainState(state.step + 1, params, rest, opt_state, window, bad_step, state.marks)
        return state, means

    out_shardings = None if sharding is None else (sharding, None)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


def make_eval_step(
    graphdef: Any,
) -> Callable[[Any, Any, dict[str, jax.Array], Batch], dict[str, jax.Array]]:
    """The jitted evaluation step, with running batch statistics.

    Returns:
      `step(params, rest, sums, batch) -> sums`, which adds a batch to the sums of `start_sums`. Images whose
      "mask" is 0 are padding and count for nothing. The loss is the plain cross-entropy, whatever smoothing
      training used.
    """

    def eval_step(params, rest, sums, batch):
        model = merge_model(graphdef, params, rest)
        model.eval()
        logits, real = model(batch["image"]), batch["mask"] > 0
        # Selected, not multiplied: padding may give any number, and 0 * nan is nan.
        loss = jnp.where(real, cross_entropy(logits, batch["label"]), 0).sum()
        correct = count_correct(logits, batch["label"], real=real)
        return _add_sums(sums, loss, correct, real.sum(dtype=jnp.int32))

    return jax.jit(eval_step, donate_argnums=2)


def start_sums(sharding: Any) -> dict[str, jax.Array]:
    """Sums of an evaluation before its first batch."""
    return jax.device_put(_zero_sums(), sharding)


def sums_to_means(sums: dict[str, jax.Array]) -> dict[str, Any]:
    """Loss, accuracy and count as Python numbers."""
    host = jax.device_get(sums)
    count = int(host["count"])
    return {
        "loss": float(host["loss"]) / max(count, 1),
        "accuracy": int(host["correct"]) / max(count, 1),
        "count": count,
    }


def cross_entropy(logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy of each image, (N, classes) and (N,) -> (N,), computed in float32 or wider."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))


def count_correct(logits: jax.Array, labels: jax.Array, *, real: jax.Array | bool = True) -> jax.Array:
    """How many images, of those that are `real`, have their largest logit at the label; () int32."""
    return ((logits.argmax(-1) == labels) & real).sum(dtype=jnp.int32)


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether no leaf holds NaN or infinity; () bool."""
    return jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def _zero_sums() -> dict[str, jax.Array]:
    return {
        "loss": jnp.zeros((), jnp.float32),
        "correct": jnp.zeros((), jnp.int32),
        "count": jnp.zeros((), jnp.int32),
    }


def _add_sums(sums, loss, correct, count):
    return {
        "loss": sums["loss"] + loss.astype(jnp.float32),
        "correct": sums["correct"] + correct,
        "count": sums["count"] + count,
    }


def _reset_sums(sums, start):
    return {name: jnp.where(start, jnp.zeros_like(value), value) for name, value in sums.items()}


def _means(sums):
    return {"loss": sums["loss"] / sums["count"], "accuracy": sums["correct"] / sums["count"]}
