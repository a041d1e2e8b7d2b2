"""A layer that runs every branch of a structure: the structure is kept in the network.

    y = sum over the chains of (f_n o k_n o ... o f_1 o k_1)(x)

Each k is a separate convolution and each f its batch norm, its scale, or nothing. Any structure can be run in
this way, with the branches of RepVGG at up to twice the cost of a plain step. In training a batch norm is not
linear, so structures with a norm inside have no cheaper form until they are fused; the chains of one of its
`sums`, in which there is none, are merged and run as one convolution. `StructuredLayer` holds the arrays and
merges them into a kernel and a bias; `nn.Merged` is the layer that merges everything before it runs.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax

from repopt_jax.core import algebra, paths
from repopt_jax.core.branches import AfterPointwise, Average, Branch, Identity, Kernel, Local, Pool, Shape
from repopt_jax.core.structure import Affine, Geometry, Part, Structure
from repopt_jax.nn.block import SharedNorm, batch_norm
from repopt_jax.nn.convolution import tiled
from repopt_jax.nn.geometry import along_channels, convolve, narrowed, one_batch_axis, padded, padded_with


class FrozenScale(nnx.Variable[jax.Array]):
    """A scale that is not trained."""


class StructuredLayer(nnx.Module):
    """A convolution or, without spatial axes, a dense layer, with the arrays of a structure.

    It has the attributes of `nnx.Conv` and `nnx.Linear` that networks read: `in_features`, `out_features`,
    `kernel_size`. Equal layers can be stacked in one, by building it under `nnx.vmap` like any module or, if
    the structure has no batch norm, with `stack`; it is then run under `nnx.scan` or `nnx.vmap`, which pass
    the arrays of one layer to `__call__`.

    Attributes:
      structure: the structure of one layer.
      weights: key of a stage -> its tensor, trainable.
      scales: key -> the factor (channels,) after the stage: `nnx.Param`, or `FrozenScale` if it is constant.
      norms: key -> the batch norm after the stage.
      bias: (out,), added to the sum, or None.

    Args:
      structure: the structure, whose layer defines strides, padding, dilation and groups.
      values: key -> initial value of a vector, (*stack, channels): the scale after a stage, or the tensor of
        a trained identity. By default `Stage.start` and ones, respectively.
      stack: leading axes of all arrays, for that many equal layers, each drawn independently.
      bias: initial bias (*stack, out), or None.
      dtype: computation dtype; by default that of inputs and parameters.
      precision: precision of the products, as in `nnx.Conv`.
      param_dtype: dtype of weights, scales and bias and, if it is not narrower than float32, of the batch
        norms.
      rngs: `nnx.Rngs` with the stream `params`; each tensor is drawn as its stage's own layer would be.

    Raises:
      ValueError: vectors or a bias of another shape, or vectors of a stage that has none; a `stack` of a
        structure with batch norms.
    """

    def __init__(
        self,
        structure: Structure,
        *,
        values: Mapping[str, jax.Array] | None = None,
        stack: Shape = (),
        bias: jax.Array | None = None,
        dtype: Any = None,
        precision: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        normed = structure.followers("norm")
        if stack and normed:
            raise ValueError(
                f"`stack` is {stack}, and {paths.listed(list(normed))} have batch norms: build the layer "
                "under nnx.vmap, which also makes the statistics of each"
            )
        self.structure = structure
        self.dtype: Any = dtype
        self.precision: Any = precision
        self.param_dtype: Any = param_dtype
        draw = functools.partial(structure.sample, dtype=param_dtype)
        for size in reversed(stack):
            draw = jax.vmap(draw, axis_size=size)
        keys = rngs.params()
        tensors = draw(jax.random.split(keys, stack) if stack else keys)
        given = dict(values or {})
        _check_vectors(structure, stack, given, bias)
        tensors |= {key: given[key] for key in given if key in _vectors(structure)}
        self.weights: nnx.Dict[nnx.Param[jax.Array]] = nnx.Dict(
            {key: nnx.Param(jnp.asarray(w, param_dtype)) for key, w in tensors.items()}
        )
        self.scales: nnx.Dict[nnx.Variable[jax.Array]] = nnx.Dict({})
        for key, part in structure.followers("scale", "constant").items():
            start = jnp.full((*stack, part.channels), part.stage.start, param_dtype)
            variable = nnx.Param if part.stage.then == "scale" else FrozenScale
            self.scales[key] = variable(jnp.asarray(given.get(key, start), param_dtype))
        self.norms: nnx.Dict[nnx.BatchNorm] = nnx.Dict({})
        for key, part in normed.items():
            wide = jnp.promote_types(param_dtype, jnp.float32)
            options = {"start": part.stage.start, "shared": part.stage.shared}
            self.norms[key] = batch_norm(
                part.layer.outputs, dtype=dtype, param_dtype=wide, rngs=rngs, **options
            )
        bias_param = None if bias is None else nnx.Param(jnp.asarray(bias, param_dtype))
        self.bias: nnx.Param[jax.Array] | None = nnx.data(bias_param)

    @property
    def in_features(self) -> int:
        """Channels of the input."""
        return self.structure.layer.inputs

    @property
    def out_features(self) -> int:
        """Channels of the output."""
        return self.structure.layer.outputs

    @property
    def kernel_size(self) -> Shape:
        """Spatial shape of the merged kernel, () for a dense layer."""
        return self.structure.layer.window

    @property
    def stack(self) -> Shape:
        """The leading axes of the arrays; () for a single layer.

        Raises:
          ValueError: the arrays do not have the shapes of one structure, as after stacking along other axes
            than the leading ones; all are listed.
        """
        expected = {f"weights/{key}": shape for key, shape in self.structure.shapes().items()}
        expected |= {
            f"scales/{key}": (part.channels,)
            for key, part in self.structure.followers("scale", "constant").items()
        }
        found = {f"weights/{key}": tuple(w.shape) for key, w in self.weights.items()}
        found |= {f"scales/{key}": tuple(s.shape) for key, s in self.scales.items()}
        if not found:
            return ()
        first = next(iter(found))
        stack = found[first][: max(len(found[first]) - len(expected[first]), 0)]
        expected = {name: (*stack, *shape) for name, shape in expected.items()}
        if difference := paths.describe_difference(expected, found, noun="arrays"):
            raise ValueError(
                f"the arrays of this layer do not fit its structure: {difference}. Layers are stacked along "
                "leading axes, all arrays alike; where `nnx.StateAxes` names types, constant scales are "
                "`nn.FrozenScale`"
            )
        return stack

    def vectors(self) -> dict[str, jax.Array]:
        """Returns what a search finds, (*stack, channels) each: scales, and tensors of trained identities."""
        own = {key: self.weights[key][...] for key in _vectors(self.structure)}
        found = {key: scale[...] for key, scale in self.scales.items()} | own
        return {part.key: found[part.key] for part in self.structure.parts if part.key in found}

    def kernel_and_bias(self) -> tuple[jax.Array, jax.Array | None]:
        """Returns kernel and bias (or None) of the plain layer that equals this one in evaluation mode.

        The arrays of stacked layers have the axes of the stack in front.
        """
        merge = functools.partial(self.structure.merge, dtype=self._tensor_dtype())
        for _ in self.stack:
            merge = jax.vmap(merge)
        kernel, shift = merge(self._tensors(), self._affines())
        biases = [b for b in (shift, None if self.bias is None else self.bias[...]) if b is not None]
        return kernel, functools.reduce(jnp.add, biases) if biases else None

    def _tensors(self) -> dict[str, jax.Array]:
        return {key: w[...] for key, w in self.weights.items()}

    def _tensor_dtype(self) -> Any:
        """Returns the tensors' present dtype: the model may have been cast since its construction.

        An average that is computed in a narrower dtype would differ.
        """
        return jnp.result_type(*self._tensors().values()) if self.weights else self.param_dtype

    def _affines(self) -> dict[str, Affine]:
        """Returns (a, b) of the scale or batch norm after each stage, the latter with running statistics."""
        return self._scale_affines() | {key: affine_of(norm) for key, norm in self.norms.items()}

    def _scale_affines(self) -> dict[str, Affine]:
        return {key: (scale[...], None) for key, scale in self.scales.items()}

    def _run_merged(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Convolves x, of one batch axis, with a merged kernel."""
        x, kernel = promote_dtype((x, kernel), dtype=self.dtype)
        # Otherwise XLA's CPU backend merges once for the output and once more for the gradient of the input.
        kernel = lax.optimization_barrier(kernel)
        return convolve(x, kernel, self.structure.layer, precision=self.precision)

    def _check_one(self) -> None:
        if self.stack:
            raise ValueError(
                f"this layer holds layers stacked along {self.stack}: run it under `nnx.scan` or `nnx.vmap`, "
                "which give it the arrays of one"
            )

    def _finish(self, y: jax.Array, batch: Shape) -> jax.Array:
        y = y.reshape(*batch, *y.shape[1:])
        return y if self.bias is None else y + along_channels(self.bias[...], y)


