"""Where arrays live: one mesh with axes `data` and `fsdp`, and one rule for each kind of array.

A batch is divided over both axes. State is copied to every device along `data` and, where `fsdp` is larger
than 1, divided along `fsdp`. The models carry no sharding; `jax.jit` inserts the communication. Because the
program sees the whole batch, batch statistics are over the *global* batch, as with synchronised batch norm on
several GPUs.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(fsdp: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of shape (devices / fsdp, fsdp) over all devices of the job, or over those given.

    Raises:
      ValueError: `fsdp` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(f"`fsdp`={fsdp} must divide the number of devices, {len(devices)}")
    shape = (len(devices) // fsdp, fsdp)
    # Auto is given in words: without it `make_mesh` makes explicit axes, whose sharding is part of every
    # type.
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis divided over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(mesh: Mesh, tree: Any) -> Any:
    """One sharding for each leaf: its largest axis that `fsdp` divides is divided, every other leaf is
    replicated.

    The rule looks at shapes only, so a momentum buffer lies as its parameter does.
    """
    return jax.tree.map(lambda leaf: _divide_largest(mesh, leaf.shape), tree)


def put_batch(batch: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Starts the copy of this process's part of a global batch to its devices, and does not wait for it."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def meet(reason: str) -> None:
    """Waits until every process of the job is here; nothing to wait for in a job of one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(reason)


def _divide_largest(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    parts = mesh.shape["fsdp"]
    divisible = [axis for axis, size in enumerate(shape) if size >= parts and size % parts == 0]
    if parts == 1 or not divisible:
        return replicated(mesh)
    largest = max(divisible, key=lambda axis: shape[axis])
    return NamedSharding(mesh, PartitionSpec(*[None] * largest, "fsdp"))
