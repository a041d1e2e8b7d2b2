"""The search layer: a convolution whose kernel is a constant-scale linear addition (CSLA) of branches.

    y = conv(x, K),  K = sum_b s_b * E_b(w_b)

The branches are linear and the batch norm comes after their sum, so merging them in weight space and running
one convolution gives the function, and the gradients, of running every branch: at about the time and the
activation memory of a plain layer. The branch-by-branch form is there for parity and as an oracle for tests.
Source: RepOptimizer paper (ICLR 2023), section 3.1; the published code runs every branch.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax

from repopt_jax import algebra
from repopt_jax.branches import AfterPointwise, Average, Branch, BranchSet, Identity, Kernel

Pads = tuple[tuple[int, int], ...]
Form = Literal["merged", "branches"]
FORMS: tuple[str, ...] = get_args(Form)


class FrozenScale(nnx.Variable):
    """A scale that is not trained: a CSLA network whose constants are fixed."""


class CSLAConv(nnx.Module):
    """A convolution (or, without spatial axes, a dense layer) made of scaled branches.

    Attributes:
      weights: branch name -> w_b, trainable. Of the identity: u.
      scales: branch name -> s_b, (out,): `nnx.Param` if they are searched, else `FrozenScale`. The identity
        has none.

    Args:
      branches: the branch set; its kernel shape and groups are the layer's.
      strides: one number for all spatial axes or one each.
      padding: pairs for each spatial axis. Explicit, because `SAME` at stride 2 samples other pixels than
        PyTorch.
      dilation: of the whole window.
      scales: branch name -> initial s_b, (out,), of the identity the initial u; ones where absent.
      trainable_scales: whether the scales are searched.
      form: "merged", one convolution with K; "branches", one convolution a branch.
      bias: an initial bias (out,), or None.
      dtype: computation dtype; by default that of inputs and parameters.
      param_dtype: of weights and scales.
      rngs: source of the branch weights' draws (stream `params`).

    Raises:
      ValueError: a branch set in another layout than "...io", an unknown form, or padding that does not fit.
    """

    def __init__(
        self,
        branches: BranchSet,
        *,
        strides: int | Sequence[int] = 1,
        padding: Pads = (),
        dilation: int | Sequence[int] = 1,
        scales: Mapping[str, jax.Array] | None = None,
        trainable_scales: bool = True,
        form: Form = "merged",
        bias: jax.Array | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if branches.layout != "...io":
            raise ValueError(f"`branches` has layout {branches.layout!r}: a Flax layer needs '...io'")
        if form not in FORMS:
            raise ValueError(f"`form` is {form!r}: it must be one of {', '.join(FORMS)}")
        axes = len(branches.kernel) - 2
        self.branches = branches
        self.strides = per_axis(strides, axes)
        self.dilation = per_axis(dilation, axes)
        self.padding = tuple((int(lo), int(hi)) for lo, hi in padding)
        if len(self.padding) != axes:
            raise ValueError(f"`padding` is {padding}: it needs a pair for each of the {axes} spatial axes")
        self.form = form
        self.dtype = dtype
        given = dict(scales or {})
        ones = jnp.ones((branches.out,), param_dtype)
        weights = branches.sample(rngs.params(), dtype=param_dtype)
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
        """(batch, *spatial, in) -> (batch, *spatial', out)."""
        weights = {name: w[...] for name, w in self.weights.items()}
        scales = {name: s[...] for name, s in self.scales.items()}
        if self.form == "merged":
            y = self._convolve(x, self.branches.merge(weights, scales))
        else:
            y = self._run_branches(x, weights, scales)
        return y if self.bias is None else y + along_channels(self.bias[...], y)

    def merged_kernel(self) -> jax.Array:
        """K, of the shape of a plain layer's kernel."""
        return self.branches.merge(
            {name: w[...] for name, w in self.weights.items()},
            {name: s[...] for name, s in self.scales.items()},
        )

    def scale_vectors(self) -> dict[str, jax.Array]:
        """What a search finds: s_b of every scaled branch, u of the identity; (out,) each."""
        return {
            b.name: (self.scales if b.has_scale else self.weights)[b.name][...]
            for b in self.branches.branches
        }

    def _convolve(self, x, kernel):
        x, kernel = promote_dtype((x, kernel), dtype=self.dtype)
        return convolve(
            x,
            kernel,
            strides=self.strides,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.branches.groups,
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
) -> jax.Array:
    """Cross-correlation of (batch, *spatial, in) with (*spatial, in/groups, out), any number of spatial axes,
    none too."""
    axes = kernel.ndim - 2
    if not axes:
        return x @ kernel
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
    )


