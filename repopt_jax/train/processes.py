"""A job of several processes: joining it, and doing together what may fail in one of them.

All processes run the same program, and meet whenever arrays are exchanged. What one of them alone finds out,
that a folder is not there, say, it must tell the others, or they wait for it for ever: `together` does.
A process that dies is noticed by its connections (CPU, at once) or by its missing heartbeats, after which JAX
ends the others.
"""

import glob
import importlib.util
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

# What a process can find wrong before training starts; everything else is a bug, and ends the process.
FAILURES = (ValueError, TypeError, KeyError, OSError, ImportError)
# So long a process waits for process 0; as long as JAX.
WAIT_S = 300
# At the end of the program a process waits this long for the others.
SHUTDOWN_S = 60
# What a process tells the others, encoded, is cut to this many bytes.
MESSAGE_BYTES = 4096


def join(coordinator: str = "", count: int | None = None, index: int | None = None) -> None:
    """Makes this process one of a job of several, before JAX looks at its devices; nothing to do in a job of
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
            jax.distributed.initialize(shutdown_timeout_seconds=SHUTDOWN_S)
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
        jax.distributed.initialize(coordinator, count, index, shutdown_timeout_seconds=SHUTDOWN_S)


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
    """What kind of job an environment tells of: "slurm", a step of several tasks, "tpu", a host with TPUs and
    libtpu, which may be one of a pod, or None. JAX itself then finds the address, the count and the index."""
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        return "slurm"
    chips = glob.glob(f"{devices}/accel[0-9]*") + glob.glob(f"{devices}/vfio/[0-9]*")
    usable = importlib.util.find_spec("libtpu") is not None and environment.get("JAX_PLATFORMS") != "cpu"
    return "tpu" if chips and usable else None


def together(doing: str, act: Callable[[], T], *, seen: Callable[[T], str] | None = None) -> T:
    """`act()` in every process, and its result; where it fails in one of them, an error in all.

    Args:
      doing: what `act` does, for messages: "open the data".
      act: works on this process alone; it must not exchange arrays.
      seen: a text of the result that must be the same in all processes.

    Raises:
      Exception: what `act` raised here.
      ValueError: `act` failed in another process, which is named with its message; or what the processes have
        `seen` is not the same.
    """
    if jax.process_count() == 1:
        return act()
    mine, error = None, None
    try:
        mine = act()
        told = "=" + (seen(mine) if seen is not None else "")
    except FAILURES as raised:
        error, told = raised, f"!{raised}"
    texts = exchange(told)
    if error is not None:
        raise error
    if failed := [f"process {i}: {text[1:]}" for i, text in enumerate(texts) if text.startswith("!")]:
        raise ValueError(f"{len(failed)} of {len(texts)} processes cannot {doing}: {'; '.join(failed)}")
    if len(set(texts)) > 1:
        different = "; ".join(f"process {i} sees {text[1:]}" for i, text in enumerate(texts))
        raise ValueError(
            f"the processes do not {doing} alike: {different}. Every host needs the same files at the same "
            "place"
        )
    return mine  # pyright: ignore[reportReturnType]


def is_first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def exchange(text: str) -> list[str]:
    """The texts of all processes, in their order, each cut to MESSAGE_BYTES."""
    if jax.process_count() == 1:
        return [text]
    encoded = np.zeros(MESSAGE_BYTES, np.uint8)
    written = np.frombuffer(text.encode()[:MESSAGE_BYTES], np.uint8)
    encoded[: len(written)] = written
    rows = np.asarray(multihost_utils.process_allgather(encoded)).reshape(-1, MESSAGE_BYTES)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]
