"""The state of a run, the pure function that moves it, and where its arrays lie.

The network travels as a static graph definition and two plain dicts: `params`, what is trained, and
`non_trainable`, its other arrays (batch statistics, constant scales).

Arrays lie on one mesh with the axes `data` and `fsdp`. A batch is divided over both axes. Of the state, what
`STATE_TABLE` calls SHARDED is divided along `fsdp`, and what it calls REPLICATED lies whole on every device.
The models carry no sharding; `jax.jit` inserts the communication. One process or many run the same program,
which sees the whole batch: batch statistics are over the *global* batch, as with synchronised batch norm on
several GPUs, unless the step is made with the statistics of each device.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from repopt_jax.core import paths
from repopt_jax.train.rules import mesh_problems

Batch = dict[str, jax.Array]
# (model, batch) -> (mean loss over the images of the batch, sums over them of what the log averages)
Objective = Callable[[Any, Batch], tuple[jax.Array, dict[str, jax.Array]]]

AXES = ("data", "fsdp")
SHARDED = "divided along fsdp, by its largest axis that fsdp divides"
REPLICATED = "a whole copy on every device"

# Path in a `TrainState` -> where the array lies; the first match counts. The second row is every vector of
# scales: those of the optimizer's state (kilobytes, read by the update of all parts of a kernel), those that
# a search trains, and their momentum. The third is the masks of compactors.
STATE_TABLE: tuple[tuple[str, str], ...] = (
    (r"step|bad_step|metric_sums/.*|previous_scales/.*", REPLICATED),
    (r"(.*/)?scales/.*", REPLICATED),
    (r"opt_state/(.*/)?masks/.*", REPLICATED),
    (r"(ema/)?non_trainable/.*", REPLICATED),
    (r"(ema/)?params/.*", SHARDED),
    (r"opt_state/.*", SHARDED),
)


class TrainState(NamedTuple):
    """Everything that a step reads and writes.

    Attributes:
      step: () int32, finished steps.
      params: trained arrays, by pure-dict path.
      non_trainable: the network's other arrays.
      opt_state: the optimizer's state; with scales, their vectors are in it.
      metric_sums: sums of the loss and of what else the log averages, and the number of images, since the
        last line of the log. Here, not on the host, so that a resumed run writes the same line as an unbroken
        one.
      bad_step: () int32, first step whose loss was not finite, or -1.
      previous_scales: scale vectors at the last record of their statistics (search), else empty.
      ema: moving averages {"params": ..., "non_trainable": ...}, or empty for none.
    """

    step: jax.Array
    params: dict[str, Any]
    non_trainable: dict[str, Any]
    opt_state: Any
    metric_sums: dict[str, jax.Array]
    bad_step: jax.Array
    previous_scales: dict[str, Any]
    ema: dict[str, Any]

    @property
    def network(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(params, non_trainable) of the network that is evaluated and deployed: the moving average where
        there is one."""
        network = self.ema or self._asdict()
        return network["params"], network["non_trainable"]


class Network(NamedTuple):
    """A model taken apart into what is static and what are arrays (plain dicts)."""

    graphdef: Any
    params: dict[str, Any]
    non_trainable: dict[str, Any]


def split_model(model: nnx.Module) -> Network:
    """Takes `model` apart; the arrays are those of the model, not copies."""
    graphdef, params, non_trainable = nnx.split(model, nnx.Param, ...)
    return Network(graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(non_trainable))


