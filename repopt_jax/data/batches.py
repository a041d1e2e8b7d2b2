"""Iterates over a random-access sequence of batches; its whole state is the number of the next batch.

Grain's own iterator over worker processes keeps a state for each worker, which can only be restored with the
same number of workers. A batch here depends on its index alone, so that a run may be resumed with any number.
"""

import multiprocessing
import os
import queue
import re
import signal
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import grain
import numpy as np
from absl import flags

if TYPE_CHECKING:
    # Grain tells type checkers nothing (it has no py.typed). This is what its two classes are to this module;
    # their other methods, such as `map`, are there as well, of unknown type.
    class _IterDataset(Iterable[dict[str, np.ndarray]]):
        def __getattr__(self, name: str) -> Any: ...

    class _DatasetIterator(Iterator[dict[str, np.ndarray]]):
        _closed: bool

        def close(self) -> None: ...

        def __getattr__(self, name: str) -> Any: ...
else:
    _IterDataset, _DatasetIterator = grain.IterDataset, grain.DatasetIterator

HANG_S = 600.0  # worker processes that make no batch for so long hang
# After a worker's death Grain has this long to say so: it looks every second, if it is not stuck.
GRACE_S, TICK_S = 10.0, 0.5


class Batches(_IterDataset):
    """Iterates over `batches` with threads, or with worker processes; `iter` starts at the first batch.

    Args:
      batches: dicts of arrays.
      workers: number of processes that make batches; with 0, threads of this process do.
      prefetch: batches made ahead, by a thread each, or by each worker.
    """

    def __init__(self, batches: grain.MapDataset[dict[str, np.ndarray]], *, workers: int, prefetch: int):
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


class BatchIterator(_DatasetIterator):
    """The iterator of `Batches`. `close()` ends its threads and processes; so does dropping it."""

    def __init__(self, dataset: Batches):
        super().__init__()
        self._dataset = dataset
        self._index = 0
        self._running: Any = None
        self._close_running: Any = None

    def __next__(self) -> dict[str, np.ndarray]:
        if self._closed:
            raise ValueError("the iterator has been closed; make a new one with iter(...)")
        if self._running is None:
            running = self._dataset.starting_at(self._index)
            self._running = _Watched(running, self._dataset.workers) if self._dataset.workers else running
            # Also at exit: worker processes that outlive the interpreter's modules end with a traceback.
            self._close_running = weakref.finalize(self, self._running.close)
        batch = next(self._running)
        self._index += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Returns {"next_index": number of batches given so far}."""
        return {"next_index": self._index}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues where an iterator over equal batches was when its `get_state` returned `state`."""
        self._stop()
        self._index = int(state["next_index"])

    def close(self) -> None:
        """Ends the threads and processes; the iterator gives no more batches."""
        super().close()
        self._stop()

    def _stop(self) -> None:
        if self._running is not None:
            self._close_running()
            self._running = None


class _Watched:
    """Grain's iterator over worker processes, which says in one sentence that a worker has died or hangs.

    Grain waits without end for a worker that makes no batch, and for one that was killed in the middle of a
    message: what is left of it has no end, because this process holds the pipe open too. So a thread waits
    for Grain, and is left behind where Grain does not come back.
    """

    def __init__(self, running: Any, count: int):
        self._running = running
        self._count = count
        self._others = set(multiprocessing.active_children())  # child processes that are not workers
        self._workers: set[Any] = set()  # Grain starts them when the first batch is asked for
        self._started = False
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._unanswered = 0
        threading.Thread(target=_fetch, args=(running, self._wanted, self._answers), daemon=True).start()

    def __next__(self) -> dict[str, np.ndarray]:
        self._wanted.put(True)
        self._unanswered += 1
        waited, since_death, hung = 0.0, 0.0, False
        while True:
            try:
                batch, error = self._answers.get(timeout=TICK_S)
                break
            except queue.Empty:
                waited += TICK_S
            self._find_workers()
            dead = [worker for worker in self._workers if worker.exitcode]
            since_death += TICK_S if dead or hung else 0
            if waited >= HANG_S and not hung:
                hung = True
                for worker in self._workers:
                    worker.kill()  # also one that was stopped
            if since_death > GRACE_S:
                self.close()
                raise self._ended(dead[0].exitcode if dead else "?", hung) from None
        self._unanswered -= 1
        self._find_workers()
        self._started = True
        if isinstance(error, RuntimeError) and "Worker process was terminated" in str(error):
            code = re.search(r"exit code (-?\d+)", str(error))
            raise self._ended(code[1] if code else "?", hung) from error
        if error is not None:
            raise error
        return batch

    def _find_workers(self) -> None:
        if not self._started:
            self._workers |= set(multiprocessing.active_children()) - self._others

    def _ended(self, code: Any, hung: bool) -> ChildProcessError:
        why = f"has made no batch for {HANG_S:g} s, and was ended" if hung else "has ended"
        return ChildProcessError(
            f"a process that reads the images (`data.workers`={self._count}) {why} (exit code {code}), "
            "perhaps for want of memory or because a disk does not answer: run the same again to continue, "
            "with fewer workers if it happens again"
        )

    def close(self) -> None:
        """Ends the thread and the processes; by force where Grain has not come back with a batch, since two
        threads must not read what a dead worker has left."""
        self._wanted.put(False)
        if not self._unanswered:
            self._running.close()
            return
        self._find_workers()
        for worker in self._workers:
            worker.kill()
            worker.join()


def _fetch(running: Any, wanted: queue.SimpleQueue, answers: queue.SimpleQueue) -> None:
    """Answers each wish with a batch or with what Grain raised."""
    while wanted.get():
        try:
            answers.put((next(running), None))
        except BaseException as error:
            answers.put((None, error))


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