@functools.singledispatch
def run_branch(branch: Branch, x: jax.Array, w: jax.Array, layer: CSLAConv) -> jax.Array:
    """What one branch's own layer gives for x, before its scale: each branch type says how."""
    raise TypeError(f"no branch-by-branch form is registered for {type(branch).__name__}: use form='merged'")


@run_branch.register
def _(branch: Kernel, x, w, layer):
    taps = branch.taps(layer.branches.kernel)
    return convolve(
        x,
        w,
        strides=layer.strides,
        padding=_narrowed(layer, taps),
        dilation=[t.step * d for t, d in zip(taps, layer.dilation)],
        groups=layer.branches.groups,
    )


@run_branch.register
def _(branch: Identity, x, w, layer):
    padding = _narrowed(layer, algebra.centre_tap(layer.branches.kernel[:-2]))
    spatial = [(lo, hi, 0) for lo, hi in padding]
    y = lax.pad(algebra.scale_output(x, w), jnp.zeros((), x.dtype), [(0, 0, 0), *spatial, (0, 0, 0)])
    return y[(slice(None), *(slice(None, None, s) for s in layer.strides))]


@run_branch.register
def _(branch: Average, x, w, layer):
    axes = len(layer.padding)
    y = convolve(
        x,
        w,
        strides=(1,) * axes,
        padding=((0, 0),) * axes,
        dilation=(1,) * axes,
        groups=layer.branches.groups,
    )
    window = layer.branches.kernel[:-2]
    total = lax.reduce_window(
        y,
        np.zeros((), y.dtype),  # a constant also under jit, without which JAX has no gradient for this
        lax.add,
        (1, *window, 1),
        (1, *layer.strides, 1),
        ((0, 0), *layer.padding, (0, 0)),
        window_dilation=(1, *layer.dilation, 1),
    )
    return total / math.prod(window)


@run_branch.register
def _(branch: AfterPointwise, x, w, layer):
    axes, groups = len(layer.padding), layer.branches.groups
    c = branch.pointwise(w.dtype)
    c = jnp.broadcast_to(c, (groups, *c.shape[1:]))
    pointwise = jnp.moveaxis(c, 0, 1).reshape((1,) * axes + (c.shape[1], groups * c.shape[2]))
    ones = (1,) * axes
    y = convolve(x, pointwise, strides=ones, padding=((0, 0),) * axes, dilation=ones, groups=groups)
    taps = algebra.centred_taps(branch.size, layer.branches.kernel[:-2], ones)
    return convolve(
        y,
        w,
        strides=layer.strides,
        padding=_narrowed(layer, taps),
        dilation=layer.dilation,
        groups=groups,
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


def _narrowed(layer: CSLAConv, taps: Sequence[algebra.Taps]) -> Pads:
    """Padding with which a smaller kernel at `taps` samples the pixels that it samples inside the layer's
    window."""
    padding = []
    for (lo, hi), t, n, d in zip(layer.padding, taps, layer.branches.kernel, layer.dilation):
        after = n - t.start - ((t.count - 1) * t.step + 1)
        padding.append((lo - t.start * d, hi - after * d))
    return tuple(padding)
