"""Reads the pickle of a PyTorch file without executing it: `load`.

A pickle is a program: it names functions of installed modules and calls them. Here it is interpreted by a
machine that imports nothing and calls only a few functions of this module:

    a global                 becomes its name, `Global`
    making an object         becomes an inert `Record` of its class's name, state and items
    a storage, a tensor      become descriptions, `StorageRef` and `TensorRef`; the arrays are read later
    any call not listed      is refused, and so is state for a function or a class

So a checkpoint with whole modules of packages that are not installed can be read, and no code of a malicious
one runs. Sizes are checked before memory is allocated for them.
"""

import dataclasses
import math
import mmap
import pickletools
from collections.abc import Callable
from typing import IO, Any, cast

import ml_dtypes
import numpy as np


class Unreadable(ValueError):
    """A file that cannot or must not be read; the message is one sentence that names it."""


@dataclasses.dataclass(frozen=True)
class Global:
    """The name of a class or a function to which a pickle refers."""

    module: str
    name: str

    def __str__(self) -> str:
        text = f"{self.module}.{self.name}"
        text = text if text.isprintable() else repr(text)
        return text if len(text) <= 100 else f"{text[:97]}..."


@dataclasses.dataclass(eq=False, repr=False)
class Record:
    """An object of a class of which only the name is known.

    It is compared by identity, because its contents need not be hashable, and `repr` does not show them,
    because the text of objects that share parts can be exponentially long.
    """

    made_by: Global
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        return "Record"


@dataclasses.dataclass(frozen=True)
class StorageRef:
    """The memory of a tensor: `numel` elements of `dtype` from element `offset` of the storage `key`."""

    key: str
    dtype: np.dtype
    numel: int
    offset: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class TensorRef:
    """A tensor that has not been read: a strided view of a storage, in elements."""

    storage: StorageRef
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


DTYPES: dict[str, np.dtype] = {
    name: np.dtype(getattr(np, name, None) or getattr(ml_dtypes, name))
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex64", "complex128"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    )
} | {"bool": np.dtype(bool)}

# PyTorch's storage classes; other dtypes are kept in untyped storages, as bytes.
STORAGES: dict[str, str] = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}

# A tensor may be larger than its storage (an expanded one repeats its elements), up to this many elements.
EXPANDED_LIMIT = 2**20

# Integers from here on have the hashes of smaller ones: as keys, any number of them can collide.
_HASHED_APART = 2**61 - 1
_MEMO_LIMIT = 2**32  # the binary opcodes cannot name more
_LONGEST_GLOBAL = 1000

# Opcodes that push their argument on the stack: numbers, strings and bytes.
_PUSHED = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    )
)


def load(stream: bytes | mmap.mmap, name: str, storages: dict[str, StorageRef] | None = None) -> Any:
    """Returns the value of the pickle at the position of `stream`, which is moved past the pickle's end.

    Dicts, lists, tuples, strings and numbers are returned as such, sets as lists, everything else as one of
    this module's descriptions.

    Args:
      stream: the bytes, or a file that is mapped into memory.
      name: the file's name, for messages.
      storages: filled with every storage that the pickle names, by key.

    Raises:
      Unreadable: the pickle contains a call, or a change of state, that is not on the list.
      Exception: the pickle is truncated or damaged; many types.
    """
    stack: list[Any] = []
    marked: list[list[Any]] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, marked.pop()
        return items

    def pop(count: int) -> list[Any]:
        if len(stack) < count:
            raise IndexError("the stack is empty")
        items = stack[-count:]
        del stack[-count:]
        return items

    for opcode, arg, position in pickletools.genops(cast("bytes | IO[bytes]", stream)):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case _ if opcode.name in _PUSHED:
                stack.append(arg)
            case "MARK":
                marked.append(stack)
                stack = []
            case "POP":
                stack.pop() if stack else since_mark()
            case "POP_MARK":
                since_mark()
            case "DUP":
                stack.append(stack[-1])
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(int(opcode.name[-1]))))
            case "TUPLE" | "FROZENSET":
                items = since_mark()
                stack.append(tuple(items))
            case "LIST":
                items = since_mark()
                stack.append(items)
            case "DICT":
                items = since_mark()
                stack.append(_set_items({}, items))
            case "APPEND":
                (item,) = pop(1)
                _extend(stack[-1], [item])
            case "APPENDS" | "ADDITEMS":
                items = since_mark()
                _extend(stack[-1], items)
            case "SETITEM":
                items = pop(2)
                _set_items(stack[-1], items)
            case "SETITEMS":
                items = since_mark()
                _set_items(stack[-1], items)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                if not 0 <= (index := cast(int, arg)) < _MEMO_LIMIT:
                    raise ValueError("a memo index out of range")
                memo[index] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])  # pyright: ignore[reportArgumentType]
            case "GLOBAL":
                stack.append(_global(*str(arg).split(" ", 1)))
            case "STACK_GLOBAL":
                module, attribute = pop(2)
                stack.append(_global(module, attribute))
            case "BINPERSID":
                (identity,) = pop(1)
                stack.append(found := _persistent(identity, name))
                if storages is not None and isinstance(found, StorageRef):
                    storages[found.key] = found
            case "NEWOBJ":
                cls, args = pop(2)
                stack.append(_new(cls, args, name))
            case "NEWOBJ_EX":
                cls, args, _ = pop(3)
                stack.append(_new(cls, args, name))
            case "REDUCE":
                function, args = pop(2)
                stack.append(_call(function, args, name))
            case "INST":
                args = since_mark()
                stack.append(_call(_global(*str(arg).split(" ", 1)), tuple(args), name))
            case "OBJ":
                function, *args = since_mark()
                stack.append(_call(function, tuple(args), name))
            case "BUILD":
                (state,) = pop(1)
                _set_state(stack[-1], state, name)
            case _:  # extension registry, buffers outside the file, textual persistent ids
                raise Unreadable(
                    f"{name} is refused: its pickle uses {opcode.name} at byte {position}, and no file that "
                    "PyTorch writes does"
                )
    raise ValueError("the pickle has no end")


