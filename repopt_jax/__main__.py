"""`python -m repopt_jax`, and the program `repopt`.

Ctrl-C ends it with code 130 and one sentence at any moment: also while its modules are imported, which takes
seconds, and while the interpreter ends. So nothing but the standard library is imported here at the top.
"""

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import Any

INTERRUPTED = 130  # what a shell gives for a program that Ctrl-C ended
_asked = False  # to end, by Ctrl-C


def run() -> int:
    """Runs the command line and returns its exit code."""
    sys.unraisablehook = _unraisable
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is to be ignored
            signal.signal(signal.SIGINT, _interrupt)
        _unblock()
        from repopt_jax.cli.main import main

        code = main(interrupted=lambda: _asked)
        if not _asked:
            # All is done: of a Ctrl-C while the interpreter ends, Python would die without a word.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            return code
    except KeyboardInterrupt:  # outside of a command
        code = _leave()
    # Threads of compilers and files that the signal left in the middle of their work may crash the
    # interpreter while it ends, so that it is left as it is.
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if code == INTERRUPTED else _leave())


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt, as Python does; but inside an import, where modules make other errors of it
    or pass over it, it ends the process at once."""
    global _asked
    _asked = True
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(_leave())
        frame = frame.f_back
    raise KeyboardInterrupt


def _unblock() -> None:
    """Lets a Ctrl-C through that came while the process started anew; see `cli.huge_pages`."""
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _unraisable(unraisable: Any) -> None:
    """Ends the process where Python could only print that a Ctrl-C was lost: in a callback, or at its end."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        os._exit(_leave())
    sys.__unraisablehook__(unraisable)


def _leave() -> int:
    # Not `sys.stderr`: the signal may have come in the middle of a write to it.
    os.write(2, b"repopt: interrupted; run the same command again\n")
    return INTERRUPTED


if __name__ == "__main__":
    sys.exit(run())
