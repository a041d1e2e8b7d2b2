"""Where a network is quantized: at the input and the kernel of every convolution and dense layer.

    y = function(Q(x), Q(K)) + bias        Q: `affine.fake_quantize`

A `Quantizer` takes the place of the function of a layer (`conv_general_dilated` of an `nnx.Conv`,
`dot_general` of an `nnx.Linear`), so that the layer, its class and the paths of its parameters stay what they
are, and masks, scales and `fuse` with them. All else is computed in floating point: additions,
concatenations, pooling, activations, the gate of squeeze-and-excitation. It is the placement of NVIDIA's
whitepaper (arXiv 2004.09602, section 3), which TensorRT, onnxruntime and YOLOv6 have too.

Inputs are unsigned and affine, one range for the tensor: whole numbers from 0 to 2^bits - 1, the range
widened to hold zero, which is exact. Kernels are signed and symmetric: whole numbers from -q to q, the scale
being max|K| / q, of each output channel or of the tensor.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from repopt_jax.arguments import check_array, check_kind
from repopt_jax.core import paths
from repopt_jax.nn.branched import StructuredLayer
from repopt_jax.nn.geometry import ChangedOperands, check_plain
from repopt_jax.quantize.affine import fake_quantize
from repopt_jax.surgery.layers import WRAPPERS
from repopt_jax.surgery.modules import aliases, check_model, is_training, named_modules, replace_modules

Per = Literal["channel", "tensor"]
WeightRange = Literal["reduced", "full"]
MIN_BITS, MAX_BITS = 2, 8
REDUCED_MAX = 63
MAX_SCALE_BITS = 24  # of float32
EXACT_SCALE_BITS = 4
# Units of a bias at most. A sum of 2^15 products of 8 bits is no more, and the two together have 32 bits.
MAX_UNITS = 2**30

Range = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a layer is quantized.

    Attributes:
      bits: of its input, 2 to 8.
      weight_bits: of its kernel, 2 to 8; None for `bits`.
      per: whether the kernel has a scale for each output "channel" or one for the "tensor".
      weight_range: largest whole number of a kernel of 8 bits: "reduced" is 63, "full" 127. On x86 processors
        without VNNI, the integer kernels of onnxruntime add two products in 16 bits, which 127 overflows.
        With fewer bits it is 2^(bits - 1) - 1.
      scale_bits: significant binary digits of every scale, 1 to 24, to which it is rounded up; None for those
        of its dtype. Products are then whole multiples of a unit, and with `EXACT_SCALE_BITS` digits a sum of
        some thousand of them is, but for a few, less than 2^24 units: float32 does not round it, whether
        products are added up in one order, another, or as integers, and every runtime computes the same.
        Steps are 4 % longer on average, and 12 % at most.

    Raises:
      ValueError: numbers of bits, `per` or `weight_range` that are none of these.
    """

    bits: int = 8
    weight_bits: int | None = None
    per: Per = "channel"
    weight_range: WeightRange = "reduced"
    scale_bits: int | None = None

    def __post_init__(self) -> None:
        problems = [
            f"`{name}` is {value!r}: it must be a whole number from {least} to {most}"
            for name, value, least, most in (
                ("bits", self.bits, MIN_BITS, MAX_BITS),
                ("weight_bits", self.weight_bits, MIN_BITS, MAX_BITS),
                ("scale_bits", self.scale_bits, 1, MAX_SCALE_BITS),
            )
            if value is not None and not (type(value) is int and least <= value <= most)
        ]
        problems += [
            f"`{name}` is {value!r}: it must be {' or '.join(map(repr, get_args(choices)))}"
            for name, value, choices in (
                ("per", self.per, Per),
                ("weight_range", self.weight_range, WeightRange),
            )
            if value not in get_args(choices)
        ]
        if problems:
            raise ValueError("; ".join(problems))

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Scheme":
        """The scheme among the fields, by name, of a config or a record that has others too.

        Raises:
          ValueError: as the scheme itself.
          KeyError: a field is missing.
        """
        return cls(**{field.name: fields[field.name] for field in dataclasses.fields(cls)})

    @property
    def levels(self) -> int:
        """The largest whole number of an input, 2^bits - 1; the least is 0."""
        return 2**self.bits - 1

    @property
    def weight_max(self) -> int:
        """The largest whole number of a kernel, q; the least is -q."""
        bits = self.bits if self.weight_bits is None else self.weight_bits
        reduced = bits == MAX_BITS and self.weight_range == "reduced"
        return REDUCED_MAX if reduced else 2 ** (bits - 1) - 1

    @property
    def by_channel(self) -> bool:
        """Whether rounding a kernel commutes with a factor for each of its output channels: if each has a
        scale, and the scale is not rounded itself.
        """
        return self.per == "channel" and self.scale_bits is None


