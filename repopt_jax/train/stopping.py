"""Stopping a run from outside: SIGTERM, as clusters send it before they take a machine, and Ctrl-C."""

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Whether the run is to stop: `train.run` asks by calling it, equally often in every process.

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
    """The first SIGTERM or Ctrl-C asks the run to stop after its step, with a checkpoint; the second ends it
    at once.

    Outside the main thread no signal can be caught: there nothing ever asks. In a job of several processes
    JAX itself catches SIGTERM (`jax.distributed` must be initialised before), and a Ctrl-C is turned into
    one.
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
