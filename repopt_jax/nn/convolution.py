"""Convolutions that are also fast on a CPU: `conv_general_dilated` in place of that of `jax.lax`.

XLA's CPU backend has a fast program for the forward pass of a dense convolution. It is slow in kernel
gradients, in input gradients of strided layers, and in everything that is grouped or depthwise: on 16 maps of
32x32x64, a 3x3 depthwise layer takes 28 ms of an EPYC core and its input gradient as long (at stride 2, 99
ms), and the kernel gradient of 16 groups 2.4 s. The forms below take 0.3 to 10 ms (jax 0.10.2, float32).
`scripts/xla_cpu_convolutions.py` shows it without this library, `repopt bench conv` with it.

This module is a JAX primitive that means the same operation, and is differentiated, batched and partitioned
by the rules of the operation that it stands for. Only what it is lowered to depends on the platform: on a CPU
the forms below, chosen by shape, and everywhere else XLA's convolution, with the same text as if this module
were not there. `product_of_tiles` is another function, for layers that ask for it: on every platform a
product of matrices.
"""

import contextlib
import contextvars
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core
from jax.interpreters import ad, batching, mlir

# In the environment, so that it holds in the processes that this one starts as well.
_enabled = contextvars.ContextVar(
    "repopt_jax_convolutions", default=os.environ.get("REPOPT_XLA_CONVOLUTIONS") != "1"
)

# More terms in a sum, or more groups, make a program that takes longer to compile than is won.
MAX_TERMS = 80
MAX_GROUPS = 64
# Outputs of an image, and weights, from which residue by residue is faster than multiplying zeros.
PHASED_OUTPUTS = 1024
PHASED_WEIGHTS = 2**22
# Channels from which a layer of 1x1 is faster as a product of matrices.
MIN_CHANNELS = 32
# What the product of matrices of a dense kernel's gradient needs: channels, and pixels of the gradient. Their
# operands are made for so many bytes at a time.
MIN_KERNEL_CHANNELS = 8
MIN_POSITIONS = 128
CHUNK_BYTES = 3 * 2**20
# Input channels of a group up to which XLA's program for one group is no faster than its program for all.
NARROW = 4