def _global(module: Any, name: Any) -> Global:
    # Anything else may be nested or shared, which makes it endless as text and as a key.
    if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > _LONGEST_GLOBAL:
        raise ValueError("a global without a proper name")
    return Global(module, name)


def _call(function: Any, args: Any, name: str) -> Any:
    if not isinstance(args, tuple):
        raise TypeError("arguments that are not a tuple")
    called = str(function) if isinstance(function, Global) else ""
    if called in _TENSORS:
        return _TENSORS[called](name, *args)
    if called in _VALUES:
        return _VALUES[called](*args)
    if called in _RECORDED:
        return Record(function, args)
    raise Unreadable(
        f"{name} is refused: it calls {called or type(function).__name__}, and a file of weights may only "
        "rebuild tensors and plain values; if you trust it, save its `state_dict()` from PyTorch"
    )


def _new(cls: Any, args: Any, name: str) -> Any:
    """Interprets `cls.__new__(cls, *args)` as a record, whatever the class; no constructor runs."""
    if not isinstance(cls, Global) or not isinstance(args, tuple):
        raise Unreadable(
            f"{name} is refused: it makes an object of {type(cls).__name__}, which is not a class"
        )
    return _VALUES[str(cls)](*args) if str(cls) == "collections.OrderedDict" else Record(cls, args)


def _set_state(value: Any, state: Any, name: str) -> None:
    match value:
        case Record():
            value.state = state
        case dict() | TensorRef():  # attributes of an ordered dict (`_metadata`) or a tensor are not needed
            pass
        case _:
            shown = str(value) if isinstance(value, Global) else type(value).__name__
            raise Unreadable(
                f"{name} is refused: it sets attributes of {shown}, which is not an object of the file"
            )


def _set_items(target: Any, items: list[Any]) -> Any:
    entries = target.items if isinstance(target, Record) else target
    if not isinstance(entries, dict) or len(items) % 2:
        raise TypeError("items for something that is not a dict")
    for key, value in zip(items[::2], items[1::2]):
        entries[key if _plain(key) else Record(_OPAQUE, (key,))] = value
    return target


def _plain(key: Any) -> bool:
    """Whether a key may be hashed.

    A deeply nested tuple overflows the C stack, and large integers and floats can be chosen to collide.
    """
    if isinstance(key, int):
        return abs(key) < _HASHED_APART
    return key is None or isinstance(key, (str, bytes, Global, Record))


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Record):  # the elements of a custom list type hold no weights
        raise TypeError("elements for something that is not a list")