class Observed(nnx.Variable[jax.Array]):
    """What a quantizer knows of the inputs of its layer: found by calibration or in training, not trained."""


class Quantizer(ChangedOperands):
    """function(Q(x), Q(K)): takes the place of the function of an `nnx.Conv` or `nnx.Linear`.

    Attributes:
      range: (2,), the least and the largest input; `Observed`. What is quantized is the range widened to hold
        zero.
      count: () int32, how many batches of training the range has seen; `Observed`.
      least_scale: no scale of the kernel is less; 0, but for what `with_integer_biases` sets.
      use_running_average: False in training mode, as of a batch norm; `model.train()` and `model.eval()` set
        it.

    Args:
      function: what the layer computes with, of the arguments of `jax.lax.conv_general_dilated` or
        `jax.lax.dot_general`; the kernel's last axis is that of its output channels.
      scheme: bits and scales.
      inputs: least and largest input.
      momentum: None for a range that stays. Else in training mode the range moves with each batch: it is
        that of the first, then range <- momentum * range + (1 - momentum) * range of the batch.
      frozen_after: batches after which it moves no more.
      dtype: of the range.
    """

    def __init__(
        self,
        function: Callable[..., jax.Array],
        scheme: Scheme,
        inputs: tuple[Any, Any] = (0.0, 0.0),
        *,
        momentum: float | None = None,
        frozen_after: int | None = None,
        dtype: Any = jnp.float32,
    ):
        self.function = function
        self.scheme = scheme
        self.momentum = momentum
        self.frozen_after = frozen_after
        self.least_scale: float = 0.0
        self.use_running_average = True
        self.range: Observed = Observed(jnp.asarray(inputs, dtype))
        self.count: Observed = Observed(jnp.zeros((), jnp.int32))

    @property
    def by_channel(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether quantizing the kernel commutes with a factor for each output channel."""
        return self.scheme.by_channel

    def __call__(self, lhs: jax.Array, rhs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        if self.momentum is not None and not self.use_running_average:
            self._observe(lhs, self.momentum)
        return self.function(self.quantized_input(lhs), self.quantized_kernel(rhs), *args, **kwargs)

    def quantized_input(self, x: jax.Array) -> jax.Array:
        """Returns x rounded to its levels, of the shape and dtype of x."""
        return quantized_input(x, self.range[...], self.scheme)

    def quantized_kernel(self, kernel: jax.Array) -> jax.Array:
        """Returns the kernel rounded to its levels, of its shape and dtype."""
        return quantized_kernel(kernel, self.scheme, self.least_scale)

    def _observe(self, x: jax.Array, momentum: float) -> None:
        old, count = self.range[...], self.count[...]
        new = lax.stop_gradient(jnp.stack(_with_zero(x.min(), x.max()))).astype(old.dtype)
        moved = jnp.where(count == 0, new, momentum * old + (1 - momentum) * new)
        if self.frozen_after is not None:
            moved = jnp.where(count >= self.frozen_after, old, moved)
        self.range.set_value(moved)
        self.count.set_value(count + 1)


def quantized_input(x: jax.Array, inputs: jax.Array, scheme: Scheme) -> jax.Array:
    """Returns x rounded to the levels of a range, (2,); scale and zero point are those of `input_scale`."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    scale, zero = input_scale(inputs[0], inputs[1], scheme)
    return fake_quantize(x.astype(wide), scale, zero, low=0, high=scheme.levels).astype(x.dtype)


def quantized_kernel(kernel: jax.Array, scheme: Scheme, least: float = 0.0) -> jax.Array:
    """Returns a kernel (..., out) rounded to its levels; the scale is that of `kernel_scale`.

    As the scale follows the largest weight, nothing is clipped, and the derivative is 1 everywhere.
    """
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    axis = kernel.ndim - 1 if scheme.per == "channel" else None
    scale, q = kernel_scale(kernel.astype(wide), scheme, least), scheme.weight_max
    zero = jnp.zeros_like(scale)
    return fake_quantize(kernel.astype(wide), scale, zero, low=-q, high=q, axis=axis).astype(kernel.dtype)


def input_scale(low: Any, high: Any, scheme: Scheme) -> tuple[jax.Array, jax.Array]:
    """Returns scale and zero point of inputs from `low` to `high`, both () of the dtype of `low`.

        scale = (high - low) / levels        zero point = round(-low / scale)

    The range is widened to hold zero. Of an empty range the scale is 1, as there is only zero to represent.
    The scale is rounded up to `scheme.scale_bits`.
    """
    low, high = _with_zero(jnp.asarray(low), jnp.asarray(high))
    width = high - low
    scale = jnp.where(width > _least(width.dtype), width / scheme.levels, jnp.ones_like(width))
    scale = _rounded_up(scale, scheme.scale_bits)
    return scale, jnp.clip(jnp.round(-low / scale), 0, scheme.levels)


def kernel_scale(kernel: jax.Array, scheme: Scheme, least: float = 0.0) -> jax.Array:
    """Returns max|K| / q, (out,) for `per` "channel" and () for "tensor", in the dtype of the kernel.

    It is larger by a few units in the last place, so that the largest weight is not clipped by rounding, and
    then rounded up to `scheme.scale_bits`. A channel of zeros, which any scale represents, has the largest of
    the others, and a kernel of zeros 1. None is less than `least`.
    """
    axes = tuple(range(kernel.ndim - 1)) if scheme.per == "channel" else None
    largest = lax.stop_gradient(jnp.abs(kernel).max(axis=axes))
    whole = largest.max()
    largest = jnp.where(largest > _least(kernel.dtype), largest, whole)
    largest = jnp.where(whole > _least(kernel.dtype), largest, jnp.asarray(scheme.weight_max, kernel.dtype))
    scale = largest * (1 + 4 * float(jnp.finfo(kernel.dtype).eps)) / scheme.weight_max
    scale = jnp.maximum(scale, jnp.asarray(least, scale.dtype))
    return _rounded_up(scale, scheme.scale_bits)


def layer_kernel_scale(layer: nnx.Conv | nnx.Linear, scheme: Scheme, least: float = 0.0) -> jax.Array:
    """Returns `kernel_scale` of a layer as its quantizer finds it: of the kernel in the dtype in which the
    layer computes, and in single precision at least."""
    kernel = layer.kernel[...] if layer.dtype is None else layer.kernel[...].astype(layer.dtype)
    return kernel_scale(kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32)), scheme, least)


