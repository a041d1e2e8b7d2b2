"""How a run goes: batches made ahead of their step, the time that steps and batches take, and what is shown
of it."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from repopt_jax.train.tasks import format_metrics

logger: Final = logging.getLogger(__name__)

# A device that waits for data for more than this share of the time is worth a warning; but not where the
# log's line spans fewer seconds than this, in which a single slow file is already that much.
WORTH_A_WARNING = 0.1
LEAST_SECONDS = 0.5
# Seconds without a terminal until the first line inside an epoch, and the longest time between two lines.
FIRST_LINE_S, LONGEST_S = 30.0, 600.0
LOADING_S = 5.0  # what is done before needs no line


class Feeder:
    """Makes batches in a thread of its own, one ahead of the training step, and measures how long the device
    waits for them.

    The order of calls is `request()`, `take()` for the first batch, and for each step: start it,
    `step_started(its result)`, and `take()` the batch of the next one.
    """

    def __init__(self, batches: Any):
        """`batches` is an iterator with `get_state`. Until `close` only the feeder may use it."""
        self._batches = batches
        self._batch_thread = ThreadPoolExecutor(1, thread_name_prefix="next-batch")
        self._step_thread = ThreadPoolExecutor(1, thread_name_prefix="step-done")
        self._requested: Future  # the batch that is being made, and when it was ready
        self._taken: tuple[float, float]  # when the last batch was ready, and when it was wanted
        self._done: Future | None = None  # when the step that was started last is done
        self._waited = 0.0
        self.position: Any = batches.get_state()

    def request(self) -> None:
        """Starts to make the next batch, of which `position` is from here on."""
        self.position = self._batches.get_state()
        self._requested = self._batch_thread.submit(lambda: (next(self._batches), time.perf_counter()))

    def take(self) -> dict[str, Any]:
        """Returns the batch that was requested; waits for it, and raises what making it raised."""
        wanted = time.perf_counter()
        batch, ready = self._requested.result()
        self._taken = ready, wanted
        return batch

    def step_started(self, result: Any, *, more: bool = True) -> None:
        """Takes note that the step was started which gives `result` (arrays), and requests the next batch if
        there is to be `more`.

        Waits until the step before is done: two at a time keep a device busy, and more would only hold
        batches in its memory and delay a stop.
        """
        if more:
            self.request()
        if self._done is not None:
            ready, wanted = self._taken
            self._waited += max(0.0, ready - max(self._done.result(), wanted))
        self._done = self._step_thread.submit(lambda: (jax.block_until_ready(result), time.perf_counter())[1])

    def waited(self) -> float:
        """Seconds since the last reading in which the device had nothing to do but wait for a batch."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """Ends the threads, after the batch that is being made."""
        for thread in (self._batch_thread, self._step_thread):
            thread.shutdown(wait=True, cancel_futures=True)


class Stopwatch:
    """Measures seconds and steps of training since the last reading, without the pauses."""

    def __init__(self) -> None:
        self._since, self._steps = time.perf_counter(), 0

    def tick(self) -> None:
        """Counts a step."""
        self._steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time inside."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def read(self) -> tuple[float, int]:
        """Seconds and steps since the last reading, at least one step; starts again."""
        now, since, steps = time.perf_counter(), self._since, self._steps
        self._since, self._steps = now, 0
        return now - since, max(steps, 1)


class WaitWarning:
    """Warns, at most once an epoch, that the device waits for data."""

    def __init__(self, name: str, *, workers: int):
        """`name` of the run; `workers` that it has."""
        self._name, self._workers = name, workers
        self._first, self._warned_in = True, -1  # the epoch of the last warning

    def check(self, record: Mapping[str, Any], *, seconds: float) -> None:
        """Looks at a "train" record that spans `seconds`. The first does not count: in it the workers
        start."""
        first, self._first = self._first, False
        epoch, wait = int(record["epoch"]), record["data_wait"]
        if first or wait <= WORTH_A_WARNING or seconds < LEAST_SECONDS or self._warned_in == epoch:
            return
        self._warned_in = epoch
        logger.warning(
            "%s: %.0f %% of the time the device waits for data (%s images/s): raise `data.workers` "
            "(now %d; this machine has %d cores), or make the images smaller beforehand",
            *(self._name, 100 * wait, f"{record['images_per_s']:,.0f}", self._workers, os.cpu_count() or 1),
        )


class ProgressBar:
    """A bar with loss, images/s and remaining time. Without a terminal, lines go to `logging`, each with the
    time of day: what is begun, each epoch, and within an epoch one after FIRST_LINE_S seconds, and further
    ones at intervals that double up to LONGEST_S."""

    def __init__(self, name: str, task: str, *, split: str, shown: bool):
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (shown and console.is_terminal),
        )
        self._name, self._task, self._split = name, task, split
        self._bar = self._progress.add_task(name, total=None, text="")
        self._last: Mapping[str, Any] = {}
        self._total = 0
        self._waiting: threading.Timer | None = None
        self._line_at, self._interval = time.perf_counter(), FIRST_LINE_S

    def begin(self, *, total: int, start: int) -> None:
        """Says how many steps the run has, and after which it goes on."""
        self._forget()
        self._total = total
        self._progress.update(self._bar, total=total, completed=start)

    def say(self, what: str, *, after: float = 0.0) -> None:
        """Shows what the run does before its first step; without a terminal, if it takes more than `after`
        seconds."""
        self._progress.update(self._bar, text=what)
        self._forget()
        if self._progress.disable and after:
            self._waiting = threading.Timer(after, self._log, (what,))
            self._waiting.daemon = True
            self._waiting.start()
        elif self._progress.disable:
            self._log(what)

    def _forget(self) -> None:
        """Cancels the message that is still to come of what was begun before."""
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting.join()
            self._waiting = None

    def tick(self, step: int) -> None:
        """Takes note of a step; without a terminal, logs a line where the last one is long ago."""
        if self._progress.disable and time.perf_counter() - self._line_at >= self._interval:
            self._log(", ".join([f"step {step} of {self._total}", *self._speed()]))
            self._interval = min(2 * self._interval, LONGEST_S)

    def update(self, record: Mapping[str, Any]) -> None:
        """Shows a "train" record."""
        self._last = record
        parts = [f"loss {record['loss']:.3f}"]
        if "accuracy" in record:
            parts.append(f"accuracy {record['accuracy']:.1%}")
        parts.append(f"{record['images_per_s']:,.0f} images/s")
        if record["data_wait"] > WORTH_A_WARNING:
            parts.append(f"waits for data {record['data_wait']:.0%}")
        self._progress.update(self._bar, completed=record["step"], text="  ".join(parts))

    def end_epoch(self, epoch: int, evaluation: Mapping[str, Any] | None) -> None:
        """Shows that an epoch is over: through `logging` if there is no bar, above the bar if evaluated."""
        parts = [f"epoch {epoch}", *self._speed()]
        if evaluation is not None:
            parts.append(format_metrics(self._task, evaluation, split=self._split))
        if self._progress.disable:
            self._log(", ".join(parts))
        elif evaluation is not None:
            self._progress.console.log(f"{self._name}: {', '.join(parts)}")

    def _speed(self) -> list[str]:
        if not self._last:
            return []
        return [f"loss {self._last['loss']:.3f}, {self._last['images_per_s']:,.0f} images/s"]

    def _log(self, text: str) -> None:
        logger.info("%s %s: %s", time.strftime("%H:%M:%S"), self._name, text)
        self._line_at = time.perf_counter()

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._forget()
        self._progress.stop()
