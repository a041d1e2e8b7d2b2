"""Whether a folder holds what was written into it: size and checksum of every file, in one file more.

The manifest is written last and renamed into place, so a folder without one was not finished. What a disk or
a copy did to the folder later, its checksums find.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

NAME = "manifest.json"
_READ = 1 << 20  # bytes at a time


def write(folder: Path, **notes: Any) -> None:
    """Writes the manifest of all files in `folder`; `notes` are kept with it.

    Raises:
      OSError: a file cannot be read, or the manifest not be written.
    """
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "blake2b": _checksum(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (NAME, NAME + ".part")
    }
    part = folder / (NAME + ".part")
    with open(part, "w", encoding="utf-8") as file:
        json.dump({**notes, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / NAME)


def written(folder: Path) -> bool:
    """Whether `folder` was finished."""
    return (folder / NAME).is_file()


def notes(folder: Path) -> dict[str, Any]:
    """What `write` was given to keep; nothing where the manifest is missing or damaged."""
    try:
        values = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: value for name, value in values.items() if name != "files"} if _is_manifest(values) else {}


def problem(folder: Path) -> str | None:
    """What is wrong with `folder`, None if nothing is. Reads every file."""
    if not written(folder):
        return f"its {NAME} is missing: it was not written to the end"
    try:
        values = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"its {NAME} cannot be read: {error}"
    if not _is_manifest(values):
        return f"its {NAME} holds no list of files"
    for name, expected in values["files"].items():
        if wrong := _wrong(folder / name, expected):
            return f"its file {name} {wrong}"
    return None


def _wrong(path: Path, expected: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"has {size} bytes, not {expected['bytes']}"
        return None if _checksum(path) == expected["blake2b"] else "does not hold what was written to it"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _is_manifest(values: Any) -> bool:
    return isinstance(values, dict) and isinstance(values.get("files"), dict)


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(_READ):
            digest.update(block)
    return digest.hexdigest()
