"""The next batch, made while the device works on the last one, and how long the device had to wait for it."""

import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

logger = logging.getLogger(__name__)

# A device that waits for more than this share of the time is worth a warning; in windows of the log shorter
# than this many seconds a single slow file is already that much.
WORTH_A_WARNING = 0.1
LEAST_WINDOW_S = 0.5


class Feeder:
    """Takes batches from an iterator in a thread of its own, one ahead of the training step.

    The order of calls is `ask()`, `take()` for the first batch, and for each step: start it, `stepped(its
    result)`, and `take()` the batch of the next one.
    """

    def __init__(self, batches: Any):
        """`batches` is an iterator with `get_state`. Until `close` it belongs to the feeder."""
        self._batches = batches
        self._batch_thread = ThreadPoolExecutor(1, thread_name_prefix="next-batch")
        self._step_thread = ThreadPoolExecutor(1, thread_name_prefix="step-done")
        self._asked: Future | None = None
        self._done: Future | None = None  # when the step that was started last is done
        self._taken: tuple[float, float] | None = None  # when the last batch was there, and was wanted
        self._waited = 0.0
        self.position: Any = batches.get_state()

    def ask(self) -> None:
        """Has the next batch made. `position` is that of this batch until the one after is asked for."""
        self.position = self._batches.get_state()
        self._asked = self._batch_thread.submit(_timed_next, self._batches)

    def take(self) -> dict[str, Any]:
        """The batch that was asked for; waits for it, and raises what making it raised."""
        wanted = time.perf_counter()
        if self._asked is None:
            raise RuntimeError("`take` without `ask`: there is no batch on its way")
        asked, self._asked = self._asked, None
        batch, ready = asked.result()
        self._taken = (ready, wanted)
        return batch

    def stepped(self, result: Any, *, more: bool = True) -> None:
        """Tells that the step was started which gives `result` (arrays), and asks for the next batch if there
        is to be `more`.

        Waits until the step before is done: two at a time keep a device busy, and more would only hold
        batches in its memory and delay a stop.
        """
        if more:
            self.ask()
        if self._done is not None:
            done = self._done.result()
            if self._taken is not None:
                ready, wanted = self._taken
                self._waited += max(0.0, ready - max(done, wanted))
        self._done = self._step_thread.submit(_when_done, result)

    def waited(self) -> float:
        """Seconds since the last reading in which the device had nothing to do but wait for a batch."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """Ends the threads, after the batch that is being made."""
        for thread in (self._batch_thread, self._step_thread):
            thread.shutdown(wait=True, cancel_futures=True)


class WaitWarning:
    """Tells, at most once an epoch, that the device waits for data."""

    def __init__(self, name: str, *, workers: int):
        """`name` of the run; `workers` that it has."""
        self._name, self._workers = name, workers
        self._first = True
        self._told: int | None = None

    def look(self, share: float, *, seconds: float, images_per_s: float, epoch: int) -> None:
        """Warns if `share` of a window of `seconds` was spent waiting. The first window does not count: in it
        the workers start."""
        first, self._first = self._first, False
        if first or share <= WORTH_A_WARNING or seconds < LEAST_WINDOW_S or self._told == epoch:
            return
        self._told = epoch
        logger.warning(
            "%s: %.0f %% of the time the device waits for data (%s images/s): raise `data.workers` "
            "(now %d; this machine has %d cores), or make the images smaller beforehand",
            *(self._name, 100 * share, f"{images_per_s:,.0f}", self._workers, os.cpu_count() or 1),
        )


def _timed_next(batches: Iterator[Any]) -> tuple[Any, float]:
    return next(batches), time.perf_counter()


def _when_done(result: Any) -> float:
    jax.block_until_ready(result)
    return time.perf_counter()
