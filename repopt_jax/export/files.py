"""Writing an exported file, whole or not at all, and the checksum inside an ONNX file.

The checksum is an entry of `metadata_props`, `sha256`: that of the whole file with zeros in the place of its
own digits, so that any damage is noticed without reading the format.
"""

import hashlib
import os
from pathlib import Path

CHECKSUM = "sha256"
NO_DIGITS = "0" * 64
# The entry as protocol buffers write it, up to the digits: two texts, each with its number and its length.
_ENTRY = b"\n\x06" + CHECKSUM.encode() + b"\x12\x40"


def write_whole(path: str | Path, content: bytes) -> None:
    """Writes a file beside its place and then moves it there, so that an old file of this name stays if
    writing fails. `~` is the home folder.

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


def with_checksum(content: bytes) -> bytes:
    """The content of an ONNX file whose entry `CHECKSUM` is `NO_DIGITS`, with the digits."""
    start = content.rfind(_ENTRY) + len(_ENTRY)
    digits = hashlib.sha256(content).hexdigest().encode()
    return content[:start] + digits + content[start + len(digits) :]


def is_unaltered(content: bytes, digits: str) -> bool:
    """Whether the content of an ONNX file is that of which `digits` are the checksum."""
    start, whole = content.rfind(_ENTRY) + len(_ENTRY), memoryview(content)
    found = hashlib.sha256(whole[:start])
    found.update(NO_DIGITS.encode())
    found.update(whole[start + len(NO_DIGITS) :])
    return found.hexdigest() == digits
