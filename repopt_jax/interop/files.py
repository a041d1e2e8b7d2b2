"""Reads and writes files of named tensors, PyTorch's (`.pth`, `.pt`) and safetensors, without PyTorch.

The kind of a file is told by its structure, see `_kind`. Since PyTorch 1.6 a file of PyTorch is an
uncompressed zip archive of a pickle (`data.pkl`) and one entry of raw bytes for each storage; before, it was
a sequence of pickles and then the storages. The pickle is never executed, see `pickles`. A safetensors file
is the length of a JSON header (8 bytes, little-endian), the header, and the bytes of the tensors.
"""

import contextlib
import math
import mmap
import os
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import encode_long
from typing import IO, Any

import numpy as np
import safetensors
from numpy.typing import ArrayLike

from repopt_jax.arguments import check_kind, check_path
from repopt_jax.interop.checkpoints import select_tensors, without_wrappers
from repopt_jax.interop.pickles import DTYPES, STORAGES, StorageRef, TensorRef, Unreadable, load
from repopt_jax.wholefile import whole_file


def read_tensors(path: str | os.PathLike[str], *, key: str | None = None) -> dict[str, np.ndarray]:
    """Reads the tensors of a file by name, with PyTorch's order of axes and the dtypes of the file.

    The file holds a state dict; or a checkpoint that contains one among other entries (epoch, optimizer,
    configuration), which are not read; or a whole pickled module, whose parameters and persistent buffers are
    returned under the names of its `state_dict()`. The first of the entries `model`, `state_dict`,
    `model_state_dict`, `params` and `ema` that holds tensors is taken; if there is none, the tensors of the
    file's own mapping. Other entries, or `ema` if there is `model` as well, are chosen by `key`. Prefixes
    `module.` and `_orig_mod.` are removed if every name has them.

    Nothing in the file is executed: see `pickles`.

    Args:
      path: a `.pth` or `.pt` file as `torch.save` writes it, now or before PyTorch 1.6, or a safetensors
        file; the suffix does not matter.
      key: the entry of a checkpoint that holds the tensors, with `/` for entries inside entries.

    Returns:
      Read-only arrays (bfloat16 and float8 from `ml_dtypes`), in the file's order, or sorted by name for
      safetensors. Tensors that share memory in the file share it here.

    Raises:
      FileNotFoundError: no such file.
      TypeError: a `key` that is no text.
      ValueError: the file is of another type, empty, truncated or damaged; it would run code; or it holds no
        tensors, or none under `key`. The message is one sentence that names the file.
    """
    check_path("path", path)
    if key is not None:
        check_kind("key", key, str, "the name of an entry, such as 'state_dict'")
    file = Path(path).expanduser()
    if file.is_dir():
        raise Unreadable(f"{file} is a folder, not a PyTorch or safetensors file")
    with file.open("rb") as stream:
        try:
            return _read(stream, file, key)
        except (Unreadable, MemoryError):
            raise
        except Exception as error:  # of any type: the bytes are anything
            reason = str(error).strip("'\" ").partition("\n")[0][:100] or type(error).__name__
            raise Unreadable(f"{file} is truncated or damaged: {reason}") from error


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, ArrayLike],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors by name as a safetensors file, which appears whole or not at all.

    Args:
      path: the file.
      tensors: name -> array, of any strides; dtypes are kept.
      metadata: strings for the file's header.

    Raises:
      FileExistsError: `path` exists.
      TypeError: names that are no text, all listed.
      ValueError: dtypes that the format does not have, all listed.
    """
    check_path("path", path)
    check_kind("tensors", tensors, Mapping, "a mapping of names to arrays")
    arrays = _arrays(tensors, set(_SAFETENSORS.values()), "safetensors")
    specs = {
        name: safetensors.TensorSpec(
            dtype=array.dtype.name, shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes
        )
        for name, array in arrays.items()
    }
    with _new_file(path) as temporary:
        safetensors.serialize_file(specs, temporary, metadata=None if metadata is None else dict(metadata))


def write_torch(path: str | os.PathLike[str], tensors: Mapping[str, ArrayLike]) -> None:
    """Writes tensors by name as a state dict that `torch.load(path, weights_only=True)` reads.

    PyTorch is not needed. The file appears whole or not at all.

    Args:
      path: the file.
      tensors: name -> array, of any strides; dtypes are kept.

    Raises:
      FileExistsError: `path` exists.
      TypeError: names that are no text, all listed.
      ValueError: dtypes without a storage class in PyTorch, all listed.
    """
    check_path("path", path)
    check_kind("tensors", tensors, Mapping, "a mapping of names to arrays")
    storages = {DTYPES[dtype]: storage for storage, dtype in STORAGES.items() if storage != "UntypedStorage"}
    arrays = _arrays(tensors, set(storages), "PyTorch's file format")
    with _new_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "archive/data.pkl", _pickled(arrays, storages))
        _add(archive, "archive/byteorder", sys.byteorder.encode())
        for index, array in enumerate(arrays.values()):
            _add(archive, f"archive/data/{index}", array.tobytes())
        _add(archive, "archive/version", b"3\n")


def _read(stream: IO[bytes], file: Path, key: str | None) -> dict[str, np.ndarray]:
    head = stream.read(16)
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    if not head:
        raise Unreadable(f"{file} is empty")
    kind = _kind(head, size)
    if kind == "zip":
        with zipfile.ZipFile(stream) as archive:
            value, storages = _open_zip(archive, file, size)
            return _named_arrays(value, storages, file, key)
    if kind == "pickle":
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            value, storages = _open_legacy(mapped, file)
            return _named_arrays(value, storages, file, key)
    if kind == "safetensors":
        if key is not None:
            raise Unreadable(
                f"{file} is a safetensors file, which has no entries within entries: no `key` {key!r}"
            )
        return _read_safetensors(stream.read(), file)
    raise Unreadable(
        f"{file} is not a PyTorch or safetensors file (it starts with {head[:8]!r}): give what `torch.save` "
        "or safetensors wrote"
    )


def _kind(head: bytes, size: int) -> str:
    """What a file of `size` bytes with this beginning is: "safetensors", "zip", "pickle" or "".

    One byte does not tell: the length of a safetensors header begins with any. That it is one is settled by
    its whole beginning, the length, which lies within the file, and the brace that the header starts with. No
    zip archive and no pickle reads so: as a length, their first 8 bytes are many times what fits on a disk.
    """
    length, braced = int.from_bytes(head[:8], "little"), head[8:9] == b"{"
    if braced and 2 <= length <= size - 8:
        return "safetensors"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    # A header that is longer than its file was cut, if it is no longer than the format allows.
    if braced and length <= _LONGEST_HEADER:
        return "safetensors"
    return "pickle" if head[:1] == b"\x80" and head[1:2] <= b"\x05" else ""


class Storages:
    """The storages of a file by key, each read at its first use."""

    def __init__(self, read: Callable[[str], bytes], *, little_endian: bool):
        self._read = read
        self._swap = not little_endian
        self._done: dict[tuple[str, np.dtype], np.ndarray] = {}

    def elements(self, storage: StorageRef, dtype: np.dtype) -> np.ndarray:
        """Returns the elements of `storage` as a flat read-only array of `dtype`."""
        known = (storage.key, dtype)
        if known not in self._done:
            raw = self._read(storage.key)
            whole = raw[: len(raw) // dtype.itemsize * dtype.itemsize]
            self._done[known] = np.frombuffer(self._native_order(whole, dtype), dtype)
        start, count = (n * storage.dtype.itemsize // dtype.itemsize for n in (storage.offset, storage.numel))
        elements = self._done[known][start : start + count]
        if elements.size != count:
            raise ValueError(f"storage {storage.key!r} has fewer elements than its tensors")
        return elements

    def _native_order(self, raw: bytes, dtype: np.dtype) -> bytes:
        if not self._swap:
            return raw
        width = dtype.itemsize // (2 if dtype.kind == "c" else 1)
        return np.frombuffer(raw, np.uint8).reshape(-1, width)[:, ::-1].tobytes()


def _open_zip(archive: zipfile.ZipFile, file: Path, size: int) -> tuple[Any, Storages]:
    """Reads the value and the storages of a file of PyTorch 1.6 or later."""
    entries = {entry.filename: entry for entry in archive.infolist()}
    if not entries:
        raise Unreadable(f"{file} is an empty archive")
    tops = [
        name.removesuffix("data.pkl")
        for name in entries
        if name.count("/") == 1 and name.endswith("/data.pkl")
    ]
    if len(tops) != 1:
        raise Unreadable(f"{file} is a zip archive, but not one that `torch.save` wrote: it has no data.pkl")
    (top,) = tops
    if f"{top}constants.pkl" in entries:
        raise Unreadable(f"{file} is a TorchScript archive: load it in PyTorch and save its `state_dict()`")
    # PyTorch does not compress, so no entry can be larger than the file. Checking the sizes is not enough:
    # some compression methods expand the whole of an entry, whatever size it claims.
    if any(
        e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size for e in entries.values()
    ) or (sum(e.file_size for e in entries.values()) > size):
        raise Unreadable(f"{file} holds compressed or overlapping entries, which `torch.save` never writes")
    order = archive.read(f"{top}byteorder") if f"{top}byteorder" in entries else b"little"
    value = load(archive.read(f"{top}data.pkl"), str(file))
    return value, Storages(lambda key: archive.read(f"{top}data/{key}"), little_endian=order != b"big")


# The first pickle of a file in the older format.
_MAGIC = 0x1950A86A20F9469CFC6C


def _open_legacy(mapped: mmap.mmap, file: Path) -> tuple[Any, Storages]:
    """Reads the value and the storages of a file of PyTorch before 1.6.

    It consists of pickles of a magic number, a protocol number, the machine's properties, the value and the
    storages' keys; then for each key the number of elements (8 bytes) and the elements, little-endian.
    """
    if load(mapped, str(file)) != _MAGIC:
        raise Unreadable(f"{file} is a pickle, but not one that `torch.save` wrote")
    for _ in ("protocol", "machine"):
        load(mapped, str(file))
    found: dict[str, StorageRef] = {}
    value = load(mapped, str(file), found)
    places = {}
    keys = load(mapped, str(file))
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("the keys of its storages are not strings")  # hashing anything else may never end
    for key in keys:
        numel = int.from_bytes(mapped.read(8), "little", signed=True)
        start, count = mapped.tell(), numel * found[key].dtype.itemsize
        if not 0 <= count <= len(mapped) - start:
            raise ValueError("the file ends within its tensors")
        places[key] = slice(start, start + count)
        mapped.seek(start + count)
    return value, Storages(lambda key: mapped[places[key]], little_endian=True)


def _named_arrays(value: Any, storages: Storages, file: Path, key: str | None) -> dict[str, np.ndarray]:
    found = select_tensors(value, key, str(file))
    return {name: _array(tensor, storages) for name, tensor in found.items()}


def _array(tensor: TensorRef, storages: Storages) -> np.ndarray:
    if 0 in tensor.shape:
        return np.empty(tensor.shape, tensor.dtype)
    elements = storages.elements(tensor.storage, tensor.dtype)[tensor.offset :]
    # `TensorRef`s have been checked to lie within their storage. Of bytes, because NumPy's own interface to
    # memory has no name for float8_e5m2.
    strides = [n * tensor.dtype.itemsize for n in tensor.stride]
    return np.ndarray(tensor.shape, tensor.dtype, elements.view(np.uint8).data, 0, strides)


# --- safetensors

_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit

_SAFETENSORS: dict[str, np.dtype] = {
    "F64": DTYPES["float64"],
    "F32": DTYPES["float32"],
    "F16": DTYPES["float16"],
    "BF16": DTYPES["bfloat16"],
    "F8_E4M3": DTYPES["float8_e4m3fn"],
    "F8_E5M2": DTYPES["float8_e5m2"],
    "C64": DTYPES["complex64"],
    "BOOL": DTYPES["bool"],
    **{
        f"{sign}{bits}": DTYPES[f"{kind}{bits}"]
        for sign, kind in (("I", "int"), ("U", "uint"))
        for bits in (8, 16, 32, 64)
    },
}


# Also those that only newer versions of the library write.
_READ = {
    **_SAFETENSORS,
    **{f"F8_{name}": DTYPES[f"float8_{name.lower()}"] for name in ("E4M3FNUZ", "E5M2FNUZ")},
}


def _read_safetensors(content: bytes, file: Path) -> dict[str, np.ndarray]:
    # The library returns them in another order each time.
    tensors = dict(sorted(safetensors.deserialize(content), key=lambda item: item[0]))
    if not tensors:
        raise Unreadable(f"{file} holds no tensors")
    if unknown := [f"{name} {t['dtype']}" for name, t in tensors.items() if t["dtype"] not in _READ]:
        raise Unreadable(f"{file} holds tensors of types that are not supported: {', '.join(unknown)}")
    if nameless := [repr(name) for name in tensors if not isinstance(name, str)]:
        raise TypeError(f"`tensors` has names that are no text: {', '.join(nameless)}")
    arrays = {}
    for name, tensor in tensors.items():
        array = np.frombuffer(tensor["data"], _READ[tensor["dtype"]]).reshape(tensor["shape"])
        array.flags.writeable = False
        arrays[name] = array
    return without_wrappers(arrays)


# --- Writing


def _arrays(tensors: Mapping[str, ArrayLike], dtypes: set[np.dtype], target: str) -> dict[str, np.ndarray]:
    """Returns contiguous arrays in native byte order. (`ascontiguousarray` would make scalars vectors.)"""
    if nameless := [repr(name) for name in tensors if not isinstance(name, str)]:
        raise TypeError(f"`tensors` has names that are no text: {', '.join(nameless)}")
    arrays = {}
    for name, tensor in tensors.items():
        array = np.asarray(tensor)
        arrays[name] = np.asarray(array, array.dtype.newbyteorder("="), order="C")
    if wrong := [f"{name} {array.dtype}" for name, array in arrays.items() if array.dtype not in dtypes]:
        raise ValueError(
            f"`tensors` holds types that {target} does not have: {', '.join(wrong)}; cast them first"
        )
    return arrays


def _new_file(path: str | os.PathLike[str]) -> contextlib.AbstractContextManager[Path]:
    """`whole_file`, where there is none yet."""
    file = Path(path).expanduser()
    if file.exists():
        raise FileExistsError(f"{file} exists: files are not overwritten, give another path or remove it")
    return whole_file(file)


# PyTorch can map a file into memory if storages start at multiples of this.
_ALIGNMENT = 64
_LOCAL_HEADER = 30  # bytes of a zip entry before its name


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name)
    start = archive.start_dir + _LOCAL_HEADER + len(name)
    padding = -start % _ALIGNMENT
    padding += _ALIGNMENT if 0 < padding < 4 else 0  # an extra field has a header of its own
    if padding:
        entry.extra = b"FB" + (padding - 4).to_bytes(2, "little") + bytes(padding - 4)
    archive.writestr(entry, content)


def _pickled(arrays: Mapping[str, np.ndarray], storages: Mapping[np.dtype, str]) -> bytes:
    """Returns the pickle, of protocol 2, of an ordered dict of tensors with storages outside the pickle."""
    ordered = _global("collections", "OrderedDict") + b")R"
    out = [b"\x80\x02", ordered, b"("]
    for index, (name, array) in enumerate(arrays.items()):
        kind = _global("torch", storages[array.dtype])
        storage = (
            _tuple(_value("storage"), kind, _value(str(index)), _value("cpu"), _value(array.size)) + b"Q"
        )
        shape = _tuple(*map(_value, array.shape))
        # Strides in elements; empty dimensions count as one element.
        lengths = [max(n, 1) for n in array.shape]
        stride = _tuple(*(_value(math.prod(lengths[axis + 1 :])) for axis in range(array.ndim)))
        arguments = _tuple(storage, _value(0), shape, stride, b"\x89", ordered)
        out += [_value(name), _global("torch._utils", "_rebuild_tensor_v2"), arguments, b"R"]
    return b"".join([*out, b"u."])


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _tuple(*parts: bytes) -> bytes:
    return b"".join([b"(", *parts, b"t"])


def _value(value: str | int) -> bytes:
    if isinstance(value, str):
        text = value.encode()
        return b"X" + len(text).to_bytes(4, "little") + text
    number = encode_long(value)
    return b"\x8a" + bytes([len(number)]) + number
