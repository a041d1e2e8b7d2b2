"""The search layer: a convolution whose kernel is a constant-scale linear addition (CSLA) of branches.

    y = conv(x, K),  K = sum_b s_b * E_b(w_b)

The branches are linear and the batch norm comes after their sum, so merging them in weight space and running
one convolution gives the function, and the gradients, of running every branch: at about the time and the
activation memory of a plain layer. The branch-by-branch form is there for parity and as an oracle for tests.
Source: RepOptimizer paper (ICLR 2023), section 3.1; the published code runs every branch.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax

from repopt_jax.core import algebra, paths
from repopt_jax.core.branches import AfterPointwise, Average, Branch, BranchSet, Identity, Kernel

Pads = tuple[tuple[int, int], ...]
Form = Literal["merged", "branches"]
FORMS: tuple[str, ...] = get_args(Form)
PadMode = Literal["constant", "wrap", "reflect"]
PAD_MODES: tuple[str, ...] = get_args(PadMode)


class FrozenScale(nnx.Variable):
    """A scale that is not trained: a CSLA network whose constants are fixed."""


class Windowed(Protocol):
    """A layer whose branches share one window: what `run_branch` reads of it."""

    @property
    def branches(self) -> BranchSet: ...
    @property
    def strides(self) -> tuple[int, ...]: ...
    @property
    def padding(self) -> Pads: ...
    @property
    def pad_mode(self) -> PadMode: ...
    @property
    def dilation(self) -> tuple[int, ...]: ...
    @property
    def precision(self) -> Any: ...


class Branched(nnx.Module):
    """A layer made of branches, with the attributes that networks read of `nnx.Conv` and `nnx.Linear`."""

    branches: BranchSet

    @property
    def in_features(self) -> int:
        return self.branches.canonical[-2] * self.branches.groups

    @property
    def out_features(self) -> int:
        return self.branches.out

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return self.branches.canonical[:-2]


class CSLAConv(Branched):
    """A convolution (or, without spatial axes, a dense layer) made of scaled branches.

    Several equal layers are stacked in one `CSLAConv` as in any other module: by building it under
    `nnx.vmap`, or with `stack`, which gives every array these leading axes. It is run under `nnx.scan` or
    `nnx.vmap`, which hand `__call__` the arrays of one layer. `branches` is that one layer's;
    `stacked_branches` is of the arrays as they are.

    Attributes:
      branches: the branch set of one layer.
      weights: branch name -> w_b, trainable. Of the identity: u.
      scales: branch name -> s_b, (out,): `nnx.Param` if they are searched, else `FrozenScale`. The identity
        has none.

    Args:
      branches: the branch set of one layer; its kernel shape and groups are the layer's.
      strides: one number for all spatial axes or one each.
      padding: pairs for each spatial axis. Explicit, because `SAME` at stride 2 samples other pixels than
        PyTorch.
      pad_mode: what stands in the padding: "constant", zeros; "wrap", the other end of the input (circular
        convolution, `padding="CIRCULAR"` of `nnx.Conv`); "reflect", its mirror image (`"REFLECT"`).
      dilation: of the whole window.
      stack: leading axes of all arrays, for that many equal layers, each with draws of its own.
      scales: branch name -> initial s_b, (*stack, out), of the identity the initial u; ones where absent.
      trainable_scales: whether the scales are searched.
      form: "merged", one convolution with K; "branches", one convolution a branch.
      bias: an initial bias (*stack, out), or None.
      dtype: computation dtype; by default that of inputs and parameters.
      precision: of the products, as in `nnx.Conv`.
      param_dtype: of weights and scales.
      rngs: source of the branch weights' draws (stream `params`).

    Raises:
      ValueError: a branch set in another layout than "...io" or of stacked layers, an unknown form or
        `pad_mode`, padding that does not fit, or scales or a bias of another shape or of a branch that the
        set lacks.
    """

    def __init__(
        self,
        branches: BranchSet,
        *,
        strides: int | Sequence[int] = 1,
        padding: Pads = (),
        pad_mode: PadMode = "constant",
        dilation: int | Sequence[int] = 1,
        stack: tuple[int, ...] = (),
        scales: Mapping[str, jax.Array] | None = None,
        trainable_scales: bool = True,
        form: Form = "merged",
        bias: jax.Array | None = None,
        dtype: Any = None,
        precision: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if branches.layout != "...io":
            raise ValueError(f"`branches` has layout {branches.layout!r}: a Flax layer needs '...io'")
        if branches.stacked:
            raise ValueError(
                f"`branches` is of layers stacked along {branches.stack}: give `branches.layer` and `stack`"
            )
        if form not in FORMS:
            raise ValueError(f"`form` is {form!r}: it must be one of {', '.join(FORMS)}")
        axes = len(branches.kernel) - 2
        self.branches = branches
        self.strides = per_axis(strides, axes)
        self.dilation = per_axis(dilation, axes)
        self.padding = tuple((int(lo), int(hi)) for lo, hi in padding)
        if len(self.padding) != axes:
            raise ValueError(f"`padding` is {padding}: it needs a pair for each of the {axes} spatial axes")
        check_pad_mode(pad_mode, self.padding)
        self.pad_mode: PadMode = pad_mode
        self.form = form
        self.dtype, self.precision = dtype, precision
        several = stacked_along(branches, stack)
        given = dict(scales or {})
        _check_vectors(several, given, bias)
        ones = jnp.ones(several.vector_shape, param_dtype)
        weights = several.sample(rngs.params(), dtype=param_dtype)
        weights |= {b.name: given.get(b.name, ones) for b in branches.branches if not b.has_scale}
        variable = nnx.Param if trainable_scales else FrozenScale
        self.weights = nnx.Dict({name: nnx.Param(jnp.asarray(w, param_dtype)) for name, w in weights.items()})
        self.scales = nnx.Dict(
            {
                b.name: variable(jnp.asarray(given.get(b.name, ones), param_dtype))
                for b in branches.branches
                if b.has_scale
            }
        )
        self.bias = nnx.data(None if bias is None else nnx.Param(jnp.asarray(bias, param_dtype)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(*batch, *spatial, in) -> (*batch, *spatial', out), any number of batch axes, none too.

        Raises:
          ValueError: the arrays are those of stacked layers.
        """
        if stack := self.stacked_branches().stack:
            raise ValueError(
                f"this layer holds layers stacked along {stack}: run it under `nnx.scan` or `nnx.vmap`, "
                "which give it the arrays of one"
            )
        weights, scales = self._values()
        x, batch = one_batch_axis(x, len(self.padding))
        if self.form == "merged":
            y = self._convolve(x, self.branches.merge(weights, scales))
        else:
            y = self._run_branches(x, weights, scales)
        y = y.reshape(*batch, *y.shape[1:])
        return y if self.bias is None else y + along_channels(self.bias[...], y)

    def stacked_branches(self) -> BranchSet:
        """The branch set of the arrays as they are, the axes of a stack in front: what scales files and
        optimizers need. It equals `branches` where nothing is stacked.

        Raises:
          ValueError: the arrays do not have the shapes of one branch set (a stack along another axis than the
            leading ones, say); all are listed.
        """
        found = {f"weights/{name}": tuple(w.shape) for name, w in self.weights.items()}
        found |= {f"scales/{name}": tuple(s.shape) for name, s in self.scales.items()}
        name, shape = next(iter(self.branches.shapes().items()))
        tensor = found[f"weights/{name}"]
        several = stacked_along(self.branches, tensor[: max(len(tensor) - len(shape), 0)])
        expected = {f"weights/{name}": shape for name, shape in several.shapes().items()}
        expected |= {f"scales/{name}": several.vector_shape for name in self.scales}
        if difference := paths.describe_difference(expected, found, noun="arrays"):
            raise ValueError(
                f"the arrays of this layer do not fit its branches: {difference}. Layers are stacked along "
                "leading axes, all arrays alike; where `nnx.StateAxes` names types, constant scales are "
                "`nn.FrozenScale`"
            )
        return several

    def merged_kernel(self) -> jax.Array:
        """K, of the shape of a plain layer's kernel; of stacked layers (*stack, *spatial, in/groups, out)."""
        return self.stacked_branches().merge(*self._values())

    def scale_vectors(self) -> dict[str, jax.Array]:
        """What a search finds: s_b of every scaled branch, u of the identity; (*stack, out) each."""
        return {
            b.name: (self.scales if b.has_scale else self.weights)[b.name][...]
            for b in self.branches.branches
        }

    def _values(self) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """The arrays of `weights` and `scales`."""
        return (
            {name: w[...] for name, w in self.weights.items()},
            {name: s[...] for name, s in self.scales.items()},
        )

    def _convolve(self, x, kernel):
        x, kernel = promote_dtype((x, kernel), dtype=self.dtype)
        x, padding = padded(x, self)
        return convolve(
            x,
            kernel,
            strides=self.strides,
            padding=padding,
            dilation=self.dilation,
            groups=self.branches.groups,
            precision=self.precision,
        )

    def _run_branches(self, x, weights, scales):
        outputs = []
        for b in self.branches.branches:
            xb, w = promote_dtype((x, weights[b.name]), dtype=self.dtype)
            y = run_branch(b, xb, w, self)
            outputs.append(y * along_channels(scales[b.name], y) if b.has_scale else y)
        return sum(outputs[1:], start=outputs[0])


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: Sequence[int],
    padding: Pads,
    dilation: Sequence[int],
    groups: int,
    precision: Any = None,
) -> jax.Array:
    """Cross-correlation of (batch, *spatial, in) with (*spatial, in/groups, out), any number of spatial axes,
    none too."""
    axes = kernel.ndim - 2
    if not axes:
        return jnp.matmul(x, kernel, precision=precision)
    spatial = tuple(range(1, axes + 1))
    numbers = lax.ConvDimensionNumbers(
        (0, axes + 1, *spatial), (axes + 1, axes, *range(axes)), (0, axes + 1, *spatial)
    )
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=numbers,
        feature_group_count=groups,
        precision=precision,
    )


