"""Checkpoints of a run: state, position in the data and clock as one unit. The only training module that
knows Orbax.

A checkpoint is written beside its final place and renamed when it is complete, so that a process killed at
any moment leaves the one before it whole. The last two are kept. What is restored goes to the shardings that
the caller asks for, whatever the number of devices that wrote it; the number of *processes* must stay the
same, as each has its part of the data.
"""

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from repopt_jax.train.state import TrainState

KEPT = 2


class Checkpoints:
    """The checkpoints of one run, newest last. A context manager."""

    def __init__(self, directory: str | Path, *, writing: bool = False):
        """Opens `directory`, for the run that writes it or for reading.

        The writer makes it if it is missing, and removes what an interrupted save left. A reader changes
        nothing: a save that looks interrupted may be one that is under way.

        Raises:
          FileNotFoundError: reading, and the directory is missing.
        """
        self.directory = Path(directory).absolute()
        if not writing and not self.directory.is_dir():
            raise FileNotFoundError(f"{self.directory.parent} has no checkpoint yet: let the run train")
        # The annotations of Orbax do not admit its own policies.
        always: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
        newest: Any = ocp.training.preservation_policies.LatestN(KEPT)
        self._orbax = ocp.training.Checkpointer(
            str(self.directory),
            save_decision_policy=always,
            preservation_policy=newest,
            cleanup_tmp_directories=writing,
        )

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, None if there is none."""
        newest = self._orbax.latest
        return None if newest is None else newest.step

    def save(self, step: int, state: TrainState, batches: Any, *, seconds: float) -> None:
        """Writes one checkpoint; when this returns it is complete.

        Args:
          step: its number.
          state: the state after `step` steps.
          batches: the Grain iterator, positioned at the batch of step `step` + 1.
          seconds: training time so far.
        """
        model, trainer = _parts(state)
        # The network is an item of its own so that it can be read without its optimizer.
        items = {"model": model, "trainer": trainer, "data": batches, "clock": {"seconds": seconds}}
        self._orbax.save_checkpointables(step, items, overwrite=True)

    def restore(self, state: TrainState, batches: Any) -> tuple[TrainState, float]:
        """Reads the newest checkpoint.

        Args:
          state: says which shapes, dtypes and shardings to restore to; its values are not used.
          batches: the Grain iterator, which is moved to its saved position.

        Returns:
          The state, and the seconds that `save` was given.
        """
        model, trainer = _parts(jax.tree.map(_abstract, state))
        items = {"model": model, "trainer": trainer, "data": batches, "clock": {"seconds": 0.0}}
        loaded = self._orbax.load_checkpointables(self.latest, items)
        fields = {**loaded["model"], **loaded["trainer"]}
        return TrainState(**fields), float(loaded["clock"]["seconds"])

    def load_network(self, params: Any, rest: Any) -> tuple[Any, Any]:
        """The network alone of the newest checkpoint, to the shapes and shardings of `params` and `rest`."""
        target = jax.tree.map(_abstract, {"params": params, "rest": rest})
        loaded = self._orbax.load_checkpointables(self.latest, {"model": target})["model"]
        return loaded["params"], loaded["rest"]

    def close(self) -> None:
        self._orbax.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _parts(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    fields = state._asdict()
    model = {name: fields.pop(name) for name in ("params", "rest")}
    return model, fields


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
