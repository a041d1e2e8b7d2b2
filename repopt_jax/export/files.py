"""Writing an exported file: whole, or not at all."""

import os
from pathlib import Path


def write_whole(path: str | Path, content: bytes) -> None:
    """Writes a file beside its place and then moves it there, so that a file of this name that was there stays
    if writing fails. `~` is the home folder.

    Raises:
      OSError: the file cannot be written.
    """
    file = Path(path).expanduser()
    if not file.parent.is_dir():
        raise FileNotFoundError(f"no folder {file.parent} to write {file.name} in: make it first")
    temporary = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(content)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