def _rounded_up(scale: jax.Array, bits: int | None) -> jax.Array:
    """The least number of so many significant binary digits that is not below `scale`."""
    if bits is None:
        return scale
    fraction, exponent = jnp.frexp(scale)
    return jnp.ldexp(jnp.ceil(jnp.ldexp(fraction, bits)), exponent - bits)


def _with_zero(low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.minimum(low, 0), jnp.maximum(high, 0)


def _least(dtype: Any) -> float:
    """Below it, a range is taken as empty: its scale would be no normal number."""
    return 1e3 * float(jnp.finfo(dtype).tiny)


# -- the layers of a network


def find_quantizable(model: nnx.Module) -> dict[str, nnx.Conv | nnx.Linear]:
    """Returns the convolutions and dense layers by path, in the order of their paths; aliases are left out.

    Raises:
      ValueError: a network in training mode, with branches, or that is quantized already; or layers that
        cannot be quantized (stacked, masked, wrapped, with a function of their own); all with path and class.
      TypeError: no NNX model.
    """
    check_model(model)
    problems, found = _problems_of(model), {}
    inside = {
        id(value): f"{path} ({type(module).__name__}) {does}"
        for path, module in named_modules(model)
        for kind, does in WRAPPERS.items()
        if isinstance(module, kind)
        for value in vars(module).values()
        if isinstance(value, nnx.Module)
    }
    for path, module in named_modules(model):
        if not isinstance(module, (nnx.Conv, nnx.Linear)):
            continue
        where = f"{path} ({type(module).__name__})"
        axes = len(module.kernel_size) if isinstance(module, nnx.Conv) else 0
        try:
            check_plain(module, changed=True)
            if id(module) in inside:
                raise ValueError(inside[id(module)])
            if module.kernel.ndim != axes + 2:
                raise ValueError(f"its kernel is of shape {module.kernel.shape}: layers are stacked in it")
        except ValueError as error:
            problems.append(f"{where} cannot be quantized: {error}")
        found[path] = module
    if problems:
        raise ValueError("; ".join(problems))
    if not found:
        raise ValueError("`model` has no nnx.Conv or nnx.Linear to quantize")
    return found


def _problems_of(model: nnx.Module) -> list[str]:
    """Why a network as a whole cannot be quantized."""
    modules = dict(named_modules(model))
    branches = [f"{p} ({type(m).__name__})" for p, m in modules.items() if isinstance(m, StructuredLayer)]
    training = [f"{p} ({type(m).__name__})" for p, m in modules.items() if is_training(m)]
    done = [p.rpartition("/")[0] for p, m in modules.items() if isinstance(m, Quantizer)]
    problems = []
    if branches:
        problems.append(f"{paths.listed(branches, 8)} are made of branches: `fuse(model)` first")
    if training:
        problems.append(f"{paths.listed(training, 8)} are in training mode: call `model.eval()` first")
    if done:
        problems.append(f"{paths.listed(done, 8)} are quantized already: give the network in floating point")
    return problems


def with_quantizers(
    model: nnx.Module, scheme: Scheme, ranges: Mapping[str, Range], **options: Any
) -> nnx.Module:
    """Returns a copy of `model` with a `Quantizer` in each layer of `ranges`, path -> (least, largest) input.

    The other layers stay as they are. `options` are those of `Quantizer`.

    Raises:
      ValueError: as `find_quantizable`; paths that are none of its layers, all of them.
    """
    check_model(model)
    check_kind("scheme", scheme, Scheme, "a `Scheme`")
    check_kind("ranges", ranges, Mapping, "a mapping such as `find_ranges` returns")
    layers = find_quantizable(model)
    check_paths(model, ranges, "ranges", layers)

    def make(path: str, function: Any) -> Any:
        if path not in ranges:
            return None
        dtype = jnp.promote_types(layers[path].kernel.dtype, jnp.float32)
        return Quantizer(function, scheme, ranges[path], dtype=dtype, **options)

    return with_functions(model, make)


def with_functions(
    model: nnx.Module, make: Callable[[str, Callable[..., jax.Array]], Callable[..., jax.Array] | None]
) -> nnx.Module:
    """Returns a copy of `model` whose layers compute with `make(path, function)` in place of `function`.

    None leaves a layer as it is.
    """

    copy = replace_modules(model, lambda path, module: None)
    for path, module in list(named_modules(copy)):
        if isinstance(module, (nnx.Conv, nnx.Linear)):
            name = function_name(module)
            if (new := make(path, getattr(module, name))) is not None:
                setattr(module, name, nnx.data(new) if isinstance(new, nnx.Module) else nnx.static(new))
    return copy


def without_quantizers(model: nnx.Module) -> nnx.Module:
    """Returns a copy of `model` in floating point: its layers compute with the functions of before."""
    check_model(model)
    return with_functions(
        model, lambda path, function: function.function if isinstance(function, Quantizer) else None
    )


def with_integer_biases(model: nnx.Module) -> nnx.Module:
    """Returns a copy of a quantized `model` with the biases that integer kernels have: whole numbers of 32
    bits, in units of the products,

        b' = round(b / s) s,  s = (scale of the input) * (scale of the kernel)

    where s has a value for each output channel if the kernel's scale has. Where a channel's kernel is so
    small beside its bias that b / s has more than 30 bits, as of a channel that training has left dead, no
    scale of that layer's kernel is less than the one with which the largest bias has 30: what is then rounded
    of a product in the small channels is 2^-23 of that bias at most. Layers in floating point stay as they
    are, and so do biases in half precision, which does not hold such numbers.

    Raises:
      TypeError: no NNX model.
    """
    check_model(model)
    copy = replace_modules(model, lambda path, module: None)
    modules: dict[str, Any] = dict(named_modules(copy))
    for path, quantizer in quantizers(copy).items():
        layer = modules[path]
        if layer.bias is None or not _holds_units(layer):
            continue
        scheme, bias = quantizer.scheme, layer.bias[...]
        low, high = quantizer.range[...]
        of_input = input_scale(low, high, scheme)[0]
        unit = of_input * layer_kernel_scale(layer, scheme)
        if (jnp.abs(bias) > unit * MAX_UNITS).any():
            quantizer.least_scale = float(jnp.abs(bias).max() / of_input / MAX_UNITS)
            unit = of_input * layer_kernel_scale(layer, scheme, quantizer.least_scale)
        whole = jnp.round(bias / jnp.where(unit > 0, unit, 1))
        layer.bias.set_value(jnp.where(unit > 0, whole * unit, bias).astype(bias.dtype))
    return copy


def _holds_units(layer: nnx.Conv | nnx.Linear) -> bool:
    """Whether a layer stores its bias, and adds it, in single precision at least."""
    dtypes = [layer.bias.dtype, layer.bias.dtype if layer.dtype is None else layer.dtype]  # pyright: ignore
    return all(jnp.finfo(dtype).nmant >= jnp.finfo(jnp.float32).nmant for dtype in dtypes)


def function_name(layer: nnx.Module) -> str:
    """Returns the name of the attribute of a layer that computes its product."""
    return "conv_general_dilated" if isinstance(layer, nnx.Conv) else "dot_general"


def quantizers(model: nnx.Module) -> dict[str, Quantizer]:
    """Returns the quantizers of a network by the paths of their layers."""
    check_model(model)
    found = {path.rpartition("/")[0]: m for path, m in named_modules(model) if isinstance(m, Quantizer)}
    return dict(sorted(found.items(), key=lambda item: paths.natural_order(item[0])))


def check_paths(model: nnx.Module, given: Iterable[str], argument: str, layers: Collection[str]) -> None:
    """Raises ValueError with every one of `given` that is no layer, and what it may have meant."""
    others = aliases(model)
    wrong = [f"{path} (it is the layer {others[path]})" if path in others else path for path in given]
    wrong = [text for text, path in zip(wrong, given) if path not in layers]
    if wrong:
        raise ValueError(
            f"`{argument}` names {', '.join(wrong)}, which are no layers of the network: its convolutions "
            f"and dense layers are {paths.listed(list(layers), 12)}"
        )


def run_with_inputs(model: nnx.Module, images: jax.Array) -> tuple[Any, dict[str, list[jax.Array]]]:
    """Returns `model(images)` and the inputs of its layers: path -> one array for each use of the layer.

    A pure function, to be called under `jax.jit` as well. Convolutions with wrapped or reflected padding get
    padded inputs.
    """
    check_model(model)
    check_array("images", images)
    found: dict[str, list[jax.Array]] = {}

    def record(path: str, function: Any) -> Any:
        def recorded(lhs: jax.Array, rhs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
            found.setdefault(path, []).append(lhs)
            return function(lhs, rhs, *args, **kwargs)

        return recorded

    output = with_functions(model, record)(images)  # pyright: ignore[reportCallIssue]
    return output, {path: found[path] for path in sorted(found, key=paths.natural_order)}
