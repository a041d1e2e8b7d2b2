"""What a run tells: JSON lines, TensorBoard, a progress bar, and the statistics of searched scales."""

import contextlib
import errno
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from repopt_jax.train.tasks import told

logger = logging.getLogger(__name__)

Vectors = Mapping[str, Mapping[str, Any]]


def scale_statistics(scales: Vectors, previous: Vectors) -> dict[str, dict[str, dict[str, float]]]:
    """How each scale vector stands, and how far it moved.

    Args:
      scales: layer path -> branch -> (out,) vector.
      previous: the same at the record before; pass `scales` again for the first one.

    Returns:
      Layer path -> branch -> mean, std, min, max, rms (root mean square), negative (a count) and rms_change
      (root mean square of the difference from `previous`).
    """
    return {
        path: {name: _vector_statistics(v, previous[path][name]) for name, v in vectors.items()}
        for path, vectors in scales.items()
    }


def _vector_statistics(vector: Any, previous: Any) -> dict[str, float]:
    v = np.asarray(vector, np.float64)
    moved = v - np.asarray(previous, np.float64)
    return {
        "mean": float(v.mean()),
        "std": float(v.std()),
        "min": float(v.min()),
        "max": float(v.max()),
        "rms": float(np.sqrt((v**2).mean())),
        "negative": int((v < 0).sum()),
        "rms_change": float(np.sqrt((moved**2).mean())),
    }


class MetricsWriter:
    """Appends records to `metrics.jsonl`, one JSON object a line, and to TensorBoard. A context manager."""

    def __init__(
        self,
        directory: str | Path,
        *,
        resume_step: int | None,
        evaluated: bool = True,
        tensorboard: bool = False,
    ):
        """Opens the file for a run that starts after `resume_step`, or anew for None.

        Lines past that step were written by a run that was killed after its last checkpoint. They are
        dropped, so that the file ends as that of an unbroken run; and so is the evaluation of that step,
        unless it counts as `evaluated`.

        Raises:
          ImportError: TensorBoard is asked for and tensorboardX is not installed.
          OSError: the file cannot be written.
        """
        # One process writes; the others hold the same numbers and drop them.
        writes = jax.process_index() == 0
        path = Path(directory) / "metrics.jsonl"
        self._path = path if writes else Path(os.devnull)
        with self._one_sentence():
            if writes:
                _drop_after(path, resume_step, evaluated)
            # Without a buffer: what could not be written is not tried again when the file is closed.
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
        tensorboard = tensorboard and writes
        self._board = _open_board(Path(directory), resume_step) if tensorboard else None

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes one record; it has a "kind" and a "step".

        Raises:
          OSError: it cannot be written.
        """
        line = (json.dumps(record) + "\n").encode()
        with self._one_sentence():
            while line:
                line = line[self._file.write(line) or 0 :]
        if self._board is not None:
            for name, value in _scalars(record):
                self._board.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def sync(self) -> None:
        """Waits until all records are on disk: a checkpoint promises the lines up to its step.

        Raises:
          OSError: they cannot be written.
        """
        with self._one_sentence():
            _sync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _one_sentence(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise type(error)(f"cannot write to {self._path}: {error.strerror or error}") from error


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without a half-written last one; none if there is no file."""
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _drop_after(path: Path, step: int | None, evaluated: bool) -> None:
    kept = [] if step is None else [r for r in read_records(path) if r["step"] <= step]
    if not evaluated:
        kept = [r for r in kept if not (r["kind"] == "eval" and r["step"] == step)]
    replacement = path.with_suffix(".tmp")
    with open(replacement, "w", encoding="utf-8") as file:
        file.write("".join(json.dumps(r) + "\n" for r in kept))
        file.flush()
        _sync(file.fileno())
    replacement.replace(path)


def _sync(file: int) -> None:
    try:
        os.fsync(file)
    except OSError as error:  # os.devnull and some network file systems cannot
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise


def _open_board(directory: Path, resume_step: int | None) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "`tensorboard`=True needs tensorboardX: install `repopt_jax[tensorboard]`, or set it to False"
        ) from error
    purge = None if resume_step is None else resume_step + 1
    return SummaryWriter(str(directory / "tensorboard"), purge_step=purge)


def _scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name not in ("step", "kind"):
            yield prefix + name, value


class Stopwatch:
    """Seconds and steps of training since the last reading, without its pauses."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._since, self._steps = time.perf_counter(), 0

    def tick(self) -> None:
        self._steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside does not count."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def read(self) -> tuple[float, int]:
        """Seconds and steps since the last reading, at least one step; starts anew."""
        seconds, steps = time.perf_counter() - self._since, max(self._steps, 1)
        self.restart()
        return seconds, steps


class ProgressBar:
    """A bar with loss, images/s and remaining time; without a terminal, a logged line an epoch."""

    def __init__(self, name: str, task: str, *, total: int, start: int, shown: bool):
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (shown and console.is_terminal),
        )
        self._name, self._task, self._total = name, task, total
        self._bar = self._progress.add_task(name, total=total, completed=start, told="compiling")
        self._last: Mapping[str, Any] = {}

    def update(self, record: Mapping[str, Any]) -> None:
        """Shows a "train" record."""
        self._last = record
        parts = [f"loss {record['loss']:.3f}"]
        if "accuracy" in record:
            parts.append(f"accuracy {record['accuracy']:.1%}")
        parts.append(f"{record['images_per_s']:,.0f} images/s")
        if record["data_wait"] > 0.1:
            parts.append(f"waits for data {record['data_wait']:.0%}")
        self._progress.update(self._bar, completed=record["step"], told="  ".join(parts))

    def end_epoch(self, epoch: int, evaluation: Mapping[str, Any] | None) -> None:
        """Tells that an epoch is over: through `logging` if there is no bar, above the bar if evaluated."""
        parts = [f"{self._name}: epoch {epoch}"]
        if self._last:
            parts.append(f"loss {self._last['loss']:.3f}, {self._last['images_per_s']:,.0f} images/s")
        if evaluation is not None:
            parts.append(told(self._task, evaluation))
        if self._progress.disable:
            logger.info(", ".join(parts))
        elif evaluation is not None:
            self._progress.console.log(", ".join(parts))

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()
