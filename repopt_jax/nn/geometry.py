"""How a layer samples its input: the convolution, padding, and the arguments of `nnx.Conv` and `nnx.Linear`.

Feature maps are (batch, *spatial, channels), kernels (*spatial, in/groups, out), with any number of spatial
axes, also none. A smaller branch samples the pixels that the centre of the kernel does, whatever the padding:
"SAME" at stride 2 pads an even side by (0, 1) and an odd one by (1, 1), where a 1x1 layer of its own pads
nothing and would sample other pixels, so branches derive their padding from the window's (`narrowed`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from repopt_jax.core import algebra
from repopt_jax.core.structure import Geometry, PadMode, Pads, per_axis
from repopt_jax.nn.convolution import conv_general_dilated, product_of_tiles

Plain: TypeAlias = nnx.Conv | nnx.Linear

# Flax's names of paddings -> those of `jnp.pad`.
FLAX_PAD_MODES: dict[str, PadMode] = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


class ChangedOperands(nnx.Module):
    """Stands in the place of a layer's function and gives it changed operands: function(f(x), g(K)).

    Fake quantization is one. A layer with it is still determined by its kernel and bias, and `fuse` keeps it.

    Attributes:
      function: what was there before, of the arguments of `jax.lax.conv_general_dilated` or `dot_general`.
      by_channel: whether g commutes with a factor, of any sign, for each output channel of the kernel, so
        that a batch norm after the layer can be folded into the kernel.
    """

    function: Callable[..., jax.Array]
    by_channel: bool


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    layer: Geometry,
    *,
    taps: Sequence[algebra.Taps] | None = None,
    precision: Any = None,
) -> jax.Array:
    """Computes the layer's cross-correlation of (batch, *spatial, in) with a kernel.

    Args:
      x: the feature map.
      kernel: (*layer.window, in/groups, out); or, with `taps`, a smaller kernel at these taps of the window,
        whose other taps cost nothing.
      layer: strides, padding, dilation, groups. Its numbers of channels are not used.
      taps: the position of the kernel in the window, for each spatial axis.
      precision: precision of the products, as in `nnx.Conv`.
    """
    if not layer.axes:
        return jnp.matmul(x, kernel, precision=precision)
    layer = layer.for_input(x.shape[1:-1])
    x, padding = padded(x, layer)
    dilation = layer.dilation
    if taps is not None:
        padding = narrowed(padding, taps, layer)
        dilation = tuple(t.step * d for t, d in zip(taps, layer.dilation))
    axes = layer.axes
    spatial = tuple(range(1, axes + 1))
    numbers = lax.ConvDimensionNumbers(
        (0, axes + 1, *spatial), (axes + 1, axes, *range(axes)), (0, axes + 1, *spatial)
    )
    return convolution_of(layer)(
        x,
        kernel,
        layer.strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=numbers,
        feature_group_count=layer.groups,
        precision=precision,
    )


def convolution_of(layer: Geometry) -> Callable[..., jax.Array]:
    """Returns the function that computes the layer's convolution, of the arguments of `jax.lax`'s."""
    return product_of_tiles if layer.tiles else conv_general_dilated


def joined(y: jax.Array, window: Sequence[int]) -> jax.Array:
    """Puts tiles together: (batch, *tiles, maps * positions) -> (batch, *spatial, maps).

    Channel s T + p of a tile is position p of map s, T positions of `window`.
    """
    axes, (batch, *tiles, channels) = len(window), y.shape
    maps = channels // math.prod(window)
    y = y.reshape(batch, *tiles, maps, *window)
    order = [n for axis in range(axes) for n in (1 + axis, 2 + axes + axis)]
    return y.transpose(0, *order, 1 + axes).reshape(batch, *(t * n for t, n in zip(tiles, window)), maps)


def padded(x: jax.Array, layer: Geometry) -> tuple[jax.Array, Pads]:
    """Pads x unless `layer.pad_mode` is "constant"; also returns the padding left for the convolution.

    The layer is that on the input (`Geometry.for_input`).
    """
    if layer.pad_mode == "constant":
        return x, layer.padding
    return jnp.pad(x, ((0, 0), *layer.padding, (0, 0)), layer.pad_mode), ((0, 0),) * layer.axes


def padded_with(x: jax.Array, border: jax.Array, layer: Geometry) -> jax.Array:
    """Pads x with the constant `border`, (channels,), by the layer's padding; negative padding crops."""
    pads = [(0, 0, 0), *((before, after, 0) for before, after in layer.padding), (0, 0, 0)]
    inside = lax.pad(jnp.ones(x.shape[1:-1], bool)[None, ..., None], False, pads)
    return jnp.where(inside, lax.pad(x, jnp.zeros((), x.dtype), pads), along_channels(border, x))