def merge_model(graphdef: Any, params: Any, non_trainable: Any) -> Any:
    """The model again. Its variables are new: changing them leaves the given arrays as they are."""
    # Without `copy`, variables of an outer trace would be written inside `grad`, which JAX refuses.
    return nnx.merge(graphdef, params, non_trainable, copy=True)


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
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted training step. The state that it is given is donated: use the one that it returns.

    Args:
      graphdef: of the network.
      tx: the optimizer.
      schedule: learning-rate schedule, for the log only; `tx` already applies it.
      objective: (model, batch) -> (mean loss, sums over the images of the batch).
      log_every: steps after which the running means start again.
      accumulate: parts in which the batch goes through the network, one after the other; the update is made
        by their mean gradient, and batch norm normalises each part by itself.
      ema: decay of the moving averages of a state that has them.
      statistics_mesh: the mesh whose devices normalise by the statistics of their own part of the batch; None
        for those of the whole batch, on however many devices it lies. The loss is then the mean of the
        devices' losses, and running statistics are the mean over the devices.
      sharding: of the returned state, a tree like it; left to the compiler when None.

    Returns:
      `step(state, {"image": (N, H, W, C) float32, ...}) -> (state, means)`, the means being those of the loss
      and of the objective's sums since the last line of the log, this step's learning rate "lr", and
      "bad_step".
    """
    gradients = _gradients(graphdef, objective)
    if accumulate > 1:
        gradients = _accumulated(gradients, accumulate)
    if statistics_mesh is not None:
        gradients = _on_each_device(gradients, statistics_mesh)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, loss, sums, non_trainable = gradients(state.params, state.non_trainable, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)

        size, new_line = batch["image"].shape[0], state.step % log_every == 0
        metric_sums = {k: jnp.where(new_line, jnp.zeros_like(v), v) for k, v in state.metric_sums.items()}
        metric_sums = add_sums(metric_sums, {"loss": loss * size, **sums, "count": size})
        bad_step = jnp.where((state.bad_step < 0) & ~jnp.isfinite(loss), state.step + 1, state.bad_step)
        means = {k: v / metric_sums["count"] for k, v in metric_sums.items() if k != "count"}
        means |= {"lr": jnp.asarray(schedule(state.step)), "bad_step": bad_step}

        averages = state.ema
        if ema is not None:
            network = {"params": params, "non_trainable": non_trainable}
            averages = _moving_average(averages, network, ema, state.step)
        state = state._replace(
            step=state.step + 1,
            params=params,
            non_trainable=non_trainable,
            opt_state=opt_state,
            metric_sums=metric_sums,
            bad_step=bad_step,
            ema=averages,
        )
        return state, means

    out_shardings = None if sharding is None else (sharding, None)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


def init_state(
    network: Network,
    tx: optax.GradientTransformation,
    *,
    sums: Mapping[str, Any],
    previous_scales: dict[str, Any] | None = None,
    ema: bool = False,
) -> TrainState:
    """The state before the first step. It owns its buffers: the step that receives it donates them.

    Args:
      network: its arrays may also be shapes; under `jax.eval_shape` the state is then shapes.
      tx: the optimizer.
      sums: names and dtypes of what the log averages beside the loss, as the objective gives them.
      previous_scales: scale vectors of a search.
      ema: whether moving averages are kept; they start as the network does.
    """
    _, params, non_trainable = network
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        non_trainable=non_trainable,
        opt_state=tx.init(params),
        metric_sums=zero_sums(sums),
        bad_step=jnp.full((), -1, jnp.int32),
        previous_scales=previous_scales or {},
        ema={"params": params, "non_trainable": non_trainable} if ema else {},
    )
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)


# (params, non_trainable, batch) -> (mean gradient, mean loss, sums over the images, non_trainable)
Gradients = Callable[[Any, Any, Batch], tuple[Any, jax.Array, dict[str, jax.Array], Any]]


def _gradients(graphdef: Any, objective: Objective) -> Gradients:
    def gradients(params, non_trainable, batch):
        def loss_fn(params):
            model = merge_model(graphdef, params, non_trainable)
            model.train()
            loss, sums = objective(model, batch)
            return loss, (loss, sums, split_model(model).non_trainable)

        grads, (loss, sums, new_non_trainable) = jax.grad(loss_fn, has_aux=True)(params)
        return grads, loss, sums, new_non_trainable

    return gradients


def _accumulated(gradients: Gradients, count: int) -> Gradients:
    """`gradients` of `count` parts of a batch, one after the other: only one part's activations are alive."""

    def parts(value):
        # Row i goes to part i % count, so that each part is divided over the devices as the batch is and no
        # row moves.
        return value.reshape(-1, count, *value.shape[1:]).swapaxes(0, 1)

    def accumulate(params, non_trainable, batch):
        def add(carry, part):
            total, non_trainable = carry
            grads, loss, sums, non_trainable = gradients(params, non_trainable, part)
            return (jax.tree.map(jnp.add, total, (grads, loss, sums)), non_trainable), None

        batches = {name: parts(value) for name, value in batch.items()}
        first = {name: value[0] for name, value in batches.items()}
        shapes = jax.eval_shape(gradients, params, non_trainable, first)[:3]
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        ((grads, loss, sums), non_trainable), _ = jax.lax.scan(add, (zeros, non_trainable), batches)
        return jax.tree.map(lambda g: g / count, grads), loss / count, sums, non_trainable

    return accumulate


