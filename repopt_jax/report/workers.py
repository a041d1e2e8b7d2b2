"""Calls functions in processes of their own, each on its share of the processor's cores.

Small networks keep one core busy and no second one: many runs that do not depend on each other are made about
twice as fast on two cores by two processes of one core each. A worker serves one call after the other, so
that its imports are paid once.

A worker ends when its standard input does, in the middle of a call by asking it to stop: it does not outlive
the process that started it, however that one ends. And one that hangs is ended by it: each tells by a second
pipe that it is alive, in a thread of its own, so that a long compilation is no silence.
"""

import contextlib
import logging
import os
import pickle
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

Call = tuple[Callable[..., Any], tuple[Any, ...]]
MOST = 8  # workers by default: each holds programs and data of its own
BEAT_S = 0.5  # between two signs of life
# A worker of which nothing is heard for this many times this many seconds hangs. Times are counted, not the
# clock read: while this process is stopped too (Ctrl-Z, a laptop that sleeps), none pass. Before it has
# imported what it needs it may take longer.
TICKS, TICK_S = 24, 5.0
STARTING = 5 * TICKS


def default_count() -> int:
    """One worker for each core that this process may use, at most `MOST`."""
    return min(len(_cores()), MOST)


class Workers:
    """A context manager with `count` processes, which calls are handed to. 0: calls are made in this process.

    Leaving it by an exception, Ctrl-C among them, asks the running calls to stop and waits for them.
    """

    def __init__(
        self,
        count: int,
        *,
        first: Call | None = None,
        inherit: Sequence[int] = (),
        stop: Callable[[], bool] = lambda: False,
    ):
        """
        Args:
          count: processes.
          first: (function, arguments) that each process calls before all others, such as the import of a file
            that registers networks; its result is dropped.
          inherit: file descriptors that the processes keep open, such as that of a lock.
          stop: of calls in this process.
        """
        self.count = count
        self._first = first
        self._stop = stop
        self._inherit = tuple(inherit)
        self._pool = ThreadPoolExecutor(max(count, 1))
        self._processes: list[subprocess.Popen] = []
        self._hung: dict[int, float] = {}  # process -> seconds of silence
        self._idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()

    def __enter__(self) -> "Workers":
        cores = _cores()
        for index in range(self.count):
            arguments = [sys.executable, "-m", __name__, ",".join(map(str, cores[index :: self.count]))]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            if os.name == "posix":
                beats, end = os.pipe()
                process = subprocess.Popen([*arguments, str(end)], pass_fds=(*self._inherit, end), **pipes)
                os.close(end)
                threading.Thread(target=self._watch, args=(process, beats), daemon=True).start()
            else:
                process = subprocess.Popen(arguments, **pipes)
            _send(self._first, process)
            self._processes.append(process)
            self._idle.put(process)
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # the process has ended, and something was left to write
                process.stdin.close()  # asks it to stop
        self._pool.shutdown(cancel_futures=True)
        for process in self._processes:
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Calls `function(*args, stop=stop)`, where `stop()` says whether it is to end early.

        The function belongs to a module; it, the arguments and the result can be pickled. What it raises is
        raised by the future's `result()`.

        Raises (the future):
          ChildProcessError: the worker has died, or hung and was ended.
        """
        if not self.count:
            future: Future[Any] = Future()
            try:
                future.set_result(function(*args, stop=self._stop))
            except Exception as error:
                future.set_exception(error)
            return future
        return self._pool.submit(self._call, function, args)

    def _call(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        process = self._idle.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if process.poll() is not None:
                raise BrokenPipeError
            _send((function, args), process)
            result, error = pickle.load(process.stdout)
        except (EOFError, OSError, ValueError, pickle.UnpicklingError) as gone:  # ValueError: it is closed
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            if process.pid in self._hung:
                silence = self._hung[process.pid]
                ended = f"hung: nothing was heard of it for {silence:.0f} s, and it was ended"
            else:
                ended = f"has ended (exit code {process.poll()}), perhaps for want of memory"
            raise ChildProcessError(
                f"the process of a run {ended}: run the same command again to continue, with fewer workers "
                "if it happens again"
            ) from gone
        finally:
            self._idle.put(process)
        if error is not None:
            raise error
        return result

    def _watch(self, process: subprocess.Popen, beats: int) -> None:
        """Ends a process that gives no sign of life: what waits for its answer then sees that it is gone."""
        silent, allowed = 0, STARTING
        poll = select.poll()
        poll.register(beats, select.POLLIN)
        while silent < allowed:
            if not poll.poll(1000 * TICK_S):
                silent += 1
                continue
            silent, allowed = 0, TICKS
            if not os.read(beats, 4096):  # it has ended
                break
        else:
            self._hung[process.pid] = silent * TICK_S
            process.kill()
        os.close(beats)


def _send(message: Any, process: subprocess.Popen) -> None:
    """Writes bytes in bytes: the reading thread unpacks the outer ones, which need no import."""
    assert process.stdin is not None
    pickle.dump(pickle.dumps(message), process.stdin)
    process.stdin.flush()


def _cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def main(cores: str, beats: str = "") -> None:
    """Runs a worker: reads calls from standard input and writes results to standard output, both pickled, and
    signs of life to the descriptor `beats`."""
    if beats:
        os.set_inheritable(int(beats), False)
        threading.Thread(target=_beat, args=(int(beats),), daemon=True).start()
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(map(int, cores.split(","))))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the parent asks us to stop
    # That the device waits for data is no news where both share one core.
    logging.getLogger("repopt_jax.train.progress").setLevel(logging.ERROR)
    # Whatever else is printed must not come between the results.
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    stopping = threading.Event()
    calls = _received(stopping)
    wrong = None
    try:
        if (first := pickle.loads(next(calls))) is not None:
            first[0](*first[1])
    except StopIteration:
        return
    except Exception as error:  # every call is answered by it
        wrong = _sendable(error)
    for call in calls:
        try:
            if wrong is not None:
                raise wrong
            # Here and not in the thread that reads: what is unpickled is imported, and may need `first`.
            function, args = pickle.loads(call)
            answer = function(*args, stop=stopping.is_set), None
        except Exception as error:
            answer = None, _sendable(error)
        try:
            pickle.dump(answer, results)
            results.flush()
        except BrokenPipeError:  # nobody waits for it any more
            return
        # Programs of one call are no use to the next, which makes new functions, and they are large.
        jax.clear_caches()


def _beat(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        while True:
            os.write(descriptor, b".")
            time.sleep(BEAT_S)


def _received(stopping: threading.Event) -> Iterator[bytes]:
    """What comes until the end of standard input, which sets `stopping` at once, also during a call."""
    calls: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def read() -> None:
        try:
            while True:
                calls.put(pickle.load(sys.stdin.buffer))
        except (EOFError, pickle.UnpicklingError):
            pass
        finally:
            stopping.set()
            calls.put(None)

    threading.Thread(target=read, daemon=True).start()
    while (call := calls.get()) is not None:
        yield call


def _sendable(error: Exception) -> Exception:
    """The error itself, or where it cannot be pickled, its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


if __name__ == "__main__":
    main(*sys.argv[1:])