def narrowed(padding: Pads, taps: Sequence[algebra.Taps], layer: Geometry) -> Pads:
    """Returns the padding with which a smaller kernel samples the same pixels as at `taps` of the window.

    `padding` is the padding of the window.
    """
    narrow = []
    for (before, after), t, n, d in zip(padding, taps, layer.window, layer.dilation):
        beyond = n - t.start - ((t.count - 1) * t.step + 1)
        narrow.append((before - t.start * d, after - beyond * d))
    return tuple(narrow)


def one_batch_axis(x: jax.Array, axes: int) -> tuple[jax.Array, tuple[int, ...]]:
    """Reshapes x, (*batch, *spatial, in), to (n, *spatial, in); also returns the shape `batch`."""
    batch = x.shape[: x.ndim - axes - 1]
    return x.reshape(math.prod(batch), *x.shape[len(batch) :]), batch


def along_channels(v: jax.Array, y: jax.Array) -> jax.Array:
    """Reshapes and casts v, (channels,), to broadcast against y, also where rank promotion is an error."""
    return jnp.asarray(v, y.dtype).reshape((1,) * (y.ndim - 1) + v.shape)


def geometry_of(layer: Plain | nnx.ConvTranspose) -> Geometry:
    """Returns the geometry of an `nnx.Conv` or `nnx.Linear`, or of an `nnx.ConvTranspose` at stride 1.

    Raises:
      ValueError: a padding that shifts the window (`CAUSAL`), with the pairs to write instead; a transposed
        convolution at another stride; or a layer that computes otherwise than these classes, see
        `check_plain` and `check_transposed`.
    """
    if isinstance(layer, nnx.ConvTranspose):
        return _geometry_of_transposed(layer)
    check_plain(layer)
    if isinstance(layer, nnx.Linear):
        return Geometry((), layer.in_features, layer.out_features)
    return Geometry(
        layer.kernel_size,
        layer.in_features,
        layer.out_features,
        layer.feature_group_count,
        strides=layer.strides or 1,
        dilation=layer.kernel_dilation or 1,
        padding=None if pads_by_size(layer) else explicit_padding(layer),
        pad_mode="same" if pads_by_size(layer) else FLAX_PAD_MODES.get(str(layer.padding), "constant"),
    )


