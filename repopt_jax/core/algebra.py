"""Kernel maps: every identity between a small tensor and a merged kernel, written once.

A kernel has the shape (*spatial, in/groups, out): HWIO in two dimensions, the same with one or three spatial
axes, and (in, out) for a dense layer. A *window* is a kernel's spatial shape. Each map below is linear in its
first argument, so that `jax.linear_transpose` gives its adjoint.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from jax.typing import ArrayLike


class Taps(NamedTuple):
    """The `count` taps that a smaller kernel occupies along one axis of a window: start, start + step, ..."""

    start: int
    step: int
    count: int


def centred_taps(size: Sequence[int], window: Sequence[int], dilation: Sequence[int]) -> tuple[Taps, ...]:
    """Returns the taps that centre a kernel of spatial shape `size`, dilated by `dilation`, in `window`.

    Raises:
      ValueError: the dilated kernel is larger than the window, or cannot be centred in it (an odd number of
        taps is left over, as for a 2-tap kernel in a window of 3).
    """
    if not len(size) == len(window) == len(dilation):
        raise ValueError(
            f"`size` {tuple(size)}, `window` {tuple(window)} and `dilation` {tuple(dilation)} must have one "
            "entry for each spatial axis"
        )
    taps = []
    for axis, (k, w, d) in enumerate(zip(size, window, dilation)):
        left_over = w - ((k - 1) * d + 1)
        if k < 1 or d < 1 or left_over < 0 or left_over % 2:
            dilated = f" with dilation {d}" if d != 1 else ""
            many = f"{left_over} more, and as many must lie on both sides"
            raise ValueError(
                f"a kernel of {k} tap{'' if k == 1 else 's'}{dilated} cannot be centred in a window of {w} "
                f"taps (spatial axis {axis}): the window {f'has {many}' if left_over > 0 else 'is smaller'}"
            )
        taps.append(Taps(left_over // 2, d, k))
    return tuple(taps)


def place(w: jax.Array, window: Sequence[int], taps: Sequence[Taps]) -> jax.Array:
    """Places w, (*size, in/g, out), at `taps` of an otherwise zero kernel (*window, in/g, out)."""
    if all(t.count in (1, n) for t, n in zip(taps, window)):
        return _at_tap(w, [(n, t.start) if t.count < n else None for t, n in zip(taps, window)])
    padding = [
        (t.start, n - t.start - ((t.count - 1) * t.step + 1), t.step - 1) for t, n in zip(taps, window)
    ]
    return lax.pad(w, jnp.zeros((), w.dtype), [*padding, (0, 0, 0), (0, 0, 0)])


def _at_tap(w: jax.Array, spatial: Sequence[tuple[int, int] | None]) -> jax.Array:
    places = (*spatial, *(None,) * (w.ndim - len(spatial)))
    return _spread.bind(w, places=places) if any(places) else w


# `lax.pad` of axes of length one: (length, index) for each axis, or None. XLA's CPU backend writes to memory
# what it pads; a comparison of indices it computes where it is read. The adjoint is a slice, which that of a
# comparison would not be.
_spread = core.Primitive("repopt_spread")


def _compared(w: jax.Array, *, places: Sequence[tuple[int, int] | None]) -> jax.Array:
    shape = tuple(n if place is None else place[0] for n, place in zip(w.shape, places))
    here = jnp.ones((), bool)
    for axis, place in enumerate(places):
        if place is not None:
            here = here & (lax.broadcasted_iota(jnp.int32, shape, axis) == place[1])
    return jnp.where(here, jnp.broadcast_to(w, shape), jnp.zeros((), w.dtype))


def _sliced(cotangent: Any, w: Any, *, places: Sequence[tuple[int, int] | None]) -> list[Any]:
    if isinstance(cotangent, ad.Zero):
        return [ad.Zero(w.aval)]
    for axis, place in enumerate(places):
        if place is not None:
            cotangent = lax.slice_in_dim(cotangent, place[1], place[1] + 1, axis=axis)
    return [cotangent]


def _batched(args: Sequence[Any], dims: Sequence[Any], *, places: Sequence[Any]) -> tuple[Any, int]:
    (w,), (dim,) = args, dims
    return _spread.bind(w, places=(*places[:dim], None, *places[dim:])), dim


@functools.cache
def _compiled(places: tuple[tuple[int, int] | None, ...]) -> Callable[..., jax.Array]:
    return jax.jit(functools.partial(_spread.bind, places=places))


_spread.def_impl(lambda w, *, places: _compiled(places)(w))
_spread.def_abstract_eval(
    lambda w, *, places: w.update(shape=tuple(n if p is None else p[0] for n, p in zip(w.shape, places)))
)
mlir.register_lowering(_spread, mlir.lower_fun(_compared, multiple_results=False))
ad.deflinear2(_spread, _sliced)
batching.primitive_batchers[_spread] = _batched


def covers(shape: Sequence[int], taps: Sequence[Taps]) -> jax.Array:
    """Returns a boolean kernel of `shape` that is True at `taps`, where `place` writes.

    It consists of iota comparisons, which XLA fuses into whatever reads them; `place` of ones would be a
    buffer in memory.
    """
    mask = jnp.ones((1,) * len(shape), bool)
    for axis, t in enumerate(taps):
        if t == Taps(0, 1, shape[axis]):
            continue
        index = lax.broadcasted_iota(jnp.int32, tuple(shape), axis) - t.start
        mask = mask & (index >= 0) & (index % t.step == 0) & (index <= (t.count - 1) * t.step)
    return jnp.broadcast_to(mask, shape)


def centre_tap(window: Sequence[int]) -> tuple[Taps, ...]:
    """Returns the centre tap of a window with odd sides.

    Raises:
      ValueError: a side of the window is even, so that it has no centre tap.
    """
    return centred_taps((1,) * len(window), window, (1,) * len(window))


def own_channel(shape: Sequence[int]) -> jax.Array:
    """Returns a boolean kernel of `shape` that is True where the input channel equals the output channel.

    It is True at every tap. In a layer with as many inputs as outputs, input channel o is number o mod
    (in/groups) within the group of output channel o.
    """
    i = lax.broadcasted_iota(jnp.int32, tuple(shape), len(shape) - 2)
    o = lax.broadcasted_iota(jnp.int32, tuple(shape), len(shape) - 1)
    return i == o % shape[-2]


def diagonal(shape: Sequence[int]) -> jax.Array:
    """Returns `own_channel` restricted to the centre tap: where the identity's kernel is not zero."""
    return covers(shape, centre_tap(shape[:-2])) & own_channel(shape)


