"""What a run measures and shows while it trains: scale statistics, its speed, a progress bar."""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

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