def _persistent(identity: Any, name: str) -> Any:
    """Resolves what PyTorch keeps outside the pickle: storages, and in old files the source of modules."""
    if len(identity) > 6:
        raise ValueError("a persistent id that is too long")
    match identity:
        case ("module", cls, *_):
            return cls
        case ("storage", Global() as kind, str() | int() as key, _, numel, *view):
            dtype = STORAGES.get(kind.name)
            if dtype is None or kind.module.partition(".")[0] != "torch":
                raise Unreadable(f"{name} holds a storage of type {kind}, which is not supported")
            if not _is_size(numel):
                raise ValueError("the size of a storage")
            if view and view[0] is not None:
                _, offset, numel_of_view = view[0]
                if not _is_size(offset) or not _is_size(numel_of_view) or offset + numel_of_view > numel:
                    raise ValueError("a view outside of its storage")
                return StorageRef(str(key), DTYPES[dtype], numel_of_view, offset)
            return StorageRef(str(key), DTYPES[dtype], numel)
    raise ValueError("an unknown kind of persistent id")


def _is_size(number: Any) -> bool:
    """Whether a number can be a size, in 64 bits: larger integers are slow to multiply."""
    return type(number) is int and 0 <= number < 2**63


def _tensor(
    name: str,
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
    *,
    dtype: np.dtype | None = None,
) -> TensorRef:
    if not isinstance(storage, StorageRef):
        raise TypeError("a tensor without a storage")
    flags = metadata if isinstance(metadata, dict) else {}
    if len(flags) <= 32 and any(flags.values()):
        raise Unreadable(
            f"{name} holds a tensor that is still to be conjugated or negated: resolve it in PyTorch first"
        )
    dtype = dtype or storage.dtype
    if (
        len(shape) != len(stride)
        or max(len(shape), len(flags)) > 32  # any number of tensors may share long ones
        or not all(map(_is_size, (offset, *shape, *stride)))
    ):
        raise ValueError("a tensor's shape, strides, offset or flags")
    available = storage.numel * storage.dtype.itemsize // dtype.itemsize
    shape, stride = tuple(shape), tuple(stride)
    numel = math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride)) if numel else -1
    if last >= available or numel > max(available, EXPANDED_LIMIT):
        raise ValueError("a tensor larger than its storage")
    return TensorRef(storage, dtype, offset, shape, stride)


def _tensor_with_dtype(
    name: str, storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any,
    dtype: Any, metadata: Any = None,
) -> TensorRef:  # fmt: skip
    """Rebuilds tensors of dtypes without a storage class."""
    known = DTYPES.get(dtype.name) if isinstance(dtype, Global) and dtype.module == "torch" else None
    if known is None:
        shown = dtype if isinstance(dtype, Global) else type(dtype).__name__
        raise Unreadable(f"{name} holds a tensor of type {shown}, which is not supported")
    return _tensor(name, storage, offset, shape, stride, metadata=metadata, dtype=known)


def _parameter(name: str, data: Any, *_: Any) -> Any:
    return data


def _subclass(name: str, function: Any, cls: Any, args: Any, state: Any) -> Any:
    """Rebuilds only the tensor of a subclass or of a tensor with attributes."""
    return _call(function, args, name)


def _mapping(pairs: Any = None) -> dict[Any, Any]:
    """Rebuilds an ordered dict; Python 2 wrote the pairs as the argument."""
    entries = _set_items({}, [part for key, value in pairs or () for part in (key, value)])
    if pairs:
        pairs.clear()  # so that a small file cannot have one list copied any number of times
    return entries


def _unchanged(value: Any = ()) -> Any:
    """Returns the list or tuple of a set, size or list itself, not a copy, for the same reason."""
    return value


_OPAQUE = Global("builtins", "object")
_BUILTINS = ("builtins", "__builtin__")

_TENSORS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_with_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _subclass,
}

_VALUES: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _mapping,
    "torch.Size": _unchanged,
    **{
        f"{module}.{name}": _unchanged
        for module in _BUILTINS
        for name in ("set", "frozenset", "list", "tuple")
    },
}

# Constructors of plain values that are saved with weights (a date, a path, a best accuracy), which are
# recorded and not called.
_RECORDED = {
    f"{module}.{name}"
    for modules, names in (
        (_BUILTINS, ("slice", "complex", "bytearray")),
        (("collections",), ("defaultdict", "deque", "Counter")),
        (("datetime",), ("datetime", "date", "time", "timedelta", "timezone")),
        (("numpy.core.multiarray", "numpy._core.multiarray"), ("scalar", "_reconstruct")),
        (
            ("pathlib", "pathlib._local"),
            ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
        ),
        (("numpy.core.numeric", "numpy._core.numeric"), ("_frombuffer",)),
        (("numpy",), ("dtype",)),
        (("torch",), ("device",)),
        (("_codecs",), ("encode",)),
    )
    for module in modules
    for name in names
}