class Branched(StructuredLayer):
    """A layer that runs every branch of its structure. See `StructuredLayer` for attributes and arguments."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """(*batch, *spatial, in) -> (*batch, *spatial', out), with any number of batch axes, also none.

        Raises:
          ValueError: the arrays are those of stacked layers.
        """
        self._check_one()
        x, batch = one_batch_axis(x, self.structure.layer.axes)
        outputs = [self._run_chain(chain, x) for chain in self.structure.alone.values()]
        outputs += [self._run_sum(name, x) for name, _ in self.structure.sums]
        return self._finish(functools.reduce(jnp.add, outputs), batch)

    def _run_sum(self, name: str, x: jax.Array) -> jax.Array:
        kernel = self.structure.merge_sum(
            name, self._tensors(), self._scale_affines(), dtype=self._tensor_dtype()
        )
        return self.norms[name](self._run_merged(x, kernel))

    def _run_chain(self, chain: tuple[Part, ...], x: jax.Array) -> jax.Array:
        border: jax.Array | None = None  # output of the stages so far for zeros; None while that is zero
        for part in chain:
            layer = part.layer.for_input(x.shape[1:-1])
            if border is not None and layer.pad_mode == "constant" and any(map(any, layer.padding)):
                x = padded_with(x, border, layer)
                layer = _unpadded(layer)
            x = self._follow(part, self._run(part, x, layer))
            border = self._border(part, border)
        return x

    def _run(self, part: Part, x: jax.Array, layer: Geometry) -> jax.Array:
        if part.stage.residual:
            w = part.kernel(self._tensors(), self._tensor_dtype())
            xb, w = promote_dtype((x, w), dtype=self.dtype)
            return convolve(xb, w, layer, precision=self.precision)
        w = self.weights[part.key][...] if part.stage.trained else jnp.ones(part.shape, x.dtype)
        xb, w = promote_dtype((x, w), dtype=self.dtype)
        return run_map(part.stage.map, xb, w, layer, self.precision)

    def _follow(self, part: Part, y: jax.Array) -> jax.Array:
        match part.stage.then:
            case "norm":
                return self.norms[part.key](y)
            case "scale" | "constant":
                return y * along_channels(part.spread(self.scales[part.key][...]), y)
        return y

    def _border(self, part: Part, border: jax.Array | None) -> jax.Array | None:
        """Returns the output of this stage and its norm or scale for the constant input `border`.

        As in the published block, training also uses the running statistics, as updated in this step, and
        there is no gradient through the padding.
        """
        norm = self.norms.get(part.key)
        if border is None and norm is None:
            return None
        dtype = self._tensor_dtype()
        constant = jnp.zeros((part.layer.outputs,), dtype)
        if border is not None:
            constant = algebra.constant_response(part.kernel(self._tensors(), dtype), border)
        if norm is not None:
            a, b = affine_of(norm)
            constant = constant * a + b
        elif part.key in self.scales:
            constant = constant * part.spread(self.scales[part.key][...])
        return lax.stop_gradient(constant)


def affine_of(norm: nnx.BatchNorm) -> tuple[jax.Array, jax.Array]:
    """Returns (a, b) of a batch norm with its running statistics as y = a * x + b.

    Both are (channels,), the channels of its input, also where several share one channel of the norm.
    """
    mean, var = norm.mean[...], norm.var[...]
    gamma = jnp.ones_like(var) if norm.scale is None else norm.scale[...]
    beta = jnp.zeros_like(var) if norm.bias is None else norm.bias[...]
    a, b = algebra.bn_affine(gamma, beta, mean, var, eps=norm.epsilon)
    if isinstance(norm, SharedNorm):
        a, b = (jnp.repeat(v, norm.shared, axis=-1) for v in (a, b))
    return a, b


@functools.singledispatch
def run_map(m: Branch, x: jax.Array, w: jax.Array, layer: Geometry, precision: Any) -> jax.Array:
    """Applies one linear map to x.

    A kind of branch without a registered function is run as a convolution with its embedded kernel, which
    costs the products of the whole window.
    """
    return convolve(x, m.embed(w, layer.kernel), layer, precision=precision)


@run_map.register
def _(m: Kernel, x, w, layer, precision):
    return convolve(x, w, layer, taps=m.taps(layer.kernel), precision=precision)


@run_map.register
def _(m: Identity, x, w, layer, precision):
    x, padding = padded(x, layer)
    padding = narrowed(padding, algebra.centre_tap(layer.window), layer)
    spatial = [(before, after, 0) for before, after in padding]
    y = lax.pad(algebra.scale_output(x, w), jnp.zeros((), x.dtype), [(0, 0, 0), *spatial, (0, 0, 0)])
    return y[(slice(None), *(slice(None, None, s) for s in layer.strides))]


@run_map.register
def _(m: Pool, x, w, layer, precision):
    return _average(algebra.scale_output(x, w), layer)


@run_map.register
def _(m: Average, x, w, layer, precision):
    # The 1x1 convolution commutes with every kind of padding, so it goes first, on the smaller map.
    return _average(convolve(x, w, layer.pointwise(layer.outputs), precision=precision), layer)


@run_map.register
def _(m: AfterPointwise, x, w, layer, precision):
    groups, c = layer.groups, m.pointwise(w.dtype)
    c = jnp.broadcast_to(c, (groups, *c.shape[1:]))
    c = jnp.moveaxis(c, 0, 1).reshape((1,) * layer.axes + (c.shape[1], groups * c.shape[2]))
    y = convolve(x, c, layer.pointwise(c.shape[-1]), precision=precision)
    taps = algebra.centred_taps(m.size, layer.window, (1,) * layer.axes)
    return convolve(y, w, layer, taps=taps, precision=precision)


@run_map.register
def _(m: Local, x, w, layer, precision):
    if not layer.tiles:
        return convolve(x, m.embed(w, layer.kernel), layer, precision=precision)
    tiles = tiled(x, layer.window)
    inside = Geometry(m.size, layer.inputs, w.shape[-1], layer.groups)
    y = convolve(one_batch_axis(tiles, layer.axes)[0], w, inside, precision=precision)
    y = y.reshape(*tiles.shape[: layer.axes + 1], layer.taps, w.shape[-1])
    return jnp.swapaxes(y, -1, -2).reshape(*y.shape[:-2], layer.outputs)


def _average(y: jax.Array, layer: Geometry) -> jax.Array:
    y, padding = padded(y, layer)
    total = lax.reduce_window(
        y,
        np.zeros((), y.dtype),  # a constant also under jit, without which JAX has no gradient for this
        lax.add,
        (1, *layer.window, 1),
        (1, *layer.strides, 1),
        ((0, 0), *padding, (0, 0)),
        window_dilation=(1, *layer.dilation, 1),
    )
    return total / layer.taps


def _unpadded(layer: Geometry) -> Geometry:
    return Geometry(
        layer.window,
        layer.inputs,
        layer.outputs,
        layer.groups,
        strides=layer.strides,
        dilation=layer.dilation,
        padding=((0, 0),) * layer.axes,
    )


def _vectors(structure: Structure) -> dict[str, Part]:
    """Returns the parts whose tensor is a trained vector: identities without a norm."""
    return {p.key: p for p in structure.parts if p.stage.trained and not p.stage.map.has_scale}


def _check_vectors(
    structure: Structure, stack: Shape, values: Mapping[str, jax.Array], bias: jax.Array | None
) -> None:
    """Raises ValueError for misshapen vectors, which would be broadcast or fail later in a convolution."""
    holders = structure.followers("scale", "constant") | _vectors(structure)
    expected = {key: (*stack, part.channels) for key, part in holders.items()}
    expected |= {"bias": (*stack, structure.layer.outputs)}
    found = {name: tuple(jnp.shape(v)) for name, v in values.items()}
    found |= {} if bias is None else {"bias": tuple(jnp.shape(bias))}
    expected = {name: shape for name, shape in expected.items() if name in found}
    if difference := paths.describe_difference(expected, found, noun="vectors"):
        raise ValueError(f"`values` or `bias` do not fit the layer: {difference}")