def one_batch_axis(x: jax.Array, axes: int) -> tuple[jax.Array, tuple[int, ...]]:
    """x, (*batch, *spatial, in) with `axes` spatial axes, as (n, *spatial, in); and the batch axes it had."""
    batch = x.shape[: x.ndim - axes - 1]
    return x.reshape(math.prod(batch), *x.shape[len(batch) :]), batch


def padded(x: jax.Array, layer: Windowed) -> tuple[jax.Array, Pads]:
    """x, (batch, *spatial, in), with what `pad_mode` puts at its borders, and the zeros that remain for the
    convolution to add: `layer.padding` or none."""
    if layer.pad_mode == "constant":
        return x, layer.padding
    return jnp.pad(x, ((0, 0), *layer.padding, (0, 0)), layer.pad_mode), ((0, 0),) * len(layer.padding)


@functools.singledispatch
def run_branch(branch: Branch, x: jax.Array, w: jax.Array, layer: Windowed) -> jax.Array:
    """What one branch's own layer gives for x, before its scale: each branch type says how.

    An implementation takes its input and its zero padding from `padded(x, layer)`.
    """
    raise TypeError(f"no branch-by-branch form is registered for {type(branch).__name__}: use form='merged'")


@run_branch.register
def _(branch: Kernel, x, w, layer):
    taps = branch.taps(layer.branches.kernel)
    x, padding = padded(x, layer)
    return convolve(
        x,
        w,
        strides=layer.strides,
        padding=_narrowed(padding, taps, layer),
        dilation=[t.step * d for t, d in zip(taps, layer.dilation)],
        groups=layer.branches.groups,
        precision=layer.precision,
    )


