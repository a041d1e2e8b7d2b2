"""Iterates over a random-access sequence of batches; its whole state is the number of the next batch.

Grain's own iterator over worker processes keeps a state for each worker, which can only be restored with the
same number of workers. A batch here depends on its index alone, so that a run may be resumed with any number.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

HANG_S = 600.0  # worker processes that make no batch for so long hang


class Batches(grain.IterDataset):
    """Iterates over `batches` with threads, or with worker processes; `iter` starts at the first batch.

    Args:
      batches: dicts of arrays.
      workers: number of processes that make batches; with 0, threads of this process do.
      prefetch: batches made ahead, by a thread each, or by each worker.
    """

    def __init__(self, batches: grain.MapDataset, *, workers: int, prefetch: int):
        super().__init__()
        self._batches = batches
        self.workers = workers
        self._prefetch = prefetch

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self)

    def starting_at(self, index: int) -> Any:
        """Grain's iterator over the batches from `index` on."""
        # A worker makes its batches one after the other; `prefetch` is how many wait in it to be fetched.
        ahead = 0 if self.workers else self._prefetch
        options = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
        dataset = self._batches.slice(slice(index, None)).to_iter_dataset(options)
        if self.workers:
            # Grain reads absl flags when it starts workers, and fails in a program that has not parsed any.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            buffer = max(1, self._prefetch)
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(self.workers, per_worker_buffer_size=buffer),
                worker_init_fn=_tie_to_parent,
            ).map(_copy)
        return iter(dataset)


class BatchIterator(grain.DatasetIterator):
    """The iterator of `Batches`. `close()` ends its threads and processes; so does dropping it."""

    def __init__(self, dataset: Batches):
        super().__init__()
        self._dataset = dataset
        self._index = 0
        self._running: Any = None
        self._others: set[Any] = set()  # child processes that are not ours
        self._close_running: Any = None

    def __next__(self) -> dict[str, np.ndarray]:
        if self._closed:
            raise ValueError("the iterator has been closed; make a new one with iter(...)")
        if self._running is None:
            self._others = set(multiprocessing.active_children())
            self._running = self._dataset.starting_at(self._index)
            # Also at exit: worker processes that outlive the interpreter's modules end with a traceback.
            self._close_running = weakref.finalize(self, self._running.close)
        with self._watched():
            batch = next(self._running)
        self._index += 1
        return batch

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Says it in one sentence if a worker dies, and ends the workers if no batch comes for HANG_S, which
        Grain would wait for without end."""
        if not self._dataset.workers:
            yield
            return
        hung = threading.Event()

        def end_workers() -> None:
            hung.set()
            for worker in set(multiprocessing.active_children()) - self._others:
                worker.kill()  # also one that was stopped

        timer = threading.Timer(HANG_S, end_workers)
        timer.daemon = True
        timer.start()
        try:
            yield
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                raise
            why = f"has made no batch for {HANG_S:g} s, and was ended" if hung.is_set() else "has ended"
            code = re.search(r"exit code (-?\d+)", str(error))
            raise ChildProcessError(
                f"a process that reads the images (`data.workers`={self._dataset.workers}) {why} "
                f"(exit code {code[1] if code else '?'}), perhaps for want of memory or because a disk does "
                "not answer: run the same again to continue, with fewer workers if it happens again"
            ) from error
        finally:
            timer.cancel()

    def get_state(self) -> dict[str, int]:
        """Returns {"next_index": number of batches given so far}."""
        return {"next_index": self._index}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues where an iterator over equal batches was when its `get_state` returned `state`."""
        self._stop()
        self._index = int(state["next_index"])

    def close(self) -> None:
        super().close()
        self._stop()

    def _stop(self) -> None:
        if self._running is not None:
            self._close_running()
            self._running = None


def _tie_to_parent(worker: int, count: int) -> None:
    """Initialises a worker so that it ends when its parent ends, for whatever reason, and not before.

    Signals are ignored, because Ctrl-C and the signals of a cluster reach all processes of a group, and the
    parent needs batches until it has stopped its run cleanly.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_after, args=(multiprocessing.parent_process(),), daemon=True).start()


def _exit_after(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _copy(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Copies a worker's arrays out of shared memory: views into it would dangle once it is released."""
    return {name: np.array(array) for name, array in batch.items()}
