"""Files that are there whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary file, which is moved to `path` on success and removed otherwise, so that a file that
    was there stays if writing fails. `~` is the home folder.

    Raises:
      FileNotFoundError: there is no folder to write it in.
    """
    file = Path(path).expanduser()
    if not file.parent.is_dir():
        raise FileNotFoundError(f"no folder {file.parent} to write {file.name} in: make it first")
    temporary = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