@run_branch.register
def _(branch: Identity, x, w, layer):
    x, padding = padded(x, layer)
    padding = _narrowed(padding, algebra.centre_tap(layer.branches.kernel[:-2]), layer)
    spatial = [(lo, hi, 0) for lo, hi in padding]
    y = lax.pad(algebra.scale_output(x, w), jnp.zeros((), x.dtype), [(0, 0, 0), *spatial, (0, 0, 0)])
    return y[(slice(None), *(slice(None, None, s) for s in layer.strides))]


@run_branch.register
def _(branch: Average, x, w, layer):
    y, padding = padded(_pointwise(x, w, layer), layer)
    window = layer.branches.kernel[:-2]
    total = lax.reduce_window(
        y,
        np.zeros((), y.dtype),  # a constant also under jit, without which JAX has no gradient for this
        lax.add,
        (1, *window, 1),
        (1, *layer.strides, 1),
        ((0, 0), *padding, (0, 0)),
        window_dilation=(1, *layer.dilation, 1),
    )
    return total / math.prod(window)


@run_branch.register
def _(branch: AfterPointwise, x, w, layer):
    groups = layer.branches.groups
    c = branch.pointwise(w.dtype)
    c = jnp.broadcast_to(c, (groups, *c.shape[1:]))
    c = jnp.moveaxis(c, 0, 1).reshape((1,) * len(layer.padding) + (c.shape[1], groups * c.shape[2]))
    y, padding = padded(_pointwise(x, c, layer), layer)
    taps = algebra.centred_taps(branch.size, layer.branches.kernel[:-2], (1,) * len(branch.size))
    return convolve(
        y,
        w,
        strides=layer.strides,
        padding=_narrowed(padding, taps, layer),
        dilation=layer.dilation,
        groups=groups,
        precision=layer.precision,
    )


