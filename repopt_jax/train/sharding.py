"""Where arrays live: one mesh with axes `data` and `fsdp`, and one table that says where each kind of array
lies.

A batch is divided over both axes. Of the state, what the table calls DIVIDED is copied along `data` and
divided along `fsdp`; what it calls COPIED lies whole on every device. The models carry no sharding;
`jax.jit` inserts the communication. One process or many run the same program, which sees the whole batch:
batch statistics are over the *global* batch, as with synchronised batch norm on several GPUs, unless the step
is made with statistics of each device (`state.make_train_step`).
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from repopt_jax.core import paths
from repopt_jax.train.config import mesh_problems

AXES = ("data", "fsdp")

DIVIDED = "divided along fsdp, by its largest axis that fsdp divides"
COPIED = "a whole copy on every device"

# Path in a `TrainState` -> where the array lies; the first match counts. The second row is every vector of
# scales: of the optimizer's state (kilobytes, read by the update of all the parts of a kernel), those that a
# search trains, and their momentum.
STATE_TABLE: tuple[tuple[str, str], ...] = (
    (r"step|bad_step|window/.*|marks/.*", COPIED),
    (r"(.*/)?scales/.*", COPIED),
    (r"rest/.*|ema/rest/.*", COPIED),
    (r"params/.*|ema/params/.*", DIVIDED),
    (r"opt_state/.*", DIVIDED),
)


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
        name: divided(mesh, leaf.shape) if places[name] == DIVIDED else replicated(mesh)
        for name, leaf in named.items()
    }
    parts = mesh.shape["fsdp"]
    if parts > 1 and all(sharding.is_fully_replicated for sharding in shardings.values()):
        raise ValueError(
            f"`mesh.fsdp`={parts} divides no axis of any of the {len(named)} arrays of the state, so that "
            "every device would hold all of it: use 1, or a number that divides the widths of the network"
        )
    return treedef.unflatten([shardings[name] for name in named])


def divided(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """An array's largest axis that `fsdp` divides is divided along it; a whole copy where there is none."""
    parts = mesh.shape["fsdp"]
    divisible = [axis for axis, size in enumerate(shape) if size >= parts and size % parts == 0]
    if parts == 1 or not divisible:
        return replicated(mesh)
    largest = max(divisible, key=lambda axis: shape[axis])
    return NamedSharding(mesh, PartitionSpec(*[None] * largest, "fsdp"))


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


def meet(reason: str) -> None:
    """Waits until every process of the job is here; nothing to wait for in a job of one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(reason)
