"""The state of a run, and the pure function that moves it: arrays in, arrays out.

The network travels as a static graph definition and two plain dicts, `params` (what is trained) and `rest`
(batch statistics, constant scales).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from repopt_jax.train.sharding import AXES
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
      ema: moving averages {"params": ..., "rest": ...}, or empty for none.
    """

    step: jax.Array
    params: dict[str, Any]
    rest: dict[str, Any]
    opt_state: Any
    window: dict[str, jax.Array]
    bad_step: jax.Array
    marks: dict[str, Any]
    ema: dict[str, Any]

    @property
    def network(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(params, rest) of the network that is evaluated and deployed: the moving average where there is
        one."""
        return (self.ema["params"], self.ema["rest"]) if self.ema else (self.params, self.rest)


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
    ema: bool = False,
) -> TrainState:
    """The state before the first step. It owns its buffers: the step that receives it gives them away.

    Args:
      network: its arrays may also be shapes; under `jax.eval_shape` the state is then shapes.
      tx: the optimizer.
      sums: names and dtypes of what the log averages beside the loss, as the objective gives them.
      marks: scale vectors of a search.
      ema: whether moving averages are kept; they start as the network does.
    """
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=network.params,
        rest=network.rest,
        opt_state=tx.init(network.params),
        window=zero_sums(sums),
        bad_step=jnp.full((), -1, jnp.int32),
        marks=marks or {},
        ema={"params": network.params, "rest": network.rest} if ema else {},
    )
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)


def make_train_step(
    graphdef: Any,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    objective: Objective,
    *,
    log_every: int = 1,
    accumulate: int = 1,
    ema: float | None = None,
    statistics_mesh: Mesh | None = None,
    sharding: Any = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Means]]:
    """The jitted training step. The state that it is given is donated: use the one that it returns.

    Args:
      graphdef: of the network.
      tx: the optimizer.
      schedule: for the log; the optimizer applies its own copy.
      objective: (model, batch) -> (mean loss, sums over the batch's images).
      log_every: steps after which the running means start anew.
      accumulate: parts in which the batch goes through the network, one after the other; the update is made
        by their mean gradient, and batch norm normalises each part by itself.
      ema: decay of the moving averages of a state that has them.
      statistics_mesh: the mesh whose devices normalise by the statistics of their own part of the batch; None
        for those of the whole batch, on however many devices it lies. The loss is then the mean of the
        devices' losses, and running statistics are the mean over the devices.
      sharding: of the returned state, a tree like it; left to the compiler when None.

    Returns:
      `step(state, {"image": (N, H, W, C) float32, ...}) -> (state, means)`, the means being those of the loss
      and of the objective's sums since the log's last line, this step's learning rate "lr", and "bad_step".
    """
    gradients = _accumulated(_gradients(graphdef, objective), accumulate)
    if statistics_mesh is not None:
        gradients = _on_each_device(gradients, statistics_mesh)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Means]:
        grads, loss, sums, rest = gradients(state.params, state.rest, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        size = batch["image"].shape[0]
        window = _reset_sums(state.window, state.step % log_every == 0)
        window = add_sums(window, {"loss": loss * size, **sums, "count": size})
        bad_step = jnp.where((state.bad_step < 0) & ~jnp.isfinite(loss), state.step + 1, state.bad_step)
        means = {**_means(window), "lr": jnp.asarray(schedule(state.step)), "bad_step": bad_step}
        params: Any = optax.apply_updates(state.params, updates)
        averages = state.ema
        if ema is not None:
            averages = _averaged(averages, {"params": params, "rest": rest}, ema, state.step)
        state = TrainState(state.step + 1, params, rest, opt_state, window, bad_step, state.marks, averages)
        return state, means

    out_shardings = None if sharding is None else (sharding, None)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


# (params, rest, batch) -> (mean gradient, mean loss, sums over the images, rest)
Gradients = Callable[[Any, Any, Batch], tuple[Any, jax.Array, dict[str, jax.Array], Any]]


def _gradients(graphdef: Any, objective: Objective) -> Gradients:
    def gradients(params, rest, batch):
        def loss_fn(params):
            model = merge_model(graphdef, params, rest)
            model.train()
            loss, sums = objective(model, batch)
            return loss, (loss, sums, split_model(model).rest)

        grads, (loss, sums, new_rest) = jax.grad(loss_fn, has_aux=True)(params)
        return grads, loss, sums, new_rest

    return gradients


def _accumulated(gradients: Gradients, count: int) -> Gradients:
    """`gradients` of `count` parts of a batch, one after the other: only one part's activations are alive."""
    if count == 1:
        return gradients

    def parts(value):
        # Row i goes to part i % count, so that each part is divided over the devices as the batch is and no
        # row moves.
        return value.reshape(-1, count, *value.shape[1:]).swapaxes(0, 1)

    def accumulate(params, rest, batch):
        def add(carry, part):
            total, rest = carry
            grads, loss, sums, rest = gradients(params, rest, part)
            return (jax.tree.map(jnp.add, total, (grads, loss, sums)), rest), None

        batches = {name: parts(value) for name, value in batch.items()}
        first = {name: value[0] for name, value in batches.items()}
        shapes = jax.eval_shape(gradients, params, rest, first)[:3]
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        ((grads, loss, sums), rest), _ = jax.lax.scan(add, (zeros, rest), batches)
        return jax.tree.map(lambda g: g / count, grads), loss / count, sums, rest

    return accumulate


def _on_each_device(gradients: Gradients, mesh: Mesh) -> Gradients:
    """`gradients` of each device's own part of the batch, averaged."""

    def local(params, rest, batch):
        grads, loss, sums, new_rest = gradients(params, rest, batch)
        # The mean of the change: what does not change, as the constant scales, stays as it is to the last
        # bit.
        new_rest = jax.tree.map(_mean_change, rest, new_rest)
        return jax.lax.pmean(grads, AXES), jax.lax.pmean(loss, AXES), jax.lax.psum(sums, AXES), new_rest

    whole = PartitionSpec()
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(whole, whole, PartitionSpec(AXES)),
        out_specs=whole,
        check_vma=False,
    )


def _mean_change(old: jax.Array, new: jax.Array) -> jax.Array:
    if not jnp.issubdtype(new.dtype, jnp.inexact):  # counters, the same on all devices
        return new
    return old + jax.lax.pmean(new - old, AXES)


def _averaged(averages: Any, values: Any, decay: float, step: jax.Array) -> Any:
    """e + (1 - d) (x - e), d = min(decay, (1 + t) / (10 + t)): early averages must not remember the first
    draw."""

    def average(e, x):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        t = step.astype(jnp.promote_types(x.dtype, jnp.float32))
        d = jnp.minimum(decay, (1 + t) / (10 + t))
        return e + (1 - d).astype(x.dtype) * (x - e)

    return jax.tree.map(average, averages, values)


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
