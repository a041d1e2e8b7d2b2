"""What Orbax and TensorStore make of a disk that is full or read-only, as one error that says so."""

import contextlib
import errno
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def one_sentence(step: int) -> Iterator[None]:
    """An error of the file system as one `OSError`, whatever Orbax made of it."""
    try:
        yield
    except Exception as error:
        reason = _file_error(error)
        if reason is None:
            raise
        raise type(reason)(
            f"cannot write the checkpoint of step {step}: {reason.strerror or reason}"
        ) from error


def _file_error(error: BaseException | None) -> OSError | None:
    """The error of the file system behind `error`, if there is one. TensorStore has it in its text only."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        if found := re.search(r"os_error_code='(\d+)'", str(error)):
            number = int(found[1])
            return OSError(number, os.strerror(number))
        if "RESOURCE_EXHAUSTED" in str(error):
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def told_by_raising_only() -> Iterator[None]:
    """A save that fails raises its error. The threads of Orbax that wrote its other files log theirs as well,
    with tracebacks, and TensorStore prints that it has nobody left to tell: hundreds of lines around the one
    that says what happened."""

    def told_by_raising(record: logging.LogRecord) -> bool:
        return "_SignalingThread.run() raised an exception" not in str(record.msg)

    def print_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    log, before = logging.getLogger("absl"), sys.unraisablehook
    log.addFilter(told_by_raising)
    sys.unraisablehook = print_others
    try:
        yield
    finally:
        for thread in threading.enumerate():
            if type(thread).__name__ == "_SignalingThread":
                threading.Thread.join(thread)  # its own raises the error again
        if sys.unraisablehook is print_others:
            sys.unraisablehook = before
        log.removeFilter(told_by_raising)