def _pointwise(x: jax.Array, w: jax.Array, layer: Windowed) -> jax.Array:
    """A 1x1 convolution in the layer's groups. It commutes with every kind of padding, so it goes first, on
    the smaller map."""
    axes = len(layer.padding)
    ones, none = (1,) * axes, ((0, 0),) * axes
    return convolve(
        x,
        w,
        strides=ones,
        padding=none,
        dilation=ones,
        groups=layer.branches.groups,
        precision=layer.precision,
    )


def along_channels(v: jax.Array, y: jax.Array) -> jax.Array:
    """v, (channels,), with the rank and dtype of y, so that it also multiplies where rank promotion is an
    error."""
    return jnp.asarray(v, y.dtype).reshape((1,) * (y.ndim - 1) + v.shape)


def plain_convolution(layer: nnx.Conv) -> None:
    """Raises TypeError for options of `nnx.Conv` that no other layer here has: a mask, or dilated inputs."""
    dilation = layer.input_dilation or 1
    dilated = any(d != 1 for d in ((dilation,) if isinstance(dilation, int) else dilation))
    if layer.mask is not None or dilated:
        raise TypeError(
            "an nnx.Conv with `mask` or `input_dilation` can be neither re-parameterized nor fused"
        )


def per_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """One number for each spatial axis, from one number or a sequence of the right length (ValueError
    otherwise)."""
    values = (value,) * axes if isinstance(value, int) else tuple(int(v) for v in value)
    if len(values) != axes:
        raise ValueError(f"{value} must be one number or {axes}, one for each spatial axis")
    return values


def stacked_along(branches: BranchSet, stack: Sequence[int]) -> BranchSet:
    """The set of as many layers like `branches`, a single layer's, as `stack` has places."""
    stack = tuple(stack)
    return dataclasses.replace(branches, kernel=(*stack, *branches.kernel), stacked=len(stack))


def check_pad_mode(pad_mode: str, padding: Pads) -> None:
    """Raises ValueError for an unknown `pad_mode`, or one that cannot go with this padding."""
    if pad_mode not in PAD_MODES:
        raise ValueError(f"`pad_mode` is {pad_mode!r}: it must be one of {', '.join(PAD_MODES)}")
    if pad_mode != "constant" and any(n < 0 for pair in padding for n in pair):
        raise ValueError(
            f"`padding` is {padding}: with `pad_mode` {pad_mode!r} nothing can be cut off (n >= 0)"
        )


def _check_vectors(branches: BranchSet, scales: Mapping[str, jax.Array], bias: jax.Array | None) -> None:
    """A vector of another shape would be broadcast, or fail in a convolution far from here."""
    expected = dict.fromkeys(branches.names, branches.vector_shape) | {"bias": branches.vector_shape}
    found = {name: tuple(jnp.shape(s)) for name, s in scales.items()}
    found |= {} if bias is None else {"bias": tuple(jnp.shape(bias))}
    expected = {name: shape for name, shape in expected.items() if name in found}
    if difference := paths.describe_difference(expected, found, noun="vectors"):
        raise ValueError(f"`scales` or `bias` do not fit the layer: {difference}")


def _narrowed(padding: Pads, taps: Sequence[algebra.Taps], layer: Windowed) -> Pads:
    """Padding with which a smaller kernel at `taps` samples the pixels that it samples inside the layer's
    window, which has `padding`."""
    narrow = []
    for (lo, hi), t, n, d in zip(padding, taps, layer.branches.kernel, layer.dilation):
        after = n - t.start - ((t.count - 1) * t.step + 1)
        narrow.append((lo - t.start * d, hi - after * d))
    return tuple(narrow)