def identity(v: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Returns the kernel that multiplies channel c by v[c]: (out,) -> `shape`.

    It is placed, and not chosen by `diagonal`, so that its adjoint reads the centre tap alone.
    """
    window, channels = shape[:-2], (*(1,) * (len(shape) - 2), *shape[-2:])
    centre = jnp.where(own_channel(channels), _along_outputs(v, channels), 0)
    return place(centre, window, centre_tap(window))


def channel_average(v: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Returns the kernel that averages channel c over the window and multiplies it by v[c].

    v, (out,), becomes a kernel of `shape`; the padding counts in the mean.
    """
    return jnp.where(own_channel(shape), _along_outputs(v, shape) / math.prod(shape[:-2]), 0)


def _along_outputs(v: jax.Array, shape: Sequence[int]) -> jax.Array:
    return v.reshape((1,) * (len(shape) - 1) + (shape[-1],))


def average(w: jax.Array, window: Sequence[int]) -> jax.Array:
    """Returns the kernel of a 1x1 convolution followed by an average over `window`.

    w, (*ones, in/g, out), becomes (*window, in/g, out) with w / number of taps at every tap: the padding
    counts in the mean.
    """
    return jnp.broadcast_to(w / math.prod(window), (*window, *w.shape[-2:]))


def inject(w: jax.Array, window: Sequence[int]) -> jax.Array:
    """Returns the dense layer over a map of shape `window` that equals a convolution, padded with zeros.

    w, (*size, in/g, maps) with odd sides, becomes (*window, in/g, maps * T) for T positions of the window:
    K[q, i, s T + p] = w[q - p + size // 2, i, s], zero where w has no such tap. Output channel s T + p is
    position p of map s, in the order of the axes. Source: RepMLPNet (arXiv 2112.11081), locality injection.
    """
    axes = len(window)
    for size, n in zip(w.shape[:axes], window):
        tap, q, p = (lax.broadcasted_iota(jnp.int32, (size, n, n), axis) for axis in range(3))
        band = (tap == q - p + size // 2).astype(w.dtype)
        # The axis goes, (q, p) come last. A sum over zeros and a one: exact if products are not rounded.
        w = jnp.tensordot(w, band, ((0,), (0,)), precision=lax.Precision.HIGHEST)
    order = (*range(2, w.ndim, 2), 0, 1, *range(3, w.ndim, 2))
    return w.transpose(order).reshape(*window, w.shape[0], w.shape[1] * math.prod(window))


def after_pointwise(w: jax.Array, c: jax.Array) -> jax.Array:
    """Returns the kernel of a 1x1 convolution C followed by a convolution w: sum_m C[i, m] * w[..., m, o].

    w is (*size, mid, out), c (1 or groups, in/groups, mid), the result (*size, in/groups, out). Output
    channels are group-major.
    """
    *size, mid, out = w.shape
    by_group = w.reshape(*size, mid, c.shape[0], out // c.shape[0])
    # By default TPUs and GPUs multiply in lower precision, but this must be an exact identity.
    merged = jnp.einsum("gim,...mgo->...igo", c, by_group, precision=lax.Precision.HIGHEST)
    return merged.reshape(*size, c.shape[1], out)


def depthwise_before_pointwise(w: jax.Array, c: jax.Array, inputs: int, groups: int = 1) -> jax.Array:
    """Returns the kernel of a depthwise convolution w followed by a 1x1 convolution C.

    w is (*window, 1, in * t), with t outputs for each input channel, one channel after the other; C is
    (*ones, inputs * t, out) with inputs = in/groups. The result, (*window, inputs, out), is
    K[..., i, o] = sum_j w[..., 0, i * t + j] * C[i * t + j, o], where i counts within the group of o.
    """
    *window, _, middle = w.shape
    t, out = middle // (inputs * groups), c.shape[-1]
    merged = jnp.einsum(
        "...gij,ijgo->...igo",
        w.reshape(*window, groups, inputs, t),
        c.reshape(inputs, t, groups, out // groups),
        precision=lax.Precision.HIGHEST,
    )
    return merged.reshape(*window, inputs, out)


def frequencies(shape: Sequence[int]) -> np.ndarray:
    """Returns OREPA's table of cosines, (*window, 1, out), for a kernel of `shape`.

    The output channels are divided evenly among the spatial axes. The channels of one axis, j = 0, 1, ...,
    vary only along it: cos(pi * (h + 1/2) * (j + 1) / n) at tap h of n. In a 3x3 window it is the published
    table: the first half of the channels varies from row to row, the second from column to column.
    """
    *window, _, out = shape
    table = np.zeros((*window, 1, out))
    first = 0
    for axis, n in enumerate(window):
        last = out * (axis + 1) // len(window)
        j = np.arange(last - first)
        cosines = np.cos(np.pi * (np.arange(n)[:, None] + 0.5) * (j + 1) / n)
        along = [n if a == axis else 1 for a in range(len(window))]
        table[..., first:last] = cosines.reshape(*along, 1, last - first)
        first = last
    return table


def before_pointwise(w: jax.Array, c: jax.Array) -> jax.Array:
    """Returns the kernel of a convolution w followed by a 1x1 convolution C: sum_m w[..., m] * C[m, o].

    w is (..., mid), a kernel or a bias, c (mid, out), the result (..., out).
    """
    return jnp.matmul(w, c, precision=lax.Precision.HIGHEST)


def constant_response(kernel: jax.Array, c: jax.Array) -> jax.Array:
    """Returns a convolution's output for an input that is constant in space: the sum of K * c.

    kernel is (*spatial, in/groups, out), c (in,), the result (out,): output channel o of group g becomes
    sum_{taps, i} K[..., i, o] * c[g * in/groups + i]. The two shapes determine the number of groups. This
    moves a shift, such as that of a batch norm, from the input of a convolution to its output; at the border
    it holds if the padding continues the constant.

    Raises:
      ValueError: the channels of c are not a multiple of the kernel's inputs, or the groups do not divide the
        output channels.
    """
    *_, inputs, out = kernel.shape
    groups, left_over = divmod(c.shape[0], inputs)
    if left_over or not groups or out % groups:
        raise ValueError(
            f"a kernel of shape {kernel.shape} cannot be applied to {c.shape[0]} channels: they must be "
            f"in/groups = {inputs} times a number of groups that divides {out}"
        )
    taps = kernel.sum(axis=tuple(range(kernel.ndim - 2)))
    by_group = taps.reshape(inputs, groups, out // groups)
    return jnp.einsum(
        "igo,gi->go", by_group, c.reshape(groups, inputs), precision=lax.Precision.HIGHEST
    ).reshape(out)


def by_groups(pointwise: jax.Array, groups: int) -> jax.Array:
    """Reshapes a 1x1 kernel (*ones, in/g, mid) for `after_pointwise`: (groups, in/g, mid/groups)."""
    *_, inputs, mid = pointwise.shape
    return jnp.moveaxis(pointwise.reshape(inputs, groups, mid // groups), 1, 0)


def scale_output(w: jax.Array, s: ArrayLike) -> jax.Array:
    """Multiplies w by one factor for each output channel, the last axis: (..., out), (out,) -> (..., out)."""
    s = jnp.asarray(s)
    return w * s.reshape((1,) * (w.ndim - 1) + s.shape)


def scale_input(w: jax.Array, s: jax.Array) -> jax.Array:
    """Multiplies w by one factor for each input channel: (*spatial, in/groups, out), (in,) -> the same shape.

    The two shapes determine the number of groups, as in `constant_response`.
    """
    *_, inputs, out = w.shape
    groups = s.shape[0] // inputs
    of_output = jnp.repeat(s.reshape(groups, inputs), out // groups, axis=0).T
    return w * of_output.reshape((1,) * (w.ndim - 2) + of_output.shape)


def bn_affine(
    gamma: ArrayLike, beta: ArrayLike, mean: ArrayLike, var: ArrayLike, *, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Returns batch norm with fixed statistics as y = s * x + b: (s, b), each (channels,).

    s = gamma / sqrt(var + eps) and b = beta - mean * s, in the widest dtype of the four arrays, as Flax
    computes it: its statistics are float32 where parameters are float64.
    """
    dtype = jnp.result_type(gamma, beta, mean, var)
    gamma, beta, mean, var = (jnp.asarray(v, dtype) for v in (gamma, beta, mean, var))
    s = gamma * lax.rsqrt(var + eps)
    return s, beta - mean * s


def least_norm(forward: Callable[[Any], jax.Array], target: jax.Array, like: Any) -> Any:
    """Returns the x of least norm for which forward(x) is nearest to `target`, by conjugate gradients.

    `forward` is linear, from trees like `like` to arrays like `target`; the result has the precision of its
    dtype.

    In each step s = forward^T(target - forward(x)) is computed anew, so that it is in the range of the
    transpose, and with it x, which starts at 0: that makes its norm least. Conjugate gradients on the normal
    equations move s along instead. Of a target that is no more than rounding, such as the difference of a
    kernel from branches that merge into it already, what they collect outside of the range grows without
    bound, and forward(x) does not show it. (Bjorck, Numerical methods for least squares problems, 7.4: CGLS.)
    """
    transpose = jax.linear_transpose(forward, like)
    tolerance = float(jnp.finfo(target.dtype).eps) ** 2
    size = jnp.max(jnp.abs(target))  # squares of small numbers would vanish
    unit = target / jnp.where(size > 0, size, 1)

    def squares(tree: Any) -> jax.Array:
        return functools.reduce(jnp.add, [jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(tree)])

    def along(x: Any, step: jax.Array, direction: Any) -> Any:
        return jax.tree.map(lambda a, b: a + step * b, x, direction)

    first = transpose(unit)[0]
    enough = tolerance * squares(first), tolerance * squares(unit)

    def goes_on(state: tuple[Any, ...]) -> jax.Array:
        _, residual, _, found, count = state
        return (found > enough[0]) & (squares(residual) > enough[1]) & (count < 1000)

    def move(state: tuple[Any, ...]) -> tuple[Any, ...]:
        x, residual, direction, found, count = state
        moved = forward(direction)
        step = found / squares(moved)
        x, residual = along(x, step, direction), residual - step * moved
        s = transpose(residual)[0]
        new = squares(s)
        return x, residual, along(s, new / found, direction), new, count + 1

    start = (jax.tree.map(jnp.zeros_like, first), unit, first, squares(first), 0)
    x, *_ = lax.while_loop(goes_on, move, start)
    return jax.tree.map(lambda leaf: leaf * size, x)
