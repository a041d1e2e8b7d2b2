"""A job of one or several processes: joining it, doing what may fail in one of them, and stopping it from
outside.

All processes run the same program and wait for each other whenever arrays are exchanged. What only one of
them finds out, for instance that a folder is missing, it must pass on, or the others wait for ever:
`in_all_processes` does that. A process that dies is noticed at once where a connection breaks while another
process reads from it (on the CPU; in about half of the cases gloo waits on for the message all the same),
and otherwise by its missing heartbeats, HEARTBEAT_S later at the most, when JAX ends the others.
"""

import contextlib
import glob
import importlib.util
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

# What a process can find wrong before training starts; everything else is a bug, and ends the process.
FAILURES = (ValueError, TypeError, KeyError, OSError, ImportError)
WAIT_S = 300  # for process 0 to answer; as long as JAX waits
SHUTDOWN_S = 60  # for the other processes at the end of the program
HEARTBEAT_S = 100  # without a heartbeat, a process counts as dead; JAX's own default
MESSAGE_BYTES = 4096  # a message to the other processes, encoded, is cut to this length


def join(coordinator: str = "", count: int | None = None, index: int | None = None) -> None:
    """Makes this process one of a job of several, before JAX looks at its devices. Does nothing in a job of
    one.

    Args:
      coordinator: `host:port` of process 0, where the others find it. Empty, with the other two left out: in
        a SLURM step of several tasks (one for each GPU) and on the hosts of a TPU pod all three are found in
        the environment, and anywhere else the job is this process.
      count: processes of the job.
      index: of this process, from 0.

    Raises:
      ValueError: only some of the three are given, or they are out of range.
      OSError: nobody answers at `coordinator` for 5 minutes, or there is no such host. (Where process 0 waits
        for others in vain, JAX itself ends it after these.)
      RuntimeError: JAX has already started.
    """
    if not coordinator and count is None and index is None:
        if cluster(os.environ) is not None:
            jax.distributed.initialize(**_timeouts())
        return
    if not coordinator or count is None or index is None:
        raise ValueError(
            f"--coordinator={coordinator or None}, --processes={count} and --process={index} belong "
            "together: give all three, or none in a SLURM step and on a TPU pod"
        )
    if not 0 <= index < count:
        raise ValueError(f"--process={index} of --processes={count}: they are counted from 0 to {count - 1}")
    if not coordinator.rpartition(":")[2].isdigit():
        raise ValueError(f"--coordinator={coordinator!r} must be host:port, for instance node0:1234")
    if count > 1:
        if index > 0:
            _reach(coordinator, WAIT_S)
        jax.distributed.initialize(coordinator, count, index, **_timeouts())


def _timeouts() -> dict[str, Any]:
    return {"heartbeat_timeout_seconds": HEARTBEAT_S, "shutdown_timeout_seconds": SHUTDOWN_S}


def _reach(coordinator: str, seconds: float) -> None:
    """Waits until somebody listens there. JAX would wait as well, and then end the process with its stack."""
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if isinstance(error, socket.gaierror) or time.monotonic() > end:
                raise OSError(
                    f"nobody answers at --coordinator={coordinator} ({error.strerror or error}): give the "
                    "host and a free port of process 0, the same to all, and start that one as well"
                ) from error
        time.sleep(0.2)


def cluster(environment: Mapping[str, str], *, devices: str = "/dev") -> str | None:
    """The kind of job that the environment shows: "slurm", a step of several tasks, "tpu", a host with TPUs
    and libtpu, which may be one of a pod, or None. JAX itself then finds the address, the count and the
    index."""
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        return "slurm"
    chips = glob.glob(f"{devices}/accel[0-9]*") + glob.glob(f"{devices}/vfio/[0-9]*")
    usable = importlib.util.find_spec("libtpu") is not None and environment.get("JAX_PLATFORMS") != "cpu"
    return "tpu" if chips and usable else None


def in_all_processes(doing: str, act: Callable[[], T], *, describe: Callable[[T], str] | None = None) -> T:
    """Calls `act()` in every process and returns its result; where it fails in one of them, raises in all.

    Args:
      doing: what `act` does, for messages: "open the data".
      act: works on this process alone; it must not exchange arrays.
      describe: gives a text of the result that must be the same in all processes.

    Raises:
      Exception: what `act` raised here.
      ValueError: `act` failed in another process, which is named with its message; or the results differ.
    """
    if jax.process_count() == 1:
        return act()
    result, error = None, None
    try:
        result = act()
        message = "=" + (describe(result) if describe is not None else "")
    except FAILURES as raised:
        error, message = raised, f"!{raised}"
    messages = gather_texts(message)
    if error is not None:
        raise error
    if failed := [f"process {i}: {text[1:]}" for i, text in enumerate(messages) if text.startswith("!")]:
        raise ValueError(f"{len(failed)} of {len(messages)} processes cannot {doing}: {'; '.join(failed)}")
    if len(set(messages)) > 1:
        different = "; ".join(f"process {i} sees {text[1:]}" for i, text in enumerate(messages))
        raise ValueError(
            f"the processes do not {doing} alike: {different}. Every host needs the same files at the same "
            "place"
        )
    return result  # pyright: ignore[reportReturnType]


def is_first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process of the job is here; returns at once in a job of one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather_texts(text: str) -> list[str]:
    """The texts of all processes, in their order, each cut to MESSAGE_BYTES."""
    if jax.process_count() == 1:
        return [text]
    encoded = np.zeros(MESSAGE_BYTES, np.uint8)
    written = np.frombuffer(text.encode()[:MESSAGE_BYTES], np.uint8)
    encoded[: len(written)] = written
    rows = np.asarray(multihost_utils.process_allgather(encoded)).reshape(-1, MESSAGE_BYTES)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


# -- stopping


class StopRequest:
    """Says whether the run is to stop. `train.run` calls it, equally often in every process.

    Attributes:
      signal: what asked for it, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._calls = 0

    def __call__(self) -> bool:
        """True from the moment on at which all processes of the job know that one of them is to stop."""
        if not jax.distributed.is_initialized():
            return self.signal is not None
        # JAX carries a SIGTERM of one process to all, and answers True to the same call in each of them.
        self._calls += 1
        if multihost_utils.reached_preemption_sync_point(self._calls):
            self.signal = self.signal or signal.SIGTERM
            return True
        return False

    @property
    def exit_code(self) -> int:
        """What a shell gives for a program that the signal ended: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + (self.signal or signal.SIGINT)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catches SIGTERM, which clusters send before they take a machine, and Ctrl-C: the first asks the run to
    stop after its step, with a checkpoint; the second ends it at once.

    Outside the main thread no signal can be caught, and the run is never asked to stop. In a job of several
    processes JAX itself catches SIGTERM (`jax.distributed` must be initialised before), and a Ctrl-C is
    turned into one.
    """
    request = StopRequest()
    several = jax.distributed.is_initialized()
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        request.signal = number
        restore()
        # Not `sys.stderr`: the signal may have come in the middle of a write to it.
        os.write(2, b"repopt: stopping after this step, with a checkpoint; a second time stops at once\n")
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        for number in (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.getsignal(number)
            signal.signal(number, note)
    except ValueError:  # not the main thread
        before.clear()
    try:
        yield request
    finally:
        restore()