def _on_each_device(gradients: Gradients, mesh: Mesh) -> Gradients:
    """`gradients` of each device's own part of the batch, averaged."""

    def mean_change(old, new):
        if not jnp.issubdtype(new.dtype, jnp.inexact):  # counters, the same on all devices
            return new
        # The mean of the change: what does not change, as the constant scales, stays so to the last bit.
        return old + jax.lax.pmean(new - old, AXES)

    def local(params, non_trainable, batch):
        grads, loss, sums, new = gradients(params, non_trainable, batch)
        non_trainable = jax.tree.map(mean_change, non_trainable, new)
        return jax.lax.pmean(grads, AXES), jax.lax.pmean(loss, AXES), jax.lax.psum(sums, AXES), non_trainable

    whole, divided = PartitionSpec(), PartitionSpec(AXES)
    return jax.shard_map(local, mesh=mesh, in_specs=(whole, whole, divided), out_specs=whole, check_vma=False)


def _moving_average(averages: Any, values: Any, decay: float, step: jax.Array) -> Any:
    """e + (1 - d) (x - e), d = min(decay, (1 + t) / (10 + t)): early averages forget the first draw.

    `optax.incremental_update` computes (1 - d) x + d e, which moves constant scales by rounding.
    """

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


# -- where arrays lie


def make_mesh(fsdp: int = 1, *, data: int | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of shape (data, fsdp) over all devices of the job, or over those given.

    `data` is by default as many as there are: devices / fsdp.

    Raises:
      ValueError: the axes do not fit the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if problems := mesh_problems(data, fsdp, len(devices)):
        raise ValueError("; ".join(problems))
    shape = (len(devices) // fsdp, fsdp)
    # In the order in which they are connected. An axis of a TPU's torus may have to be split for it, which
    # `jax.make_mesh` refuses on most of them.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # Auto is given in words: explicit axes would make the sharding part of every type.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis divided over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(mesh: Mesh, state: Any) -> Any:
    """A tree like `state` (a `TrainState`, of arrays or of their shapes) with the sharding of each leaf, by
    `STATE_TABLE`.

    The rule looks at shapes only, so a momentum buffer lies as its parameter does.

    Raises:
      ValueError: a leaf that the table does not cover; an `fsdp` axis that divides not one array.
    """
    named, treedef = paths.named_leaves(state)
    places = paths.match_rules(STATE_TABLE, named)
    shardings = {
        name: fsdp_sharding(mesh, leaf.shape) if places[name] == SHARDED else replicated(mesh)
        for name, leaf in named.items()
    }
    parts = mesh.shape["fsdp"]
    if parts > 1 and all(sharding.is_fully_replicated for sharding in shardings.values()):
        raise ValueError(
            f"`mesh.fsdp`={parts} divides no axis of any of the {len(named)} arrays of the state, so that "
            "every device would hold all of it: use 1, or a number that divides the widths of the network"
        )
    return treedef.unflatten([shardings[name] for name in named])


def fsdp_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """An array's largest axis that `fsdp` divides is divided along it; a whole copy where there is none."""
    parts = mesh.shape["fsdp"]
    divisible = [axis for axis, size in enumerate(shape) if size >= parts and size % parts == 0]
    if parts == 1 or not divisible:
        return replicated(mesh)
    largest = max(divisible, key=lambda axis: shape[axis])
    return NamedSharding(mesh, PartitionSpec(*[None] * largest, "fsdp"))


def first_device() -> SingleDeviceSharding:
    """The first device of this process."""
    return SingleDeviceSharding(jax.local_devices()[0])


def abstract(tree: Any, sharding: Any = None) -> Any:
    """Shapes and dtypes of a tree of arrays or shapes: on one sharding, or on those of a tree like it; None
    for the sharding of each array itself."""
    if sharding is None:
        sharding = jax.tree.map(lambda leaf: leaf.sharding, tree)

    def shape(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(shape, tree, jax.tree.broadcast(sharding, tree))


def put_state(state: Any, sharding: Any) -> Any:
    """Puts a tree that is whole in every process onto the devices of all of them, as `sharding` says."""

    def put(leaf: Any, place: NamedSharding) -> jax.Array:
        if place.is_fully_addressable:
            return jax.device_put(leaf, place)
        host = jax.device_get(leaf)
        return jax.make_array_from_callback(host.shape, place, lambda index: host[index])

    return jax.tree.map(put, state, sharding)


def put_batch(batch: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Starts the copy of this process's part of a global batch to its devices, and does not wait for it."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}
