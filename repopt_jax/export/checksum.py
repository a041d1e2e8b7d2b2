"""The checksum inside an ONNX file.

It is an entry of `metadata_props`, `sha256`: that of the whole file with zeros in the place of its
own digits, so that any damage is noticed without reading the format.
"""

import hashlib

CHECKSUM = "sha256"
NO_DIGITS = "0" * 64
# The entry as protocol buffers write it, up to the digits: two texts, each with its number and its length.
_ENTRY = b"\n\x06" + CHECKSUM.encode() + b"\x12\x40"


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