def conv_general_dilated(lhs: jax.Array, rhs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated`, of the same arguments, lowered for a CPU to faster forms.

    Every transformation of JAX works as with that function: forward mode, reverse mode and their
    compositions, `jax.vmap`, `jax.checkpoint`, sharding. Inside `xla_convolutions()`, and with
    REPOPT_XLA_CONVOLUTIONS=1 in the environment, it is that function.

    Raises:
      TypeError, ValueError: as `jax.lax.conv_general_dilated`.
    """
    operation = functools.partial(lax.conv_general_dilated, **kwargs)
    if not _enabled.get():
        return operation(lhs, rhs, *args)
    equations = jax.make_jaxpr(lambda lhs, rhs: operation(lhs, rhs, *args))(lhs, rhs).eqns
    if len(equations) != 1 or equations[0].primitive is not _XLA:
        return operation(lhs, rhs, *args)
    return _conv.bind(lhs, rhs, **equations[0].params)


def product_of_tiles(lhs: jax.Array, rhs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """`conv_general_dilated` for windows that lie side by side: a product of matrices on every platform.

    Where the stride is the window and nothing is padded or dilated, each group is a dense layer of a tile of
    the map. Its gradients are then products too, for which XLA's convolutions have no fast program: of 256
    maps of 28x28 with 4 channels and a window of 28x28, to 4 x 784 outputs, they take 54 s on two CPU cores,
    these 0.03 s (jax 0.10.2, float32). Other convolutions, and all of them inside `xla_convolutions()`, are
    those of `conv_general_dilated`.

    Raises:
      TypeError, ValueError: as `jax.lax.conv_general_dilated`.
    """
    operation = functools.partial(lax.conv_general_dilated, **kwargs)
    equations = jax.make_jaxpr(lambda lhs, rhs: operation(lhs, rhs, *args))(lhs, rhs).eqns
    params = equations[0].params if equations and equations[0].primitive is _XLA else None
    if not _enabled.get() or params is None or not _has_tiles(rhs.shape, params):
        return conv_general_dilated(lhs, rhs, *args, **kwargs)
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    x, w = _channels_last(lhs, numbers.lhs_spec), _kernel_last(rhs, numbers.rhs_spec)
    *window, inputs, outputs = w.shape
    axes, x = len(window), tiled(x, window)
    x = x.reshape(*x.shape[:-1], groups, inputs)
    w = w.reshape(*window, inputs, groups, outputs // groups)
    of_x, of_w = (*range(axes + 1, 2 * axes + 1), 2 * axes + 2), tuple(range(axes + 1))
    y = lax.dot_general(
        x,
        w,
        ((of_x, of_w), ((2 * axes + 1,), (axes + 1,))),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    y = jnp.moveaxis(y, 0, -2).reshape(*x.shape[: axes + 1], outputs)
    return _from_channels_last(y, numbers.out_spec)


def tiled(x: jax.Array, window: Sequence[int]) -> jax.Array:
    """Cuts maps into tiles: (batch, *spatial, channels) -> (batch, *tiles, *window, channels).

    What is left over at the end of an axis is cut off, as by a convolution.
    """
    axes, counts = len(window), [size // n for size, n in zip(x.shape[1:], window)]
    x = x[(slice(None), *(slice(count * n) for count, n in zip(counts, window)))]
    x = x.reshape(x.shape[0], *(m for pair in zip(counts, window) for m in pair), x.shape[-1])
    return x.transpose(0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)


def _has_tiles(shape: Sequence[int], params: dict[str, Any]) -> bool:
    """Whether the windows of a kernel of this shape lie side by side."""
    window = tuple(shape[axis] for axis in params["dimension_numbers"].rhs_spec[2:])
    return (
        tuple(params["window_strides"]) == window
        and not any(map(any, params["padding"]))
        and set(params["lhs_dilation"]) | set(params["rhs_dilation"]) <= {1}
        and params["batch_group_count"] == 1
    )


@contextlib.contextmanager
def xla_convolutions() -> Iterator[None]:
    """Makes `conv_general_dilated` XLA's own on every platform, in functions that are traced inside.

    A function that was compiled before stays as it is. REPOPT_XLA_CONVOLUTIONS=1 in the environment does the
    same for the whole of a process.
    """
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)


# -- the primitive

_XLA = lax.conv_general_dilated_p
_conv = core.Primitive("repopt_convolution")


@functools.cache
def _compiled(params: tuple[tuple[str, Any], ...]) -> Callable[..., jax.Array]:
    return jax.jit(functools.partial(_conv.bind, **dict(params)))


def _by_this_primitive(rule: Callable[..., jax.Array], args: Sequence[Any], **params: Any) -> jax.Array:
    """Evaluates `rule(*args, **params)`, which uses XLA's convolutions, by this module's in their place."""
    traced = _traced(rule, tuple(map(jax.typeof, args)), tuple(sorted(params.items())))
    values = dict(zip(traced.jaxpr.constvars, traced.consts)) | dict(zip(traced.jaxpr.invars, args))

    def value(variable: Any) -> Any:
        return variable.val if isinstance(variable, core.Literal) else values[variable]

    for equation in traced.jaxpr.eqns:
        primitive = _conv if equation.primitive is _XLA else equation.primitive
        results = primitive.bind(*map(value, equation.invars), **equation.params)
        values.update(zip(equation.outvars, results if primitive.multiple_results else [results]))
    (result,) = map(value, traced.jaxpr.outvars)
    return result


# The layers of a network repeat each other, and tracing a rule takes longer than the rest of differentiating.
@functools.lru_cache(maxsize=4096)
def _traced(
    rule: Callable[..., jax.Array], avals: tuple[Any, ...], params: tuple[tuple[str, Any], ...]
) -> Any:
    return jax.make_jaxpr(functools.partial(rule, **dict(params)))(*avals)


def _cotangent_of_lhs(cotangent: Any, rhs: Any, aval: Any, **params: Any) -> Any:
    return ad.primitive_transposes[_XLA](cotangent, ad.UndefinedPrimal(aval), rhs, **params)[0]


def _cotangent_of_rhs(cotangent: Any, lhs: Any, aval: Any, **params: Any) -> Any:
    return ad.primitive_transposes[_XLA](cotangent, lhs, ad.UndefinedPrimal(aval), **params)[1]


def _mapped(lhs: Any, rhs: Any, axes: tuple[int | None, ...], **params: Any) -> Any:
    return jax.vmap(lambda lhs, rhs: _XLA.bind(lhs, rhs, **params), in_axes=axes)(lhs, rhs)


def _transpose_lhs(cotangent: Any, lhs: Any, rhs: Any, **params: Any) -> Any:
    return _by_this_primitive(_cotangent_of_lhs, (cotangent, rhs), aval=lhs.aval, **params)


def _transpose_rhs(cotangent: Any, lhs: Any, rhs: Any, **params: Any) -> Any:
    if 0 in cotangent.shape:  # of an empty batch: the rule's answer is a symbolic zero, and no operation
        return _cotangent_of_rhs(cotangent, lhs, aval=rhs.aval, **params)
    return _by_this_primitive(_cotangent_of_rhs, (cotangent, lhs), aval=rhs.aval, **params)


def _batched(args: Sequence[Any], axes: Sequence[int | None], **params: Any) -> tuple[Any, int]:
    return _by_this_primitive(_mapped, args, axes=tuple(axes), **params), 0


def _lower_for_cpu(context: Any, lhs: Any, rhs: Any, **params: Any) -> Any:
    lhs_aval, rhs_aval = context.avals_in
    form = choose(lhs_aval, rhs_aval, params, whole=_is_whole(context.module_context.axis_context))
    return mlir.lower_fun(form, multiple_results=False)(context, lhs, rhs, **params)


def _is_whole(axes: Any) -> bool:
    """Whether the shapes that are lowered are those of one device. What a compiler divides later must not be
    cut into pieces that lie on several devices."""
    if hasattr(axes, "manual_axes"):
        return axes.manual_axes == frozenset(axes.mesh.axis_names)
    return getattr(axes, "num_devices", 1) == 1


_conv.def_effectful_abstract_eval(_XLA.abstract_eval)
_conv.def_impl(lambda lhs, rhs, **params: _compiled(tuple(sorted(params.items())))(lhs, rhs))
ad.defbilinear(_conv, _transpose_lhs, _transpose_rhs)
batching.primitive_batchers[_conv] = _batched
mlir.register_lowering(_conv, mlir.lower_fun(_XLA.bind, multiple_results=False))
mlir.register_lowering(_conv, _lower_for_cpu, platform="cpu")


# -- the forms for a CPU


def choose(lhs: Any, rhs: Any, params: dict[str, Any], *, whole: bool = True) -> Callable[..., jax.Array]:
    """The form for operands of these shapes: a function of (lhs, rhs, **params), which are those of XLA's
    convolution.

    Args:
      lhs, rhs: shapes and dtypes.
      params: those of `jax.lax.conv_general_dilated_p`.
      whole: False if XLA may divide the operands over devices afterwards.
    """
    numbers = params["dimension_numbers"]
    groups, batch_groups = params["feature_group_count"], params["batch_group_count"]
    outputs = _outputs(lhs, rhs, params)
    if 0 in (*lhs.shape, *rhs.shape, outputs) or not jnp.issubdtype(lhs.dtype, jnp.floating):
        return _XLA.bind
    strided, dilated = (any(n != 1 for n in params[name]) for name in ("window_strides", "lhs_dilation"))
    window = math.prod(rhs.shape[axis] for axis in numbers.rhs_spec[2:])
    if max(groups, batch_groups) == 1:
        batch, inputs = (lhs.shape[axis] for axis in numbers.lhs_spec[:2])
        features = rhs.shape[numbers.rhs_spec[0]]
        if window == 1 and not (strided and dilated) and min(inputs, features) >= MIN_CHANNELS:
            return pointwise
        if dilated:
            large = outputs >= PHASED_OUTPUTS or math.prod(rhs.shape) >= PHASED_WEIGHTS
            return by_phases if large and window > 1 and not strided else by_xla
        # In the gradient of a kernel the channels are the batch: an axis that lies after the images.
        if not (whole and numbers.lhs_spec[0] > numbers.lhs_spec[1] and outputs <= MAX_TERMS):
            return by_xla
        enough = min(batch, features) >= MIN_KERNEL_CHANNELS and (outputs == 1 or window >= MIN_POSITIONS)
        return dense_kernel if enough else kernel_by_xla
    if groups > 1:
        inputs = rhs.shape[numbers.rhs_spec[1]]
        if inputs * window <= MAX_TERMS and not (strided and dilated):
            return by_taps
        return by_groups if inputs > NARROW and groups <= MAX_GROUPS else by_xla
    if not whole:
        return by_xla
    if lhs.shape[numbers.lhs_spec[0]] == batch_groups and not dilated and outputs <= MAX_TERMS:
        return depthwise_kernel
    return by_groups if batch_groups <= MAX_GROUPS else by_xla


def by_xla(lhs: jax.Array, rhs: jax.Array, **params: Any) -> jax.Array:
    """XLA's own convolution, of a map that is cut before it where padding is negative.

    With pads such as (-1, 1), of which the first cuts and the second does not, the program of jaxlib 0.10 for
    float32 and bfloat16 reads memory outside of the map; `docs/xla_cpu_convolutions.md` has an example.
    """
    numbers, padding = params["dimension_numbers"], []
    for axis, pads, spread in zip(numbers.lhs_spec[2:], params["padding"], params["lhs_dilation"]):
        size, cut = lhs.shape[axis], [max(-n, 0) for n in pads]
        if spread == 1 and 0 < sum(cut) < size:
            lhs = lax.slice_in_dim(lhs, cut[0], size - cut[1], axis=axis)
            pads = [max(n, 0) for n in pads]
        elif spread == 1 and sum(cut) >= size:  # nothing of the map is left
            lhs = jnp.zeros((*lhs.shape[:axis], size + sum(pads), *lhs.shape[axis + 1 :]), lhs.dtype)
            pads = (0, 0)
        padding.append(tuple(pads))
    return _XLA.bind(lhs, rhs, **{**params, "padding": tuple(padding)})


def kernel_by_xla(lhs: jax.Array, rhs: jax.Array, **params: Any) -> jax.Array:
    """XLA's own convolution for the gradient of a dense kernel, whose operands are computed before it.

    XLA transposes both for it, and fuses the transposition with what they were computed with. In a network
    with identities beside its layers that is everything back to the first of these, anew in each layer: the
    step would grow with the square of the depth.
    """
    return by_xla(*_computed(lhs, rhs), **params)


def _computed(*operands: jax.Array) -> tuple[jax.Array, ...]:
    """The operands as arrays in memory, with whose computation XLA does not fuse what follows.

    A call that is not inlined keeps them apart. `lax.optimization_barrier` alone does not: on a CPU it is
    expanded before loops are fused.
    """
    with set_xla_metadata(inlineable="false"):
        return _as_they_are(*operands)


@jax.jit
def _as_they_are(*operands: jax.Array) -> tuple[jax.Array, ...]:
    return lax.optimization_barrier(operands)  # of operands that are returned as they are, JAX drops the call


def by_groups(lhs: jax.Array, rhs: jax.Array, **params: Any) -> jax.Array:
    """A dense convolution for each group, for which XLA has a fast program."""
    numbers = params["dimension_numbers"]
    of_batch = params["batch_group_count"] > 1
    groups = params["batch_group_count"] if of_batch else params["feature_group_count"]
    dense = {**params, "feature_group_count": 1, "batch_group_count": 1}
    parts = zip(
        jnp.split(lhs, groups, numbers.lhs_spec[0 if of_batch else 1]),
        jnp.split(rhs, groups, numbers.rhs_spec[0]),
        strict=True,
    )
    products = [choose(x, w, dense, whole=of_batch)(x, w, **dense) for x, w in parts]
    return jnp.concatenate(products, numbers.out_spec[1])


def pointwise(lhs: jax.Array, rhs: jax.Array, **params: Any) -> jax.Array:
    """A window of one: a product of matrices, of the pixels that are sampled."""
    numbers = params["dimension_numbers"]
    x, w = _channels_last(lhs, numbers.lhs_spec), _kernel_last(rhs, numbers.rhs_spec)
    pads = [(*pair, spread - 1) for pair, spread in zip(params["padding"], params["lhs_dilation"])]
    strides = params["window_strides"]
    if all(spread == 1 for spread in params["lhs_dilation"]):
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
        x = lax.slice(x, (0,) * x.ndim, x.shape, (1, *strides, 1))
    y = lax.dot_general(
        x,
        w.reshape(w.shape[-2:]),
        (((x.ndim - 1,), (0,)), ((), ())),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    if any(spread != 1 for spread in params["lhs_dilation"]):
        y = lax.pad(y, jnp.zeros((), y.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    return _from_channels_last(y, numbers.out_spec)


def dense_kernel(lhs: jax.Array, rhs: jax.Array, **params: Any) -> jax.Array:
    """The gradient of a dense kernel: a product of matrices whose rows are pixels.

        k[t, c, f] = sum over n, o of x[n, t s + o d - before, c] g[n, o, f]

    x is `lhs`, whose batch is the channels and whose features are the images; g is `rhs`. The columns are the
    shifts of x by each tap; where the first axis is neither strided nor dilated, its taps shift g in place of
    x, which makes the product square and its operands small. They are made for a few images at a time, as
    many as a cache holds.
    """
    numbers = params["dimension_numbers"]
    x, g = _maps_of_kernel(lhs, rhs, numbers)
    dtype, wide, zero = lhs.dtype, _wide(lhs.dtype), jnp.zeros((), lhs.dtype)
    strides, dilation = params["window_strides"], params["rhs_dilation"]
    _, *sizes, outputs = g.shape
    channels, axes = x.shape[-1], len(sizes)
    counts = [p.size for p in _plans(x.shape[1:-1], sizes, params)]
    of_g = counts[0] if axes > 1 and strides[0] == dilation[0] == 1 else 1
    of_x = [1, *counts[1:]] if of_g > 1 else counts
    reach = [(n - 1) * d + 1 for n, d in zip(sizes, dilation)]
    if of_g > 1:
        reach[0] += of_g - 1

    def product(x: jax.Array, g: jax.Array) -> jax.Array:
        x = lax.pad(x, zero, [(0, 0, 0), *((*pair, 0) for pair in params["padding"]), (0, 0, 0)])
        g = lax.pad(g, zero, [(0, 0, 0), (of_g - 1, of_g - 1, 0), *[(0, 0, 0)] * axes])
        # Fused with what follows, the padding would be computed for every shift.
        x, g = lax.optimization_barrier((x, g))
        columns = []
        for tap in itertools.product(*map(range, of_x)):
            starts = [t * s for t, s in zip(tap, strides)]
            limits = [start + r for start, r in zip(starts, reach)]
            columns.append(lax.slice(x, (0, *starts, 0), (x.shape[0], *limits, channels), (1, *dilation, 1)))
        shifts = [lax.slice_in_dim(g, t, t + sizes[0] + of_g - 1, axis=1) for t in reversed(range(of_g))]
        a, b = (
            jnp.concatenate(parts, -1).reshape(-1, parts[0].shape[-1] * len(parts))
            for parts in (columns, shifts)
        )
        return lax.dot_general(
            a, b, (((0,), (0,)), ((), ())), precision=params["precision"], preferred_element_type=wide
        )

    rows = (sizes[0] + of_g - 1) * math.prod(sizes[1:])
    of_image = rows * (math.prod(of_x) * channels + of_g * outputs)
    total = _over_images(product, x, g, CHUNK_BYTES // (of_image * dtype.itemsize))
    k = total.reshape(*of_x, channels, of_g, outputs)
    k = jnp.moveaxis(k, -2, 0).reshape(of_g * of_x[0], *of_x[1:], channels, outputs)
    k = jnp.moveaxis(k, -2, 0).astype(params["preferred_element_type"] or dtype)
    return _from_channels_last(k, numbers.out_spec)


def _over_images(function: Callable[..., jax.Array], x: jax.Array, g: jax.Array, at_once: int) -> jax.Array:
    """The sum of `function` over chunks of about `at_once` images of both, by a loop."""
    images = x.shape[0]
    size = images // math.ceil(images / max(at_once, 1))
    divisors = [n for n in range(size // 2 + 1, size + 1) if images % n == 0]
    size = divisors[-1] if divisors else size  # what is left over would be compiled once more
    count, rest = divmod(images, size)
    if count == 1:
        total = function(x[:size], g[:size])
    else:

        def more(i: jax.Array, total: jax.Array) -> jax.Array:
            return total + function(*(lax.dynamic_slice_in_dim(a, i * size, size) for a in (x, g)))

        nothing = function(x[:0], g[:0])  # zeros, of the type that the sum has in a `shard_map`
        total = lax.fori_loop(0, count, more, nothing)
    return total + function(x[-rest:], g[-rest:]) if rest else total


def by_phases(lhs: jax.Array, rhs: jax.Array, **params: Any) -> jax.Array:
    """A convolution of a dilated map, as the input gradient of a strided one is: a convolution of the map
    as it is for each residue of the outputs by the dilation, in place of one that multiplies its zeros."""
    numbers = params["dimension_numbers"]
    spatial, window = numbers.lhs_spec[2:], numbers.rhs_spec[2:]
    plans = _plans([lhs.shape[a] for a in spatial], [rhs.shape[a] for a in window], params)
    channels_last = (0, len(plans) + 1, *range(1, len(plans) + 1))
    part = {
        **params,
        "dimension_numbers": numbers._replace(out_spec=channels_last),
        "lhs_dilation": (1,) * len(plans),
    }
    outputs = rhs.shape[numbers.rhs_spec[0]]

    def phase(residues: tuple[int, ...]) -> jax.Array:
        taps = [plan.taps[r] for plan, r in zip(plans, residues)]
        if not all(taps):
            dtype = params["preferred_element_type"] or lhs.dtype
            return jnp.zeros((lhs.shape[numbers.lhs_spec[0]], *(p.count for p in plans), outputs), dtype)
        w, dilation, padding = rhs, [], []
        for plan, pairs, axis, map_axis in zip(plans, taps, window, spatial):
            (first, start), (last, end) = pairs[0], pairs[-1]
            step = (last - first) // max(len(pairs) - 1, 1) or 1
            w = lax.slice_in_dim(w, first, last + 1, step, axis)
            dilation.append((end - start) // max(len(pairs) - 1, 1) or 1)
            padding.append((-start, end + plan.count - lhs.shape[map_axis]))
        return by_xla(lhs, w, **{**part, "rhs_dilation": tuple(dilation), "padding": tuple(padding)})

    phases = [phase(residues) for residues in itertools.product(*(range(len(p.taps)) for p in plans))]
    return _from_channels_last(_interleaved(phases, plans), numbers.out_spec)


def by_taps(lhs: jax.Array, rhs: jax.Array, **params: Any) -> jax.Array:
    """Few input channels a group, one of a depthwise convolution: the sum over taps and these channels of
    shifted maps times weights, which XLA makes one loop without products of matrices.

        y[n, o, f] = sum over t, i of x[n, o s + t d - before, g c + i] w[t, i, f],  g the group of f, c
        channels each

    Where x is dilated (the gradient of a strided convolution), each residue of o has its own taps, and its
    own sum."""
    numbers = params["dimension_numbers"]
    x, w = _channels_last(lhs, numbers.lhs_spec), _kernel_last(rhs, numbers.rhs_spec)
    dtype, wide = lhs.dtype, _wide(lhs.dtype)
    axes, (inputs, outputs) = x.ndim - 2, w.shape[-2:]
    plans = _plans(x.shape[1:-1], w.shape[:-2], params)
    x = lax.pad(x, jnp.zeros((), dtype), [(0, 0, 0), *((p.before, p.after, 0) for p in plans), (0, 0, 0)])
    of_each_output = [
        jnp.repeat(x[..., i::inputs], outputs // params["feature_group_count"], axis=-1)
        for i in range(inputs)
    ]

    def phase(residues: tuple[int, ...]) -> jax.Array:
        total = jnp.zeros((x.shape[0], *(p.count for p in plans), outputs), wide)
        for taps in itertools.product(*(p.taps[r] for p, r in zip(plans, residues))):
            starts = [p.before + offset for p, (_, offset) in zip(plans, taps)]
            limits = [start + (p.count - 1) * p.step + 1 for p, start in zip(plans, starts)]
            cut = [slice(start, limit, p.step) for p, start, limit in zip(plans, starts, limits)]
            for i, of_output in enumerate(of_each_output):
                weights = w[(*(t for t, _ in taps), i)].astype(wide)
                weights = lax.broadcast_in_dim(weights, total.shape, (axes + 1,))
                total = total + of_output[(slice(None), *cut)].astype(wide) * weights
        return total

    phases = [phase(residues) for residues in itertools.product(*(range(len(p.taps)) for p in plans))]
    y = _interleaved(phases, plans).astype(params["preferred_element_type"] or dtype)
    return _from_channels_last(y, numbers.out_spec)


def depthwise_kernel(lhs: jax.Array, rhs: jax.Array, **params: Any) -> jax.Array:
    """The gradient of a depthwise kernel: one reduction of all the taps' products.

        k[t, f] = sum over n, o of x[n, t s + o d - before, f // m] g[n, o, f]

    x is `lhs`, whose batch is the channels and whose features are the images; g is `rhs`.
    """
    numbers = params["dimension_numbers"]
    x, g = _maps_of_kernel(lhs, rhs, numbers)
    dtype, wide = lhs.dtype, _wide(lhs.dtype)
    repeats = g.shape[-1] // x.shape[-1]
    if repeats > 1:
        x = jnp.repeat(x, repeats, axis=-1)
    axes, dilation = x.ndim - 2, params["rhs_dilation"]
    counts = [p.size for p in _plans(x.shape[1:-1], g.shape[1:-1], params)]
    reach = [(n - 1) * d + 1 for n, d in zip(g.shape[1:-1], dilation)]
    # Zeros that XLA does not know before g is there: otherwise the map is padded on the way forward, as it is
    # for the layer itself, and kept until now, up to four times the map. jax 0.10 drops an
    # `optimization_barrier` too early.
    zero = (g[(0,) * g.ndim] > jnp.inf).astype(dtype)
    x = lax.pad(x, zero, [(0, 0, 0), *((*p, 0) for p in params["padding"]), (0, 0, 0)])
    products = []
    for tap in itertools.product(*map(range, counts)):
        starts = [t * s for t, s in zip(tap, params["window_strides"])]
        limits = [start + r for start, r in zip(starts, reach)]
        shifted = lax.slice(x, (0, *starts, 0), (x.shape[0], *limits, x.shape[-1]), (1, *dilation, 1))
        products.append(shifted.astype(wide) * g.astype(wide))
    zeros = [jnp.zeros((), wide)] * len(products)
    sums = lax.reduce(products, zeros, lambda a, b: [p + q for p, q in zip(a, b)], range(axes + 1))
    k = jnp.stack(sums).reshape(1, *counts, g.shape[-1]).astype(params["preferred_element_type"] or dtype)
    return _from_channels_last(k, numbers.out_spec)


class _Plan(NamedTuple):
    """Where the outputs of one axis lie on the map: output j of residue r takes, for each (tap, offset) of
    `taps[r]`, the input at `offset` + j `step`, of a map that has `before` and `after` zeros at its
    ends."""

    taps: list[list[tuple[int, int]]]
    step: int
    count: int  # outputs of a residue
    size: int  # outputs of the axis
    before: int
    after: int


def _plans(sizes: Sequence[int], window: Sequence[int], params: dict[str, Any]) -> list[_Plan]:
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    return [_plan(*numbers) for numbers in zip(sizes, window, *(params[name] for name in names))]


def _plan(size: int, taps: int, stride: int, padding: tuple[int, int], spread: int, dilation: int) -> _Plan:
    before, after = padding
    outputs = ((size - 1) * spread + 1 + before + after - (taps - 1) * dilation - 1) // stride + 1
    count = -(-outputs // spread)
    by_residue = [
        [(t, q // spread) for t in range(taps) if (q := r + t * dilation - before) % spread == 0]
        for r in range(spread)
    ]
    offsets = [offset for pairs in by_residue for _, offset in pairs] or [0]
    last = max(offsets) + (count - 1) * stride
    return _Plan(by_residue, stride, count, outputs, max(0, -min(offsets)), max(0, last - size + 1))


def _outputs(lhs: Any, rhs: Any, params: dict[str, Any]) -> int:
    """Number of outputs of one image and channel."""
    numbers = params["dimension_numbers"]
    sizes = [lhs.shape[axis] for axis in numbers.lhs_spec[2:]]
    return math.prod(
        max(p.size, 0) for p in _plans(sizes, [rhs.shape[a] for a in numbers.rhs_spec[2:]], params)
    )


def _interleaved(phases: list[jax.Array], plans: list[_Plan]) -> jax.Array:
    """One map of the phases, which are in the order of their residues; the last may be longer than the
    map."""
    if len(phases) == 1:
        return phases[0]
    axes = len(plans)
    (n, *counts, channels), spreads = phases[0].shape, [len(p.taps) for p in plans]
    y = jnp.stack(phases).reshape(*spreads, n, *counts, channels)
    order = [axes, *itertools.chain(*((axes + 1 + i, i) for i in range(axes))), 2 * axes + 1]
    y = y.transpose(order).reshape(n, *(c * s for c, s in zip(counts, spreads)), channels)
    return y[(slice(None), *(slice(p.size) for p in plans))]


def _wide(dtype: Any) -> Any:
    """What products are summed in."""
    return jnp.promote_types(dtype, jnp.float32)


def _channels_last(x: jax.Array, spec: Sequence[int]) -> jax.Array:
    batch, feature, *spatial = spec
    return x.transpose(batch, *spatial, feature)


def _kernel_last(w: jax.Array, spec: Sequence[int]) -> jax.Array:
    out, inputs, *spatial = spec
    return w.transpose(*spatial, inputs, out)


def _maps_of_kernel(lhs: jax.Array, rhs: jax.Array, numbers: Any) -> tuple[jax.Array, jax.Array]:
    """The operands of the gradient of a kernel, channels last: a map, whose batch is the channels and whose
    features are the images, and the gradient of the outputs."""
    batch, feature, *spatial = numbers.lhs_spec
    out, inputs, *window = numbers.rhs_spec
    return _channels_last(lhs, (feature, batch, *spatial)), _channels_last(rhs, (inputs, out, *window))


def _from_channels_last(y: jax.Array, spec: Sequence[int]) -> jax.Array:
    batch, feature, *spatial = spec
    return y.transpose([int(i) for i in np.argsort([batch, *spatial, feature])])
