"""The state of a run, and the two pure functions that move and measure it: arrays in, arrays out.

The network travels as a static graph definition and two plain dicts, `params` (what is trained) and `rest`
(batch statistics, constant scales). Batch statistics are over the global batch, on however many devices it
lies.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from repopt_jax.train.tasks import Batch, Objective

Means = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything that a step reads and writes.

    Attributes:
      step: () int32, finished steps.
      params: trained arrays, by pure-dict path.
      rest: the network's other arrays.
      opt_state: the optimizer's state; with scales, their vectors are in it.
      window: sums of the loss and of what else the log averages, and the number of images, since its last
        line. Here, not on the host, so that a resumed run writes the same line as an unbroken one.
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
    network: Network,
    tx: optax.GradientTransformation,
    *,
    sums: Mapping[str, Any],
    marks: dict[str, Any] | None = None,
) -> TrainState:
    """The state before the first step. It owns its buffers: the step that receives it gives them away.

    `sums` are the names and dtypes of what the log averages beside the loss, as the objective gives them.
    """
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=network.params,
        rest=network.rest,
        opt_state=tx.init(network.params),
        window=zero_sums(sums),
        bad_step=jnp.full((), -1, jnp.int32),
        marks=marks or {},
    )
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)


def make_train_step(
    graphdef: Any,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    objective: Objective,
    *,
    log_every: int = 1,
    sharding: Any = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Means]]:
    """The jitted training step. The state that it is given is donated: use the one that it returns.

    Args:
      graphdef: of the network.
      tx: the optimizer.
      schedule: for the log; the optimizer applies its own copy.
      objective: (model, batch) -> (mean loss, sums over the batch's images).
      log_every: steps after which the running means start anew.
      sharding: of the returned state, a tree like it; left to the compiler when None.

    Returns:
      `step(state, {"image": (N, H, W, C) float32, ...}) -> (state, means)`, the means being those of the loss
      and of the objective's sums since the log's last line, this step's learning rate "lr", and "bad_step".
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Means]:
        def loss_fn(params):
            model = merge_model(graphdef, params, state.rest)
            model.train()
            loss, sums = objective(model, batch)
            return loss, (loss, sums, split_model(model).rest)

        grads, (loss, sums, rest) = jax.grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        size = batch["image"].shape[0]
        window = _reset_sums(state.window, state.step % log_every == 0)
        window = add_sums(window, {"loss": loss * size, **sums, "count": size})
        bad_step = jnp.where((state.bad_step < 0) & ~jnp.isfinite(loss), state.step + 1, state.bad_step)
        means = {**_means(window), "lr": jnp.asarray(schedule(state.step)), "bad_step": bad_step}
        params: Any = optax.apply_updates(state.params, updates)
        state = TrainState(state.step + 1, params, rest, opt_state, window, bad_step, state.marks)
        return state, means

    out_shardings = None if sharding is None else (sharding, None)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether no leaf holds NaN or infinity; () bool."""
    return jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def zero_sums(sums: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Sums over no image: of the loss, of `sums` (name -> dtype), and the count."""
    dtypes = {"loss": jnp.float32, **sums, "count": jnp.int32}
    return {name: jnp.zeros((), dtype) for name, dtype in dtypes.items()}


def add_sums(sums: Mapping[str, jax.Array], more: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Sums over the images of both, in the dtypes of the first."""
    return {name: value + jnp.asarray(more[name]).astype(value.dtype) for name, value in sums.items()}


def _reset_sums(sums, start):
    return {name: jnp.where(start, jnp.zeros_like(value), value) for name, value in sums.items()}


def _means(sums):
    return {name: value / sums["count"] for name, value in sums.items() if name != "count"}
