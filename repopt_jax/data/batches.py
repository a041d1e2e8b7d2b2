"""Iteration over a random-access sequence of batches, whose whole state is how many have been given.

Grain's own iterator over worker processes keeps a state for each worker, which only the same number of
workers can take up again. Here a run may be resumed with other workers, since a batch depends on its index
alone.
"""

import multiprocessing
import os
import signal
import threading
import weakref
from typing import Any

import grain
import numpy as np
from absl import flags


class Batches(grain.IterDataset):
    """Iterates over `batches` with threads, or with worker processes; `iter` starts at the first batch.

    Args:
      batches: dicts of arrays.
      workers: processes that make batches; 0: threads of this one do.
      prefetch: batches made ahead, by a thread each, or by each worker.
    """

    def __init__(self, batches: grain.MapDataset, *, workers: int, prefetch: int):
        super().__init__()
        self._batches = batches
        self._workers = workers
        self._prefetch = prefetch

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self)

    def starting_at(self, index: int) -> Any:
        """Grain's iterator over the batches from `index` on."""
        # Inside a worker batches are made one after the other; `prefetch` counts those that wait to be
        # fetched.
        ahead = 0 if self._workers else self._prefetch
        options = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
        dataset = self._batches.slice(slice(index, None)).to_iter_dataset(options)
        if self._workers:
            # Grain reads absl flags when it starts workers, and fails in a program that has not parsed any.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            buffer = max(1, self._prefetch)
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=buffer),
                worker_init_fn=_follow_the_parent,
            ).map(_owned)
        return iter(dataset)


class BatchIterator(grain.DatasetIterator):
    """The iterator of `Batches`. `close()` ends its threads and processes; so does dropping it."""

    def __init__(self, dataset: Batches):
        super().__init__()
        self._dataset = dataset
        self._index = 0
        self._running: Any = None
        self._end: Any = None

    def __next__(self) -> dict[str, np.ndarray]:
        if self._closed:
            raise ValueError("the iterator has been closed; make a new one with iter(...)")
        if self._running is None:
            self._running = self._dataset.starting_at(self._index)
            # Also at exit: worker processes that outlive the interpreter's modules end with noise.
            self._end = weakref.finalize(self, self._running.close)
        batch = next(self._running)
        self._index += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """{"next_index": number of batches given so far}."""
        return {"next_index": self._index}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues where an iterator over equal batches was when it gave `state`."""
        self._stop()
        self._index = int(state["next_index"])

    def close(self) -> None:
        super().close()
        self._stop()

    def _stop(self) -> None:
        if self._running is not None:
            self._end()
            self._running = None


def _follow_the_parent(worker: int, count: int) -> None:
    """In a worker: it ends when its parent does, however that ends, and not before. A Ctrl-C, and what a
    cluster sends, reach all processes of a group, and the parent wants batches until its run has stopped in
    order."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _owned(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A copy: what workers send lies in shared memory, which must not be outlived by views of it."""
    return {name: np.array(array) for name, array in batch.items()}