def _geometry_of_transposed(layer: nnx.ConvTranspose) -> Geometry:
    """Returns the geometry of the convolution that a transposed one is at stride 1.

    Nothing is put between the pixels of its input there. Flax does not reverse its taps. It pads
    r = (window - 1) * dilation zeros in front and behind ("VALID"), or ceil(r / 2) and floor(r / 2), where
    `nnx.Conv` has them the other way round ("SAME", and "CIRCULAR" in effect, whose sums over the periods of
    a wider output are the output of a wrapped input).
    """
    check_transposed(layer)
    axes = len(layer.kernel_size)
    if set(per_axis(layer.strides or 1, axes, "strides")) - {1}:
        raise ValueError(
            f"a transposed convolution with strides {layer.strides}: each of its outputs is reached by some "
            "taps of the kernel only, so that a 1x1 branch in the centre would reach some outputs alone"
        )
    dilation = per_axis(layer.kernel_dilation or 1, axes, "kernel_dilation")
    reach = [(n - 1) * d for n, d in zip(layer.kernel_size, dilation)]
    padding: Any = layer.padding
    match padding:
        case "SAME" | "CIRCULAR":
            pads = [(r - r // 2, r // 2) for r in reach]
        case "VALID":
            pads = [(r, r) for r in reach]
        case str():
            raise ValueError(f"padding {padding!r} is none that nnx.ConvTranspose can run")
        case _:
            pads = pairs_of(padding, axes)
    if padding == "CIRCULAR" and any(r % 2 for r in reach):
        raise ValueError(
            "padding 'CIRCULAR' of an even window shifts it the other way than that of nnx.Conv: use nnx.Conv"
        )
    return Geometry(
        layer.kernel_size,
        layer.in_features,
        layer.out_features,
        dilation=dilation,
        padding=pads,
        pad_mode=FLAX_PAD_MODES.get(str(padding), "constant"),
    )


def pairs_of(padding: int | Sequence[int | Sequence[int]], axes: int) -> Pads:
    """Returns a padding that Flax takes as numbers as (before, after) for each spatial axis."""
    if isinstance(padding, int):
        return ((padding, padding),) * axes
    return tuple((p, p) if isinstance(p, int) else (int(p[0]), int(p[1])) for p in padding)


def pads_by_size(layer: nnx.Conv) -> bool:
    """Returns whether the padding depends on the input's size: `SAME` at a stride above 1."""
    strides = per_axis(layer.strides or 1, len(layer.kernel_size), "strides")
    dilation = per_axis(layer.kernel_dilation or 1, len(layer.kernel_size), "kernel_dilation")
    reaches = [(n - 1) * d for n, d in zip(layer.kernel_size, dilation)]
    return layer.padding == "SAME" and any(s > 1 and r for s, r in zip(strides, reaches))


def pads_with_zeros(layer: nnx.Module) -> bool:
    """Returns whether a convolution may put zeros around its input, where a wrapped one has its own values.

    `layer` is an `nnx.Conv`, or of a class that pads nothing.
    """
    if not isinstance(layer, nnx.Conv) or str(layer.padding) in FLAX_PAD_MODES:
        return False
    return pads_by_size(layer) or layer.padding == "CAUSAL" or any(map(any, explicit_padding(layer)))


def explicit_padding(layer: nnx.Conv) -> Pads:
    """Returns the padding of a convolution as pairs, also for "CIRCULAR" and "REFLECT".

    Raises:
      ValueError: a padding that depends on the input's size (`SAME` at a stride above 1), or `CAUSAL`.
    """
    window, padding = layer.kernel_size, layer.padding
    dilation = per_axis(layer.kernel_dilation or 1, len(window), "kernel_dilation")
    reach = [(n - 1) * d for n, d in zip(window, dilation)]
    centred = tuple((r // 2, r - r // 2) for r in reach)
    if not isinstance(padding, str):
        return pairs_of(padding, len(window))
    if padding == "VALID":
        return ((0, 0),) * len(window)
    if padding in FLAX_PAD_MODES:
        return centred
    if padding == "SAME":
        if not pads_by_size(layer):
            return centred
        raise ValueError(
            f"padding 'SAME' with strides {layer.strides} depends on the input's size: it has the pairs "
            "`geometry_of(layer).for_input(size).padding`"
        )
    shifts = (
        f"padding {padding!r} shifts the window, so that its centre, where small branches are, is an earlier"
    )
    if len(window) > 1:
        raise ValueError(f"{shifts} sample; and nnx.Conv runs it along one spatial axis only")
    raise ValueError(
        f"{shifts} sample; if that is meant, give the layer explicit pairs, which compute the same: "
        f"padding={tuple((r, 0) for r in reach)}"
    )


def plain_layer(
    geometry: Geometry, kernel: jax.Array, bias: jax.Array | None, *, dtype: Any = None, precision: Any = None
) -> Plain:
    """Makes an `nnx.Conv` or, without spatial axes, an `nnx.Linear` with this geometry and these arrays.

    The arrays may have leading axes of a stack.

    Raises:
      TypeError: a padding that `nnx.Conv` cannot express (wrapped or reflected, but not by half of the
        window).
    """
    options = {"dtype": dtype, "precision": precision, "param_dtype": kernel.dtype}
    # Abstract, because drawing kernels only to replace them would take most of the time.
    made = nnx.eval_shape(lambda: _made(geometry, use_bias=bias is not None, **options))
    named = geometry.pad_mode not in ("constant", "same")
    if named and explicit_padding(made) != geometry.padding:  # pyright: ignore[reportArgumentType]
        raise TypeError(
            f"a layer with padding {geometry.padding} in mode {geometry.pad_mode!r} has no plain form: "
            f"nnx.Conv pads by {explicit_padding(made)} in that mode"  # pyright: ignore[reportArgumentType]
        )
    made.kernel.set_value(kernel)
    if made.bias is not None and bias is not None:
        made.bias.set_value(bias.astype(kernel.dtype))
    return made


def check_plain(module: nnx.Module, *, changed: bool = False) -> Plain:
    """Returns `module` if it is an `nnx.Conv` or `nnx.Linear` that is determined by its kernel and bias.

    Of an `nnx.ConvTranspose` that is `check_transposed`.

    Args:
      module: the layer.
      changed: whether its function may be a `ChangedOperands`.

    Raises:
      ValueError: it is of another class, or has a function of its own, a mask, or dilated inputs.
    """
    if not isinstance(module, (nnx.Conv, nnx.Linear)):
        raise ValueError(f"a {type(module).__name__} is neither an nnx.Conv nor an nnx.Linear")
    is_conv = isinstance(module, nnx.Conv)
    base, function = (nnx.Conv, "conv_general_dilated") if is_conv else (nnx.Linear, "dot_general")
    if type(module).__call__ is not base.__call__:
        raise ValueError(f"its class has a __call__ of its own, in place of that of nnx.{base.__name__}")
    own = getattr(module, function)
    own = own.function if changed and isinstance(own, ChangedOperands) else own
    if own not in (getattr(lax, function), conv_general_dilated, product_of_tiles):
        raise ValueError(f"it computes with a `{function}` of its own")
    if isinstance(module, nnx.Conv):
        dilation = module.input_dilation or 1
        dilated = any(d != 1 for d in ((dilation,) if isinstance(dilation, int) else dilation))
        if module.mask is not None or dilated:
            raise ValueError(
                "an nnx.Conv with `mask` or `input_dilation` can be neither re-parameterized nor fused"
            )
    return module


def check_transposed(layer: nnx.ConvTranspose) -> None:
    """Raises ValueError if a transposed convolution is not determined by its kernel, (*spatial, in, out)."""
    if type(layer).__call__ is not nnx.ConvTranspose.__call__:
        raise ValueError("its class has a __call__ of its own, in place of that of nnx.ConvTranspose")
    if layer.mask is not None:
        raise ValueError("an nnx.ConvTranspose with `mask` can be neither re-parameterized nor fused")
    if layer.transpose_kernel:
        raise ValueError(
            "its kernel has its outputs on another axis and its taps reversed (`transpose_kernel`)"
        )


def _made(geometry: Geometry, **options: Any) -> Plain:
    rngs = nnx.Rngs(0)
    if not geometry.axes:
        return nnx.Linear(geometry.inputs, geometry.outputs, rngs=rngs, **options)
    padding: Any = geometry.padding
    if geometry.pad_mode == "same":
        padding = "SAME"
    elif geometry.pad_mode != "constant":
        (padding,) = (name for name, mode in FLAX_PAD_MODES.items() if mode == geometry.pad_mode)
    return nnx.Conv(
        geometry.inputs,
        geometry.outputs,
        geometry.window,
        strides=geometry.strides,
        padding=padding,
        kernel_dilation=geometry.dilation,
        feature_group_count=geometry.groups,
        conv_general_dilated=convolution_of(geometry),
        rngs=rngs,
        **options,
    )
