"""The ONNX form of each primitive of JAX that the exporter knows: `OPERATIONS`.

A form is a function (writer, equation) -> tensor of the equation's output (of several outputs, tensors); it
writes nodes. It may settle the equation that follows as well, such as the addition of a convolution's bias.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax import lax

from repopt_jax.core.jaxprs import Equation, Value
from repopt_jax.export.graph import BATCH, FAKE_QUANTIZE, Unsupported
from repopt_jax.export.tensors import Order, Quantization, Tensor, Writer

Form = Callable[[Writer, Equation], Tensor | list[Tensor]]
Pads = Sequence[tuple[int, int]]

# Whole numbers that stand for biases have 32 bits; they stand for them up to the rounding of float32.
MAX_BIAS = 2**31 - 1
BIAS_ERROR = 2.0**-22
# Operations of Booleans alone.
LOGIC = ("And", "Or", "Not")


# -- convolutions and products


def convolution(w: Writer, e: Equation) -> Tensor:
    """Conv with the bias that is added afterwards; ConvTranspose where the input is dilated."""
    p, numbers = e.params, e.params["dimension_numbers"]
    if p["batch_group_count"] != 1:
        raise Unsupported("groups of the batch, as in a convolution's gradient")
    x = w.arranged(w.whole(e.inputs[0]), numbers.lhs_spec)
    kernel = w.arranged(w.whole(e.inputs[1]), numbers.rhs_spec)
    order: Order = numbers.out_spec
    sizes = _stored(w, e.outputs[0], order)
    if any(n != 1 for n in p["lhs_dilation"]):
        return Tensor(_transposed_convolution(w, e, x, kernel), order, sizes)
    source, pads = w.name(x), p["padding"]
    if any(n < 0 for pair in pads for n in pair):  # they crop
        source = _padded(w, source, [(0, 0)] * 2 + [(min(a, 0), min(b, 0)) for a, b in pads])
        pads = [(max(a, 0), max(b, 0)) for a, b in pads]
    add, bias = _bias_after(w, e, numbers.out_spec[1], x, kernel)
    y = w.node(
        "Conv",
        *(source, w.name(kernel, "kernel"), *bias),
        kernel_shape=list(kernel.sizes[2:]),
        strides=list(p["window_strides"]),
        pads=_begins_then_ends(pads),
        dilations=list(p["rhs_dilation"]),
        group=p["feature_group_count"],
    )
    return _settled_with(w, add, Tensor(y, order, sizes))


def _transposed_convolution(w: Writer, e: Equation, x: Tensor, kernel: Tensor) -> str:
    """A convolution of x with zeros between its entries, which ONNX describes by the window's steps over the
    output: with a kernel turned round, and pads that cut off what is beyond."""
    p = e.params
    if any(n != 1 for n in p["window_strides"]):
        raise Unsupported("a convolution with both a stride and a dilated input")
    groups, k = p["feature_group_count"], _numbers(kernel)
    k = k.reshape(groups, k.shape[0] // groups, *k.shape[1:]).swapaxes(1, 2)
    k = np.flip(k.reshape(-1, *k.shape[2:]), tuple(range(2, k.ndim - 1)))
    reach = [(n - 1) * d for n, d in zip(k.shape[2:], p["rhs_dilation"])]
    cut = [(r - a, r - b) for r, (a, b) in zip(reach, p["padding"])]
    y = w.node(
        "ConvTranspose",
        *(x, w.name(np.ascontiguousarray(k), "kernel")),
        kernel_shape=list(k.shape[2:]),
        strides=list(p["lhs_dilation"]),
        pads=_begins_then_ends([(max(a, 0), max(b, 0)) for a, b in cut]),
        dilations=list(p["rhs_dilation"]),
        group=groups,
    )
    if any(n < 0 for pair in cut for n in pair):  # no window of the input reaches so far
        y = _padded(w, y, [(0, 0)] * 2 + [(max(-a, 0), max(-b, 0)) for a, b in cut])
    return y


def product(w: Writer, e: Equation) -> Tensor:
    """Gemm of two matrices, with the bias that is added afterwards; MatMul of others."""
    (lc, rc), (lb, rb) = e.params["dimension_numbers"]
    left, right = e.inputs
    lf = [a for a in range(len(left.shape)) if a not in (*lc, *lb)]
    rf = [a for a in range(len(right.shape)) if a not in (*rc, *rb)]
    x, y = w.whole(left), w.whole(right)
    identity = tuple(range(len(e.outputs[0].shape)))
    sizes = w.sizes(e.outputs[0])
    if lb or len(lc) != 1 or len(rf) != 1:
        return Tensor(_batched_product(w, e, x, y, (lb, lf, lc), (rb, rc, rf)), identity, sizes)
    y = w.arranged(y, (*rc, *rf))
    if len(lf) == 1:
        x = w.arranged(x, (*lf, *lc))
        add, bias = _bias_after(w, e, 1, x, y)
        name = w.node("Gemm", x, w.name(y, "kernel"), *bias)
        return _settled_with(w, add, Tensor(name, identity, sizes))
    free = [a for a in x.order if a in lf]
    free = free if len(free) == len(lf) else lf
    name = w.node("MatMul", w.arranged(x, (*free, *lc)), w.name(y, "kernel"))
    order = (*(lf.index(a) for a in free), len(lf))
    return Tensor(name, order, tuple(sizes[a] for a in order))


def _batched_product(
    w: Writer, e: Equation, x: Tensor, y: Tensor, left: Sequence[Any], right: Sequence[Any]
) -> str:
    """A product over several axes, or of a batch of matrices: reshaped to (*batch, rows, columns)."""

    def matrices(t: Tensor, value: Value, groups: Sequence[Sequence[int]]) -> str:
        batch, rows, columns = groups
        t, sizes = w.arranged(t, (*batch, *rows, *columns)), w.sizes(value)
        shape = [*(sizes[a] for a in batch), *(math.prod(sizes[a] for a in g) for g in (rows, columns))]
        return w.name(t) if len(rows) == len(columns) == 1 else w.reshape(w.name(t), shape)

    made = w.node("MatMul", matrices(x, e.inputs[0], left), matrices(y, e.inputs[1], right))
    if len(left[1]) == len(right[2]) == 1:
        return made
    return w.reshape(made, w.sizes(e.outputs[0]))


def _bias_after(
    w: Writer, e: Equation, axis: int, x: Tensor, kernel: Tensor
) -> tuple[Equation | None, list[str]]:
    """The equation that adds a constant for each output channel, and the name of that constant.

    Of a quantized layer it is stored as whole numbers of 32 bits, in units of the products, if it is a
    multiple of that unit, as after `quantize.with_integer_biases`. Another one stays in floating point, as it
    is in the network: rounding it would change one in ten of the whole numbers behind it in a small network.

    Raises:
      Unsupported: it has more than 32 bits in that unit, which integer kernels cut off without a word.
    """
    add = w.sole_user(e.outputs[0], "add")
    if add is None:
        return None, []
    [other] = [v for v in add.inputs if v is not e.outputs[0]] or [None]
    b = w.graph.constants.get(other) if other is not None else None
    channels = w.sizes(e.outputs[0])[axis]
    if b is None or b.ndim != len(e.outputs[0].shape) or b.shape[axis] != channels or b.size != channels:
        return None, []
    b = b.reshape(channels)
    if x.quantization is not None and kernel.quantization is not None:
        unit = x.quantization.scale * kernel.quantization.scale
        whole = np.rint(b.astype(np.float64) / unit)
        if (most := np.abs(whole).max(initial=0)) >= MAX_BIAS:
            raise Unsupported(
                f"a bias of {most:.3g} units of the products, beside a kernel near zero: integer kernels "
                "hold 32 bits; export `quantize.with_integer_biases(model)`"
            )
        if np.allclose(whole * unit, b, rtol=BIAS_ERROR, atol=0):
            q = Quantization(unit, np.asarray(0), -MAX_BIAS, MAX_BIAS, 0 if unit.ndim else None)
            return add, [w.name(Tensor(whole.astype(np.int32), (0,), (channels,), q), "bias")]
    return add, [w.name(b, "bias")]


def _settled_with(w: Writer, following: Equation | None, t: Tensor) -> Tensor:
    """Makes the tensor that of the equation that follows too."""
    if following is not None:
        w.tensors[following.outputs[0]] = t
    return t


def fake_quantization(w: Writer, e: Equation) -> Tensor:
    """QuantizeLinear and DequantizeLinear; of a constant, whole numbers and DequantizeLinear."""
    t, p = w.settled(w[e.inputs[0]]), e.params
    scale, zero_point = (w.known(v) for v in e.inputs[1:])
    q = Quantization(scale.astype(np.float32), np.rint(zero_point), p["low"], p["high"], p["axis"])
    if isinstance(t.data, np.ndarray):
        kinds = [k for k in (np.int8, np.uint8) if np.iinfo(k).min <= q.low and q.high <= np.iinfo(k).max]
        if not kinds:
            raise Unsupported(
                f"a constant of whole numbers from {q.low} to {q.high}, which 8 bits do not hold"
            )
        shape = tuple(-1 if a == q.axis else 1 for a in range(t.data.ndim))
        s, z = (v.reshape(shape) if q.axis is not None else v for v in (q.scale, q.zero_point))
        whole = np.clip(np.rint(t.data / s) + z, q.low, q.high).astype(kinds[0])
        return Tensor(whole, t.order, t.sizes, q)
    return Tensor(t.data, t.order, t.sizes, q)


def _numbers(t: Tensor) -> np.ndarray:
    """The numbers of a known tensor, dequantized."""
    if not isinstance(t.data, np.ndarray):
        raise Unsupported("a kernel that depends on the input")
    if (q := t.quantization) is None:
        return t.data
    shape = tuple(-1 if a == q.axis else 1 for a in t.order)
    s, z = (v.reshape(shape) if q.axis is not None else v for v in (q.scale, q.zero_point))
    return ((t.data - z) * s).astype(np.float32)


# -- elementwise


def aligned(w: Writer, values: Sequence[Value]) -> tuple[list[Tensor], Order, tuple[int, ...]]:
    """The tensors of operands in one order of axes, so that ONNX broadcasts them; that order, and the sizes
    of what a node makes of them. Single known numbers are stored as scalars."""
    tensors = [w[v] for v in values]
    arrays = [t for t in tensors if t.number is None]
    if not arrays:
        return [_scalar(t) for t in tensors], (), ()
    primary = max(arrays, key=lambda t: (not isinstance(t.data, np.ndarray), len(t.stored)))
    axes = {a for t in arrays for a in t.stored}
    order = primary.order
    if not axes <= set(order):
        order = tuple(range(max(len(v.shape) for v in values)))
    made = [_scalar(t) if t.number is not None else w.arranged(t, order) for t in tensors]
    sizes = np.broadcast_shapes(*(t.sizes for t in made))
    return made, order, tuple(int(n) for n in sizes)


def _scalar(t: Tensor) -> Tensor:
    return Tensor(t.data.reshape(()), (), ()) if isinstance(t.data, np.ndarray) else t


def elementwise(make: str | Callable[..., str]) -> Form:
    """The form of an elementwise primitive: an ONNX operation of the same operands, or
    (writer, equation, *operands) -> name."""

    def form(w: Writer, e: Equation) -> Tensor:
        if isinstance(make, str) and make in LOGIC:
            others = {str(v.aval.dtype) for v in e.inputs} - {"bool"}
            if others:
                raise Unsupported(f"of {', '.join(others)}, bit by bit: files have logic of Booleans alone")
        elif isinstance(make, str) and make != "Equal":
            refuse_booleans(e)
        operands, order, sizes = aligned(w, e.inputs)
        name = w.node(make, *operands) if isinstance(make, str) else make(w, e, *operands)
        return Tensor(name, order, sizes)

    return form


def refuse_booleans(e: Equation) -> None:
    """Raises Unsupported for an operation on Booleans that files have for numbers alone."""
    if e.inputs[0].aval.dtype == np.bool_:
        raise Unsupported("of Booleans: `astype` makes numbers of them, for which there is a form")


def _like(e: Equation, number: float) -> np.ndarray:
    """A scalar of the dtype of the first operand."""
    return np.asarray(number, e.inputs[0].aval.dtype)


def maximum(w: Writer, e: Equation) -> Tensor:
    """Relu and ReLU6 (Clip) where they are meant, else Max; of Booleans Or."""
    if e.outputs[0].aval.dtype == np.bool_:
        return elementwise("Or")(w, e)  # pyright: ignore[reportReturnType]
    numbers = [w[v].number for v in e.inputs]
    if 0 not in numbers or e.outputs[0].aval.dtype != np.float32:
        return elementwise("Max")(w, e)  # pyright: ignore[reportReturnType]
    x = w[e.inputs[1 - numbers.index(0)]]
    above = w.sole_user(e.outputs[0], "min")
    if above is not None:
        limits = [w.graph.constants.get(v) for v in above.inputs if v is not e.outputs[0]]
        if len(limits) == 1 and limits[0] is not None and limits[0].size == 1:
            name = w.node("Clip", x, _like(e, 0), limits[0].reshape(()))
            return _settled_with(w, above, Tensor(name, x.order, x.sizes))
    return Tensor(w.node("Relu", x), x.order, x.sizes)


def minimum(w: Writer, e: Equation) -> Tensor:
    """Min; of Booleans And."""
    make = "And" if e.outputs[0].aval.dtype == np.bool_ else "Min"
    return elementwise(make)(w, e)  # pyright: ignore[reportReturnType]


def clamp(w: Writer, e: Equation) -> Tensor:
    low, x, high = (w[v] for v in e.inputs)
    if low.number is None or high.number is None:
        [low, x, high], order, sizes = aligned(w, e.inputs)
        return Tensor(w.node("Min", w.node("Max", x, low), high), order, sizes)
    return Tensor(w.node("Clip", x, _scalar(low), _scalar(high)), x.order, x.sizes)


def select(w: Writer, e: Equation) -> Tensor:
    """Where. The first case is that of a predicate that is False. Of Booleans, for which onnxruntime has no
    Where, it is logic."""
    if len(e.inputs) != 3 or e.inputs[0].aval.dtype != np.bool_:
        raise Unsupported("a choice between more than two cases")
    (which, no, yes), order, sizes = aligned(w, e.inputs)
    if e.outputs[0].aval.dtype == np.bool_:
        name = w.node("Or", w.node("And", which, yes), w.node("And", w.node("Not", which), no))
        return Tensor(name, order, sizes)
    return Tensor(w.node("Where", which, yes, no), order, sizes)


def cast(w: Writer, e: Equation) -> Tensor:
    t, dtype = w[e.inputs[0]], np.dtype(e.params["new_dtype"])
    if dtype == e.inputs[0].aval.dtype:
        return t
    return Tensor(w.node("Cast", t, to=dtype), t.order, t.sizes)


def power(w: Writer, e: Equation, x: Tensor) -> str:
    y = 2 if e.name == "square" else e.params["y"]
    return w.node("Mul", x, x) if y == 2 else w.node("Pow", x, _like(e, y))


def rounded(w: Writer, e: Equation, x: Tensor) -> str:
    if e.params["rounding_method"] != lax.RoundingMethod.TO_NEAREST_EVEN:
        raise Unsupported("rounding of halves away from zero")
    return w.node("Round", x)


def same(w: Writer, e: Equation) -> Tensor:
    return w[e.inputs[0]]


# -- reductions and pooling


def reduction(op: str) -> Form:
    """The form of a reduction; a sum that is divided by the number of its terms is a mean."""

    def form(w: Writer, e: Equation) -> Tensor:
        refuse_booleans(e)
        reduced = e.params["axes"]
        t = w.whole(e.inputs[0], reduced)
        left = [a for a in range(len(e.inputs[0].shape)) if a not in reduced]
        order = tuple(left.index(a) if a in left else None for a in t.order)
        sizes = tuple(1 if a is None else n for a, n in zip(order, t.sizes))
        axes = [i for i, a in enumerate(t.order) if a in reduced]
        if not axes:
            return Tensor(w.name(t), order, sizes)
        if op != "ReduceSum":
            return Tensor(w.node(op, t, axes=axes, keepdims=1), order, sizes)
        # The reduced axes may come back, with the size 1, before the division.
        back = w.sole_user(e.outputs[0], "broadcast_in_dim")
        total = back.outputs[0] if back is not None else e.outputs[0]
        divided = _division_by(w, total, math.prod(w.sizes(e.inputs[0])[a] for a in reduced))
        if divided is None:
            return Tensor(w.node(op, t, np.asarray(axes), keepdims=1), order, sizes)
        spatial = axes == list(range(2, len(t.order)))
        mean = w.node("GlobalAveragePool", t) if spatial else w.node("ReduceMean", t, axes=axes, keepdims=1)
        made = w.tensors[e.outputs[0]] = Tensor(mean, order, sizes)
        _settled_with(w, divided, made if back is None else broadcast(w, back))
        return made

    return form


def _division_by(w: Writer, value: Value, count: int) -> Equation | None:
    """The equation that divides a value by this number, if that is all that the value is used for."""
    user = w.sole_user(value, "div")
    if user is None or user.inputs[0] is not value:
        return None
    divisor = w.graph.constants.get(user.inputs[1])
    return user if divisor is not None and divisor.size == 1 and divisor.item() == count else None


def index_of_largest(w: Writer, e: Equation) -> Tensor:
    refuse_booleans(e)
    [axis] = e.params["axes"]
    t = w.holding(w.whole(e.inputs[0], [axis]), [axis], len(e.inputs[0].shape))
    name = w.node("ArgMax", t, axis=t.order.index(axis), keepdims=1)
    name = w.node("Cast", name, to=np.dtype(e.params["index_dtype"]))
    order = tuple(None if a == axis else a if a is None or a < axis else a - 1 for a in t.order)
    return Tensor(name, order, tuple(1 if a is None else n for a, n in zip(order, t.sizes)))


def pooling(op: str) -> Form:
    """The form of a maximum or sum over windows; the sum is a mean times the size of the window."""

    def form(w: Writer, e: Equation) -> Tensor:
        p = e.params
        window, strides, pads = p["window_dimensions"], p["window_strides"], p["padding"]
        dilation = p["window_dilation"]
        if any(n != 1 for n in p["base_dilation"]):
            raise Unsupported("windows over a dilated input")
        if op == "AveragePool" and any(n != 1 for n in dilation):
            raise Unsupported("sums over dilated windows")
        moved = [a for a, n in enumerate(zip(window, strides)) if n != (1, 1) or any(pads[a])]
        if not moved:
            return w[e.inputs[0]]
        rest = [a for a in range(len(window)) if a not in moved]
        spatial = sorted([*moved, *rest[2:]])
        images = rest[0] if rest else None
        channels = rest[1] if len(rest) > 1 else None
        order: Order = (images, channels, *spatial)
        t = w.arranged(w.whole(e.inputs[0], moved), order)
        name, inside = w.name(t), [pads[a] for a in spatial]
        reach = [(window[a] - 1) * dilation[a] + 1 for a in spatial]
        if any(not 0 <= n < r for pair, r in zip(inside, reach) for n in pair):
            name = _padded(w, name, [(0, 0)] * 2 + inside, -np.inf if op == "MaxPool" else 0.0)
            inside = [(0, 0)] * len(spatial)
        attributes: dict[str, Any] = {
            "kernel_shape": [window[a] for a in spatial],
            "strides": [strides[a] for a in spatial],
            "pads": _begins_then_ends(inside),
        }
        sizes = w.sizes(e.outputs[0])
        stored = tuple(1 if a is None or (a in rest and n == 1) else sizes[a] for a, n in zip(order, t.sizes))
        if op == "MaxPool":
            name = w.node(op, name, dilations=[dilation[a] for a in spatial], **attributes)
            return Tensor(name, order, stored)
        name = w.node(op, name, count_include_pad=1, **attributes)
        count = math.prod(window)
        divided = _division_by(w, e.outputs[0], count)
        if divided is None:
            return Tensor(w.node("Mul", name, np.asarray(count, np.float32)), order, stored)
        return _settled_with(w, divided, Tensor(name, order, stored))

    return form


# -- moving, cutting and joining


def moved_axes(w: Writer, e: Equation) -> Tensor:
    inverse = {a: i for i, a in enumerate(e.params["permutation"])}
    return relabelled(w, w[e.inputs[0]], inverse)


def broadcast(w: Writer, e: Equation) -> Tensor:
    operand, *sizes = e.inputs
    if sizes:
        raise Unsupported("a shape that depends on the input")
    return relabelled(w, w[operand], dict(enumerate(e.params["broadcast_dimensions"])))


def relabelled(w: Writer, t: Tensor, axes: dict[int, int]) -> Tensor:
    """The same stored array, whose axes have other numbers; those without one have the size 1."""
    if t.quantization is not None and t.quantization.axis is not None:
        t = w.settled(t)
    order = tuple(None if a is None else axes.get(a) for a in t.order)
    return Tensor(t.data, order, t.sizes, t.quantization)


def reshape(w: Writer, e: Equation) -> Tensor:
    if e.params.get("dimensions") not in (None, ()) and e.name == "reshape":
        raise Unsupported("a reshape that moves axes too")
    return reshaped(w, w[e.inputs[0]], w.sizes(e.inputs[0]), w.sizes(e.outputs[0]))


def reshaped(w: Writer, t: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Reshapes, in the order in which the array is stored where what is joined lies side by side there.

    An axis that is broadcast and then joined to the one before it repeats that one's entries: Resize.
    """
    same_axes, blocks = {}, []
    for olds, news in factored(old, new):
        a, b = [i for i in olds if old[i] != 1], [i for i in news if new[i] != 1]
        if len(a) == len(b) == 1:
            same_axes[a[0]] = b[0]
        elif a or b:
            blocks.append((a, b))
    if not blocks:
        return relabelled(w, t, same_axes)
    repeats = [
        (a, b) for a, b in blocks if len(a) == 2 and len(b) == 1 and a[1] not in t.stored and a[0] in t.stored
    ]
    t = w.settled(t)
    if len(repeats) == len(blocks):
        scales = {a[0]: old[a[1]] for a, _ in repeats}
        joined = same_axes | {a[0]: b[0] for a, b in repeats}
        order = tuple(a for a in t.order if a is None or a in joined)
        t = w.arranged(t, order)
        return relabelled(w, _resized(w, t, scales), joined)
    t = w.expanded(t, old, [i for a, _ in blocks for i in a])
    kept = list(t.stored)
    if any(a and kept[kept.index(a[0]) :][: len(a)] != a for a, _ in blocks):
        t, kept = w.arranged(t, sorted(kept)), sorted(kept)
    first = {a[0]: (a, b) for a, b in blocks if a}
    inside = {i for a, _ in blocks for i in a}
    order, sizes = [], []
    for axis in kept:
        if axis in first:
            order += first[axis][1]
            sizes += [new[i] for i in first[axis][1]]
        elif axis not in inside:
            order.append(same_axes[axis])
            sizes.append(t.stored[axis])
    if isinstance(t.data, np.ndarray):
        return Tensor(t.data.reshape(sizes), tuple(order), tuple(sizes))
    return Tensor(w.reshape(t.data, sizes), tuple(order), tuple(sizes))


