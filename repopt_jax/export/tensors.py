"""What an exporter to ONNX writes into: nodes, constants, and arrays whose axes may lie in another order.

ONNX's feature maps are channels first and JAX's channels last. An array of the network is kept in the order
in which a node has made it, and a node that moves axes is written only where another order is wanted. So
transposing, adding and removing axes of size 1, and broadcasting write nothing.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from repopt_jax.core.jaxprs import Equation, Value
from repopt_jax.export.graph import BATCH, Graph, Unsupported

Order = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """A node of an ONNX graph; attributes are numbers, strings or lists of them."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    name: str
    attributes: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Quantization:
    """x' = (clip(round(x / scale) + zero_point, low, high) - zero_point) * scale, as `fake_quantize`.

    `axis` is that of the array in the network, None for one scale.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    low: int
    high: int
    axis: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """An array of the network as it is stored in the file.

    Attributes:
      data: name of the stored array, or the array itself if it is known.
      order: the axis of the network's array that lies at each axis of the stored one; None for one of size 1
        that the network's array does not have. Axes that occur nowhere have the size 1.
      sizes: of the stored array. A size of 1 stands for any: it is broadcast.
      quantization: if given, `data` is what is quantized: an array of floating point numbers, or a known
        array of whole numbers.
    """

    data: str | np.ndarray
    order: Order
    sizes: tuple[int, ...]
    quantization: Quantization | None = None

    @property
    def number(self) -> float | None:
        """The number, if it is a known single one."""
        known = isinstance(self.data, np.ndarray) and self.data.size == 1 and self.quantization is None
        return self.data.item() if known else None  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def stored(self) -> dict[int, int]:
        """Axis -> stored size, of those whose stored size is not 1, in the order in which they are stored."""
        return {a: n for a, n in zip(self.order, self.sizes) if a is not None and n != 1}


def plain(data: np.ndarray) -> Tensor:
    """A known array."""
    return Tensor(data, tuple(range(data.ndim)), data.shape)


class Writer:
    """The nodes and constants of a file, and the tensors that stand for the values of a graph."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.nodes: list[Node] = []
        self.initial: list[Node] = []  # those that dequantize constants, before all others
        self.constants: dict[str, np.ndarray] = {}
        self.tensors: dict[Value, Tensor] = {}
        self._users: dict[Value, list[Equation]] = {}
        for equation in graph.equations:
            for value in equation.inputs:
                self._users.setdefault(value, []).append(equation)
        self.path = ""
        self._names: dict[str, int] = dict.fromkeys(graph.outputs, 0)  # taken
        self._known: dict[Any, str] = {}

    # -- values

    def __getitem__(self, value: Value) -> Tensor:
        if value not in self.tensors and value in self.graph.constants:
            self.tensors[value] = plain(self.graph.constants[value])
        return self.tensors[value]

    def sizes(self, value: Value) -> tuple[int, ...]:
        """The sizes of a value, `BATCH` for the batch."""
        return self.graph.sizes(value.shape)

    def whole(self, value: Value, axes: Sequence[int] | None = None) -> Tensor:
        """The tensor of a value with its full size along `axes`; by default along all of them."""
        return self.expanded(self[value], self.sizes(value), axes)

    def known(self, value: Value) -> np.ndarray:
        """The array of a value that does not depend on the input.

        Raises:
          Unsupported: it does.
        """
        t = self[value]
        if not isinstance(t.data, np.ndarray) or t.quantization is not None:
            raise Unsupported("an operand that must be known depends on the input")
        return t.data

    def sole_user(self, value: Value, name: str) -> Equation | None:
        """The equation that alone uses a value, if it is of this primitive."""
        users = self._users.get(value, [])
        alone = len(users) == 1 and value not in self.graph.outputs.values()
        return users[0] if alone and users[0].name == name else None

    def start(self, name: str) -> None:
        """Gives the graph's input this name."""
        value = self.graph.inputs[0]
        self.tensors[value] = Tensor(name, tuple(range(len(value.shape))), self.sizes(value))

    # -- nodes and constants

    def node(self, op: str, *inputs: str | Tensor | np.ndarray, **attributes: Any) -> str:
        """Writes a node of one output and returns the output's name."""
        return self.node_of(op, 1, *inputs, **attributes)[0]

    def node_of(
        self, op: str, count: int, *inputs: str | Tensor | np.ndarray, **attributes: Any
    ) -> list[str]:
        """Writes a node and returns the names of its outputs."""
        name = self.fresh(op)
        outputs = [f"{name}_output_{i}" for i in range(count)]
        names = tuple(self.name(given) for given in inputs)
        self.nodes.append(Node(op, names, tuple(outputs), name, attributes))
        return outputs

    def name(self, given: str | Tensor | np.ndarray, hint: str = "constant") -> str:
        """The name of what is stored for a tensor; of an array, that of a constant."""
        if isinstance(given, str):
            return given
        if isinstance(given, np.ndarray):
            return self.constant(given, hint)
        if given.quantization is None:
            return self.name(given.data, hint)
        if isinstance(given.data, np.ndarray):
            return self._dequantized(given, given.quantization, hint)
        return self._quantized(given, given.quantization)

    def constant(self, array: np.ndarray, hint: str = "constant") -> str:
        """The name of a constant; equal small ones are stored once."""
        key = (array.dtype.str, array.shape, array.tobytes()) if array.size <= 16 else id(array)
        if key not in self._known:
            self._known[key] = self.fresh(hint)
            self.constants[self._known[key]] = array
        return self._known[key]

    def fresh(self, name: str) -> str:
        """A name that is not taken, after the module's path."""
        name = f"{self.path}/{name}" if self.path else name
        self._names[name] = count = self._names.get(name, -1) + 1
        return f"{name}_{count}" if count else name

    # -- quantization

    def _dequantized(self, t: Tensor, q: Quantization, hint: str) -> str:
        """A known array of whole numbers, stored as such."""
        key = (id(t.data), "dequantized")
        if key not in self._known:
            whole = self.fresh(f"{hint}_quantized")
            self.constants[whole] = t.data  # pyright: ignore[reportArgumentType]
            zero = np.broadcast_to(q.zero_point, q.scale.shape).astype(t.data.dtype)  # pyright: ignore
            inputs = (
                whole,
                self.constant(q.scale, f"{hint}_scale"),
                self.constant(zero, f"{hint}_zero_point"),
            )
            attributes = {} if q.axis is None else {"axis": t.order.index(q.axis)}
            name = self.fresh("DequantizeLinear")
            self._known[key] = f"{name}_output_0"
            self.initial.append(Node("DequantizeLinear", inputs, (f"{name}_output_0",), name, attributes))
        return self._known[key]

    def _quantized(self, t: Tensor, q: Quantization) -> str:
        """An array of the network, quantized and dequantized."""
        key = (t.data, t.order, q.scale.tobytes(), q.zero_point.tobytes(), q.low, q.high)
        if key not in self._known:
            x, kind = t.data, np.uint8 if q.low >= 0 else np.int8
            low, high = np.iinfo(kind).min, np.iinfo(kind).max
            if not (low <= q.low and q.high <= high):
                raise Unsupported(f"whole numbers from {q.low} to {q.high}, which 8 bits do not hold")
            if q.axis is not None:
                raise Unsupported("a scale for each channel of what depends on the input")
            if (q.low, q.high) != (low, high):
                limits = [(np.float32(n) - q.zero_point) * q.scale for n in (q.low, q.high)]
                x = self.node("Clip", x, *(np.asarray(limit, np.float32) for limit in limits))
            parameters = (
                self.constant(q.scale, "input_scale"),
                self.constant(q.zero_point.astype(kind), "input_zero_point"),
            )
            whole = self.node("QuantizeLinear", x, *parameters)
            self._known[key] = self.node("DequantizeLinear", whole, *parameters)
        return self._known[key]

    def settled(self, t: Tensor) -> Tensor:
        """The same tensor without a quantization, whose nodes are written."""
        return t if t.quantization is None else Tensor(self.name(t), t.order, t.sizes)

    # -- the order of axes

    def arranged(self, t: Tensor, order: Sequence[int | None]) -> Tensor:
        """The tensor stored in this order of axes; what is quantized is moved before it is quantized."""
        order = tuple(order)
        if order == t.order:
            return t
        held = t.stored
        sizes = tuple(1 if a is None else held.get(a, 1) for a in order)
        kept, wanted = list(held), [a for a in order if a in held]
        if sorted(kept) != sorted(wanted):
            raise Unsupported(f"axes {t.order} of sizes {t.sizes} cannot be stored as {order}")
        if kept == wanted and sizes == t.sizes:
            return Tensor(t.data, order, sizes, t.quantization)
        data: str | np.ndarray
        if isinstance(t.data, np.ndarray):
            moved = t.data.reshape(tuple(held.values())).transpose([kept.index(a) for a in wanted])
            data = np.ascontiguousarray(moved.reshape(sizes))
        else:
            data = self._moved(t, t.data, order, sizes)
        return Tensor(data, order, sizes, t.quantization)

    def _moved(self, t: Tensor, data: str, order: Order, sizes: tuple[int, ...]) -> str:
        key = (data, t.order, order, sizes)
        if key not in self._known:
            held = t.stored
            wanted = [a for a in order if a in held]
            if list(held) == wanted:
                name = self.reshape(data, sizes)
            elif None not in order and set(order) == set(t.order):
                name = self.node("Transpose", data, perm=[t.order.index(a) for a in order])
            else:
                name = data if len(held) == len(t.order) else self.reshape(data, tuple(held.values()))
                name = self.node("Transpose", name, perm=[list(held).index(a) for a in wanted])
                name = name if len(wanted) == len(order) else self.reshape(name, sizes)
            self._known[key] = name
        return self._known[key]

    def reshape(self, data: str, sizes: Sequence[int]) -> str:
        """Reshapes a stored array.

        Raises:
          Unsupported: several sizes that depend on the batch size.
        """
        if sum(n != 0 and n % BATCH == 0 for n in sizes) > 1:
            raise Unsupported("several sizes that depend on the batch size")
        target = [-1 if n and n % BATCH == 0 else n for n in sizes]
        return self.node("Reshape", data, np.asarray(target, np.int64))

    def holding(self, t: Tensor, axes: Sequence[int], rank: int) -> Tensor:
        """The tensor with each of `axes`, of `rank`, among those that are stored."""
        missing = [a for a in axes if a not in t.order]
        if not missing:
            return t
        if t.order.count(None) >= len(missing):
            taken = iter(missing)
            return self.arranged(t, [next(taken, None) if a is None else a for a in t.order])
        sorted_already = list(t.stored) == sorted(t.stored)
        return self.arranged(t, range(rank) if sorted_already else (*t.order, *missing))

    # -- broadcasting

    def expanded(self, t: Tensor, sizes: Sequence[int], axes: Sequence[int] | None = None) -> Tensor:
        """The tensor with these sizes along `axes`, all by default; order and other axes stay if they can."""
        axes, held = range(len(sizes)) if axes is None else axes, t.stored
        lacking = [a for a in axes if sizes[a] != 1 and a not in held]
        if not lacking:
            return t
        t = self.settled(t)
        t = self.holding(t, lacking, len(sizes))
        target = tuple(sizes[a] if a in lacking else n for a, n in zip(t.order, t.sizes))  # pyright: ignore
        depends = any(n and n % BATCH == 0 for a, n in zip(t.order, target) if a in lacking)
        if isinstance(t.data, np.ndarray) and not depends:
            return Tensor(np.broadcast_to(t.data, target), t.order, target)
        ask = [n if a in lacking else 1 for a, n in zip(t.order, target)]
        return Tensor(self.node("Expand", t, self._shape(ask)), t.order, target)

    def _shape(self, sizes: Sequence[int]) -> str:
        """A vector of sizes, of which some depend on the batch."""
        if not any(n and n % BATCH == 0 for n in sizes):
            return self.constant(np.asarray(sizes, np.int64))
        key = "batch size"
        if key not in self._known:
            shape = self.node("Shape", self[self.graph.inputs[0]])
            zero, one = np.asarray([0]), np.asarray([1])
            self._known[key] = self.node("Slice", shape, zero, one)
        parts: list[str] = []
        for n in sizes:
            number = self.constant(np.asarray([n if not n or n % BATCH else n // BATCH], np.int64))
            of_batch = n != 0 and n % BATCH == 0
            parts.append(self.node("Mul", self._known[key], number) if of_batch else number)
        return self.node("Concat", *parts, axis=0)
