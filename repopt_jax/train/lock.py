"""The lock of a folder: one program at a time may write into it.

run.lock holds who owns the folder: host, process, user, and since when. On one machine the operating
system tells whether the owner lives: it holds the open file locked (flock), until it ends in whatever way,
and with it the processes that have inherited the descriptor. Another machine that shares the folder may not
see that; there the owner is alive as long as it touches the file, which a thread of it does every TOUCH_S
seconds.
"""

import contextlib
import datetime
import getpass
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from repopt_jax import jsontext

logger: Final = logging.getLogger(__name__)

LOCK = "run.lock"
TOUCH_S = 10.0
STALE_S = 45.0  # an owner on another machine that has not touched its file for so long has ended


class Lock:
    """The lock of a folder, held from `acquire` to `release`."""

    def __init__(self, folder: Path):
        self.path: Path = folder / LOCK
        self._own = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "user": _user(),
            "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        self._file: Any = None
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Makes this process the owner of the folder, which is made if it is missing.

        What an owner that has ended left behind is taken over, with a warning that names it. Where that can
        only be told by waiting, or processes that it started have yet to end, STALE_S seconds pass at the
        most.

        Raises:
          BlockingIOError: the folder has an owner; the message says who, and since when.
          OSError: the file cannot be written.
        """
        patience: float | None = None  # when waiting for the processes of an owner that has ended ends
        while self._file is None:
            # Each time: an owner that has written nothing removes its folder too.
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115
            try:
                try:
                    locks = _flock(file)
                except BlockingIOError:
                    patience = self._wait_for_orphans(_owner(file), patience)
                    continue
                if not self._is_at_its_place(file):  # its owner has just removed it
                    continue
                if (owner := _owner(file)) is not None:
                    elsewhere = not locks or owner.get("host") != self._own["host"]
                    if elsewhere and not self._is_left_behind(file, owner):
                        continue
                    logger.warning(
                        "%s: %s has ended without releasing it; this process takes it over",
                        *(self.path.parent, _described(owner)),
                    )
                file.truncate(0)
                file.write(json.dumps(self._own))
                file.flush()
                self._file, file = file, None
            except BlockingIOError:
                raise self._refusal(_owner(file) if file is not None else None) from None
            finally:
                if file is not None:
                    file.close()
        self._thread = threading.Thread(target=self._touch, daemon=True, name="run-lock")
        self._thread.start()

    def check(self) -> None:
        """Raises OSError if another process has taken the folder over, because this one was stopped for long
        and looked as if it had ended."""
        try:
            owner = jsontext.parse(self.path.read_text(encoding="utf-8"), self.path)
        except FileNotFoundError:
            owner = None
        except ValueError:
            owner = {}
        if owner != self._own:
            by = f"taken over by {_described(owner)}" if owner else "removed"
            raise OSError(
                f"the lock {self.path} was {by} while this process was stopped, so that it writes no more"
            )

    def release(self) -> None:
        """Gives the folder up. Does nothing if it is not held."""
        if self._file is None:
            return
        self._ending.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError):
            self.check()
            self.path.unlink()
        self._file.close()
        self._file = None

    @property
    def descriptor(self) -> int:
        """Descriptor of the open file. A process that inherits it keeps the folder locked while it lives."""
        return self._file.fileno()

    def _wait_for_orphans(self, owner: dict[str, Any] | None, end: float | None) -> float:
        """Waits a moment if the owner has ended and what it started has not; returns when to give up."""
        if not owner or owner.get("host") != self._own["host"] or _lives(owner.get("process")):
            raise BlockingIOError
        if end is None:
            end = time.monotonic() + STALE_S
            logger.warning(
                "%s: %s has ended, and processes that it started are ending; this waits up to %.0f seconds",
                *(self.path.parent, _described(owner), STALE_S),
            )
        if time.monotonic() > end:
            raise BlockingIOError
        self._ending.wait(0.2)
        return end

    def _touch(self) -> None:
        while not self._ending.wait(TOUCH_S):
            with contextlib.suppress(OSError):
                os.utime(self._file.fileno())

    def _is_at_its_place(self, file: Any) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(file.fileno()))
        except FileNotFoundError:
            return False

    def _is_left_behind(self, file: Any, owner: dict[str, Any]) -> bool:
        """Waits until the file has not been touched for STALE_S; False if its owner removes it meanwhile.

        Raises:
          BlockingIOError: it is touched.
        """
        first = os.fstat(file.fileno()).st_mtime_ns
        end = time.monotonic() + STALE_S - self._untouched(file)
        if end > time.monotonic():
            logger.warning(
                "%s was last held by %s; this waits up to %.0f seconds to see whether it lives",
                *(self.path.parent, _described(owner), end - time.monotonic()),
            )
        while self._is_at_its_place(file):
            if os.fstat(file.fileno()).st_mtime_ns != first:
                raise BlockingIOError
            if (left := end - time.monotonic()) <= 0:
                return True
            self._ending.wait(min(left, 0.2))
        return False

    def _untouched(self, file: Any) -> float:
        """Seconds since the file was touched, by the clock of its file system."""
        probe = self.path.with_name(f"{LOCK}.{os.getpid()}.part")
        try:
            probe.touch()
            return max(0.0, probe.stat().st_mtime - os.fstat(file.fileno()).st_mtime)
        finally:
            probe.unlink(missing_ok=True)

    def _refusal(self, owner: dict[str, Any] | None) -> BlockingIOError:
        return BlockingIOError(
            f"`out_dir` {self.path.parent} is being written by {_described(owner or {})}: wait until it has "
            "ended, stop it, or choose another folder"
        )


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Lock]:
    """Holds the lock of `folder`, which is made if it is missing, and removed again if it was and nothing has
    been written there.

    Raises:
      BlockingIOError, OSError: as `Lock.acquire`.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = Lock(folder)
    try:
        lock.acquire()
        yield lock
    finally:
        lock.release()
        for path in missing:
            try:
                path.rmdir()
            except OSError:  # it holds something
                break


def _flock(file: Any) -> bool:
    """Locks an open file; False where there is no such lock, on Windows and on some network file systems.

    Raises:
      BlockingIOError: another process has it locked.
    """
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _owner(file: Any) -> dict[str, Any] | None:
    """What the file says, {} if nobody can read it, None if it is empty."""
    file.seek(0)
    try:
        text = file.read(10_000)
        found = jsontext.parse(text, LOCK) if text.strip() else None
    except ValueError:
        return {}
    return found if found is None or isinstance(found, dict) else {}


def _lives(process: Any) -> bool:
    """Whether there is a process of this number on this machine, as far as one can know."""
    if not isinstance(process, int) or process <= 0:
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _described(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    host, process, user, since = (
        str(owner.get(name, "?"))[:80] for name in ("host", "process", "user", "since")
    )
    return f"process {process} of {user} on {host} (since {since})"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user without a name
        return str(os.getuid()) if hasattr(os, "getuid") else "?"