def factored(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pairs of lists of axes, of the old and of the new shape, whose sizes have the same product."""
    if 0 in old or 0 in new:
        return [(list(range(len(old))), list(range(len(new))))]
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        a, b, m, n = [], [], 1, 1
        while not (a or b) or m != n:
            if j == len(new) or (i < len(old) and m <= n):
                a.append(i)
                m, i = m * old[i], i + 1
            else:
                b.append(j)
                n, j = n * new[j], j + 1
        groups.append((a, b))
    return groups


def _resized(w: Writer, t: Tensor, scales: dict[int, int]) -> Tensor:
    """Repeats every entry along these axes."""
    factors = [float(scales.get(a, 1)) if a is not None else 1.0 for a in t.order]
    name = w.node(
        "Resize",
        *(t, "", np.asarray(factors, np.float32)),
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
    return Tensor(name, t.order, tuple(int(n * f) for n, f in zip(t.sizes, factors)))


def concatenation(w: Writer, e: Equation) -> Tensor:
    if len(e.inputs) == 1:
        return w[e.inputs[0]]
    return _joined(w, e, [w.whole(v) for v in e.inputs], e.params["dimension"])


def stacking(w: Writer, e: Equation) -> Tensor:
    """A concatenation along a new axis."""
    axis, rank = e.params["axis"], len(e.outputs[0].shape)
    new = dict(enumerate(a for a in range(rank) if a != axis))
    return _joined(w, e, [relabelled(w, w.whole(v), new) for v in e.inputs], axis)


def _joined(w: Writer, e: Equation, tensors: list[Tensor], axis: int) -> Tensor:
    identity = tuple(range(len(e.outputs[0].shape)))
    order = max(tensors, key=lambda t: (not isinstance(t.data, np.ndarray), len(t.stored))).order
    order = order if set(order) == set(identity) else identity
    name = w.node("Concat", *(w.arranged(t, order) for t in tensors), axis=order.index(axis))
    return Tensor(name, order, _stored(w, e.outputs[0], order))


def tiling(w: Writer, e: Equation) -> Tensor:
    repeats = e.params["reps"]
    axes = [a for a, n in enumerate(repeats) if n != 1]
    t = w.holding(w.whole(e.inputs[0], axes), axes, len(repeats))
    times = [1 if a is None else repeats[a] for a in t.order]
    name = w.node("Tile", t, np.asarray(times))
    return Tensor(name, t.order, tuple(n * m for n, m in zip(t.sizes, times)))


def padding(w: Writer, e: Equation) -> Tensor:
    config, value = e.params["padding_config"], w[e.inputs[1]].number
    if value is None:
        raise Unsupported("padding with a number that depends on the input")
    if any(inner for _, _, inner in config):
        raise Unsupported("padding between the entries")
    axes = [a for a, n in enumerate(config) if any(n)]
    t = w.holding(w.whole(e.inputs[0], axes), axes, len(config))
    pads = [(0, 0) if a is None else config[a][:2] for a in t.order]
    name = _padded(w, w.name(t), pads, value, e.inputs[0].aval.dtype)
    return Tensor(name, t.order, tuple(n + a + b for n, (a, b) in zip(t.sizes, pads)))


def _padded(w: Writer, x: str, pads: Pads, value: float = 0.0, dtype: Any = np.float32) -> str:
    """Pads the axes as they are stored; negative pads crop."""
    if not any(map(any, pads)):
        return x
    return w.node("Pad", x, np.asarray(_begins_then_ends(pads)), np.asarray(value, dtype))


def slicing(w: Writer, e: Equation) -> Tensor:
    p, rank = e.params, len(e.inputs[0].shape)
    starts, limits = w.graph.sizes(p["start_indices"]), w.graph.sizes(p["limit_indices"])
    return sliced(w, e.inputs[0], starts, limits, p["strides"] or (1,) * rank)


def sliced(
    w: Writer, value: Value, starts: Sequence[int], limits: Sequence[int], steps: Sequence[int]
) -> Tensor:
    """Slice along the axes that are not whole; those that are broadcast stay so."""
    t, sizes = w.settled(w[value]), w.sizes(value)
    axes = [
        a for a, cut in enumerate(zip(starts, limits, steps)) if cut != (0, sizes[a], 1) and a in t.stored
    ]
    if not axes:
        return t
    parts = ([v[a] for a in axes] for v in (starts, limits))
    name = w.node(
        "Slice",
        t,
        *(np.asarray(part) for part in parts),
        np.asarray([t.order.index(a) for a in axes]),
        np.asarray([steps[a] for a in axes]),
    )
    new = tuple(
        -(-(limits[a] - starts[a]) // steps[a]) if a in axes else n  # pyright: ignore
        for a, n in zip(t.order, t.sizes)
    )
    return Tensor(name, t.order, new)


def dynamic_slicing(w: Writer, e: Equation) -> Tensor:
    """Slice that starts where the input says: as in JAX, at the nearest place where the part is inside."""
    operand, *given = e.inputs
    sizes, parts = w.sizes(operand), w.graph.sizes(e.params["slice_sizes"])
    cut = [a for a, (n, part) in enumerate(zip(sizes, parts)) if n != part]
    if any(sizes[a] % BATCH == 0 for a in cut):
        raise Unsupported("a slice of the batch whose end depends on the batch size")
    last = {a: sizes[a] - parts[a] for a in cut}
    numbers = {a: w[given[a]].number for a in cut}
    known = {a: min(max(int(n), 0), last[a]) for a, n in numbers.items() if n is not None}
    if len(known) == len(cut):
        starts = [known.get(a, 0) for a in range(len(sizes))]
        limits = [start + part for start, part in zip(starts, parts)]
        return sliced(w, operand, starts, limits, (1,) * len(sizes))
    t = w.settled(w[operand])
    axes = [a for a in cut if a in t.stored]
    if not axes:
        return t
    starts = [np.asarray([known[a]]) if a in known else _start(w, given[a], last[a]) for a in axes]
    start = w.node("Concat", *starts, axis=0)
    end = w.node("Add", start, np.asarray([parts[a] for a in axes]))
    name = w.node("Slice", t, start, end, np.asarray([t.order.index(a) for a in axes]))
    new = tuple(parts[a] if a in axes else n for a, n in zip(t.order, t.sizes))  # pyright: ignore
    return Tensor(name, t.order, new)


def _start(w: Writer, value: Value, last: int) -> str:
    """A whole number that depends on the input, from 0 to `last`, as a vector of one."""
    number = w.node("Cast", w.reshape(w.name(w.settled(w[value])), (1,)), to=np.dtype(np.int64))
    return w.node("Max", w.node("Min", number, np.asarray([last])), np.asarray([0]))


def reversal(w: Writer, e: Equation) -> Tensor:
    sizes, turned = w.sizes(e.inputs[0]), e.params["dimensions"]
    t = w.settled(w[e.inputs[0]])
    axes = [t.order.index(a) for a in turned if a in t.stored]
    if not axes:
        return t
    ends = [-1 - sizes[a] for a in turned if a in t.stored]
    one = np.full(len(axes), -1)
    return Tensor(w.node("Slice", t, one, np.asarray(ends), np.asarray(axes), one), t.order, t.sizes)


def gathering(w: Writer, e: Equation) -> Tensor:
    """A slice at known indices, or known entries along one axis (Gather; Resize where they are repeated)."""
    numbers, operand = e.params["dimension_numbers"], e.inputs[0]
    index = w.known(e.inputs[1])
    sizes, parts = w.sizes(operand), w.graph.sizes(e.params["slice_sizes"])
    if numbers.operand_batching_dims or index.ndim > 2 or (index.ndim == 2 and index.shape[1] != 1):
        raise Unsupported("a gather by indices of several axes")
    most = [sizes[a] - parts[a] for a in numbers.start_index_map]
    inside = np.clip(index, 0, most)
    if (inside != index).any():
        raise Unsupported("a gather by indices outside of the array")
    if index.ndim == 1:
        starts = [0] * len(sizes)
        for axis, start in zip(numbers.start_index_map, index.tolist()):
            starts[axis] = start
        t = sliced(w, operand, starts, [s + n for s, n in zip(starts, parts)], (1,) * len(sizes))
        return reshaped(w, t, parts, w.sizes(e.outputs[0]))
    [axis], others = numbers.start_index_map, numbers.collapsed_slice_dims
    left = [a for a in range(len(sizes)) if a != axis]
    if tuple(others) != (axis,) or any(parts[a] != sizes[a] for a in left):
        raise Unsupported("a gather of parts of an array")
    [place] = [a for a in range(len(sizes)) if a not in numbers.offset_dims]
    renumbered = dict(zip(left, numbers.offset_dims)) | {axis: place}
    t = w.holding(w.whole(operand, [axis]), [axis], len(sizes))
    entries, times = index[:, 0], len(index) // sizes[axis]
    if times > 1 and np.array_equal(entries, np.repeat(np.arange(sizes[axis]), times)):
        return relabelled(w, _resized(w, w.settled(t), {axis: times}), renumbered)
    name = w.node("Gather", t, entries.astype(np.int64), axis=t.order.index(axis))
    new = tuple(len(index) if a == axis else n for a, n in zip(t.order, t.sizes))
    return relabelled(w, Tensor(name, t.order, new), renumbered)


def splitting(w: Writer, e: Equation) -> list[Tensor]:
    axis, parts = e.params["axis"], w.graph.sizes(tuple(e.params["sizes"]))
    t = w.holding(w.whole(e.inputs[0], [axis]), [axis], len(e.inputs[0].shape))
    names = w.node_of("Split", len(parts), t, np.asarray(parts), axis=t.order.index(axis))
    return [
        Tensor(name, t.order, tuple(part if a == axis else n for a, n in zip(t.order, t.sizes)))
        for name, part in zip(names, parts)
    ]


def _begins_then_ends(pads: Pads) -> list[int]:
    return [a for a, _ in pads] + [b for _, b in pads]


def _stored(w: Writer, value: Value, order: Order) -> tuple[int, ...]:
    """The sizes of a value in this order."""
    sizes = w.sizes(value)
    return tuple(1 if a is None else sizes[a] for a in order)


# What is small beside 1 (`erfc`, `expm1`, `log1p`) keeps its absolute precision, not its relative one.
OPERATIONS: dict[str, Form] = {
    "conv_general_dilated": convolution,
    "dot_general": product,
    FAKE_QUANTIZE: fake_quantization,
    **{
        name: elementwise(op)
        for name, op in {
            "add": "Add",
            "add_any": "Add",
            "sub": "Sub",
            "mul": "Mul",
            "div": "Div",
            "pow": "Pow",
            "neg": "Neg",
            "abs": "Abs",
            "sign": "Sign",
            "exp": "Exp",
            "log": "Log",
            "sqrt": "Sqrt",
            "tanh": "Tanh",
            "sin": "Sin",
            "cos": "Cos",
            "erf": "Erf",
            "floor": "Floor",
            "ceil": "Ceil",
            "logistic": "Sigmoid",
            "eq": "Equal",
            "lt": "Less",
            "le": "LessOrEqual",
            "gt": "Greater",
            "ge": "GreaterOrEqual",
            "and": "And",
            "or": "Or",
            "not": "Not",
        }.items()
    },
    "ne": elementwise(lambda w, e, x, y: w.node("Not", w.node("Equal", x, y))),
    "rsqrt": elementwise(lambda w, e, x: w.node("Reciprocal", w.node("Sqrt", x))),
    "erfc": elementwise(lambda w, e, x: w.node("Sub", _like(e, 1), w.node("Erf", x))),
    "expm1": elementwise(lambda w, e, x: w.node("Sub", w.node("Exp", x), _like(e, 1))),
    "log1p": elementwise(lambda w, e, x: w.node("Log", w.node("Add", x, _like(e, 1)))),
    "square": elementwise(power),
    "integer_pow": elementwise(power),
    "round": elementwise(rounded),
    "max": maximum,
    "min": minimum,
    "clamp": clamp,
    "select_n": select,
    "convert_element_type": cast,
    "stop_gradient": same,
    "copy": same,
    "copy_p": same,
    "reduce_sum": reduction("ReduceSum"),
    "reduce_max": reduction("ReduceMax"),
    "reduce_min": reduction("ReduceMin"),
    "reduce_prod": reduction("ReduceProd"),
    "argmax": index_of_largest,
    "reduce_window_max": pooling("MaxPool"),
    "reduce_window_sum": pooling("AveragePool"),
    "transpose": moved_axes,
    "broadcast_in_dim": broadcast,
    "reshape": reshape,
    "squeeze": reshape,
    "concatenate": concatenation,
    "stack": stacking,
    "tile": tiling,
    "pad": padding,
    "slice": slicing,
    "dynamic_slice": dynamic_slicing,
    "gather": gathering,
    "split": splitting,
    "rev": reversal,
}
