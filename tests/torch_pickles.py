"""Files as `torch.save` writes them, put together opcode by opcode: for tests without PyTorch, and for files
that PyTorch would never write."""

import dataclasses
import io
import pickle
import struct
import zipfile
from typing import Any

import numpy as np

STORAGE_OF = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "int64": "LongStorage",
    "uint8": "ByteStorage",
}
MAGIC = 0x1950A86A20F9469CFC6C


@dataclasses.dataclass
class Name:
    """A global."""

    module: str
    name: str


@dataclasses.dataclass
class Call:
    """REDUCE."""

    function: Any
    args: Any


@dataclasses.dataclass
class New:
    """NEWOBJ and, with a state, BUILD."""

    cls: Any
    args: Any = ()
    state: Any = None


@dataclasses.dataclass
class Raw:
    """Opcodes."""

    code: bytes


@dataclasses.dataclass
class Storage:
    key: str
    kind: str
    numel: int
    content: bytes | None
    view: Any = None


ORDERED = Call(Name("collections", "OrderedDict"), ())


def tensor(storage: Storage, offset: int, shape: tuple, stride: tuple, *more: Any) -> Call:
    return Call(
        Name("torch._utils", "_rebuild_tensor_v2"), (storage, offset, shape, stride, False, ORDERED, *more)
    )


def module(cls: str, parameters=None, buffers=None, modules=None, passing=(), **attributes: Any) -> New:
    """A pickled `torch.nn.Module` of a class `package.module.Name`."""
    state = {
        "training": False,
        "_parameters": {k: v if v is None else parameter(v) for k, v in (parameters or {}).items()},
        "_buffers": dict(buffers or {}),
        "_non_persistent_buffers_set": Call(Name("__builtin__", "set"), (list(passing),)),
        "_backward_hooks": ORDERED,
        "_modules": dict(modules or {}),
        **attributes,
    }
    return New(Name(*cls.rsplit(".", 1)), (), state)


def parameter(array: np.ndarray) -> Call:
    return Call(Name("torch._utils", "_rebuild_parameter"), (array, True, ORDERED))


class Encoder:
    """The pickle of a value, and the storages that it refers to."""

    def __init__(self, *, legacy: bool = False):
        self.legacy = legacy
        self.storages: dict[str, Storage] = {}

    def pickle(self, value: Any) -> bytes:
        return b"\x80\x02" + self.encode(value) + b"."

    def encode(self, value: Any) -> bytes:
        match value:
            case Raw():
                return value.code
            case Name():
                return f"c{value.module}\n{value.name}\n".encode()
            case Call():
                return self.encode(value.function) + self.encode(value.args) + b"R"
            case New():
                built = b"" if value.state is None else self.encode(value.state) + b"b"
                return self.encode(value.cls) + self.encode(value.args) + b"\x81" + built
            case Storage():
                self.storages[value.key] = value
                identity = ("storage", Name("torch", value.kind), value.key, "cpu", value.numel)
                return self.encode((*identity, value.view) if self.legacy else identity) + b"Q"
            case np.ndarray():
                stored = Storage(
                    str(len(self.storages)), STORAGE_OF[value.dtype.name], value.size, value.tobytes()
                )
                stride = tuple(n // value.itemsize for n in np.empty(value.shape, value.dtype).strides)
                return self.encode(tensor(stored, 0, value.shape, stride))
            case None | bool():
                return {None: b"N", True: b"\x88", False: b"\x89"}[value]
            case int():
                number = pickle.encode_long(value)
                return b"\x8a" + bytes([len(number)]) + number
            case float():
                return b"G" + struct.pack(">d", value)
            case str():
                return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
            case tuple():
                return b"(" + b"".join(map(self.encode, value)) + b"t"
            case list():
                return b"](" + b"".join(map(self.encode, value)) + b"e"
            case dict():
                return b"}(" + b"".join(self.encode(k) + self.encode(v) for k, v in value.items()) + b"u"
        raise TypeError(value)


def zip_bytes(value: Any, *, byteorder: bytes = b"little", compression: int = zipfile.ZIP_STORED) -> bytes:
    encoder = Encoder()
    data = encoder.pickle(value)
    entries = {"data.pkl": data, "byteorder": byteorder, "version": b"3\n"}
    entries |= {f"data/{key}": s.content for key, s in encoder.storages.items() if s.content is not None}
    return archive({f"archive/{name}": content for name, content in entries.items()}, compression)


def archive(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as out:
        for name, content in entries.items():
            out.writestr(name, content)
    return file.getvalue()


def legacy_bytes(value: Any, *, start: Any = MAGIC, machine: Any = None, keys: Any = None) -> bytes:
    encoder = Encoder(legacy=True)
    data = encoder.pickle(value)
    stored = {key: s for key, s in encoder.storages.items() if s.content is not None}
    plain = Encoder()
    out = [plain.pickle(start), plain.pickle(1001), plain.pickle(machine or {"little_endian": True}), data]
    out.append(plain.pickle(list(stored) if keys is None else keys))
    for storage in stored.values():
        out += [struct.pack("<q", storage.numel), storage.content or b""]
    return b"".join(out)


FORMATS = {"zip": zip_bytes, "legacy": legacy_bytes}
