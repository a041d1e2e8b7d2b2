"""Affine quantization: whole numbers that stand for an array.

    q = clip(round(x / scale) + zero_point, low, high)        x' = (q - zero_point) * scale

`quantize_array` gives q, `fake_quantize` x' in floating point, as ONNX's QuantizeLinear and DequantizeLinear
compute them: halves are rounded to the even number, and zero is exactly one of the values, so that padding
with zeros is too. `fake_quantize` is a primitive of JAX, so that an exporter sees in a traced network where
and how it is quantized.
Source: Jacob et al. (arXiv 1712.05877), section 2.1.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import batching, mlir


def quantize_array(
    x: jax.Array, scale: jax.Array, zero_point: jax.Array, *, low: int, high: int, axis: int | None = None
) -> jax.Array:
    """Returns q, int32, of the shape of x; arguments as `fake_quantize`."""
    s, z = (_along(v, x, axis).astype(x.dtype) for v in (scale, zero_point))
    return _quantized(x, s, z, low, high).astype(jnp.int32)


def fake_quantize(
    x: jax.Array, scale: jax.Array, zero_point: jax.Array, *, low: int, high: int, axis: int | None = None
) -> jax.Array:
    """Returns x rounded to the values that whole numbers from `low` to `high` stand for.

    The derivative with respect to x is that of clipping, 1 where x is between the values of `low` and `high`
    and 0 outside (straight-through estimator, arXiv 1308.3432); scale and zero point are constants.

    Args:
      x: any shape and float dtype.
      scale: above 0; scalar, or (x.shape[axis],).
      zero_point: whole numbers from `low` to `high`, of any dtype; of the shape of `scale`.
      low, high: the range of whole numbers, such as 0 and 255.
      axis: the axis of x along which scales differ; None for a scalar.

    Raises:
      ValueError: an empty range, or shapes that do not belong together.
    """
    if not low < high:
        raise ValueError(f"`low` is {low} and `high` {high}: the first must be less")
    wanted = () if axis is None else (x.shape[axis],)
    if jnp.shape(scale) != wanted or jnp.shape(zero_point) != wanted:
        raise ValueError(
            f"`scale` is of shape {jnp.shape(scale)} and `zero_point` {jnp.shape(zero_point)}: with `axis` "
            f"{axis} of x, {x.shape}, both must be {wanted}"
        )
    axis = None if axis is None else axis % x.ndim
    scale, zero_point = jnp.asarray(scale, x.dtype), jnp.asarray(zero_point, x.dtype)
    return _straight_through(x, scale, zero_point, low, high, axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def _straight_through(x: Any, scale: Any, zero_point: Any, low: int, high: int, axis: int | None) -> Any:
    return _fake_quantize.bind(x, scale, zero_point, low=low, high=high, axis=axis)


@_straight_through.defjvp
def _(low: int, high: int, axis: int | None, primals: Any, tangents: Any) -> Any:
    x, scale, zero_point = primals
    s, z = _along(scale, x, axis), _along(zero_point, x, axis)
    inside = (x >= (low - z) * s) & (x <= (high - z) * s)
    y = _straight_through(x, scale, zero_point, low, high, axis)
    return y, jnp.where(inside, tangents[0], jnp.zeros_like(y))


def _computed(x: Any, scale: Any, zero_point: Any, *, low: int, high: int, axis: int | None) -> Any:
    s, z = _along(scale, x, axis), _along(zero_point, x, axis)
    return (_quantized(x, s, z, low, high) - z) * s


def _quantized(x: jax.Array, s: jax.Array, z: jax.Array, low: int, high: int) -> jax.Array:
    """clip(round(x / s) + z, low, high), of the dtype of x."""
    # Of x / s, where s is one number, XLA makes x * (1 / s), which rounds twice: halves, which whole numbers
    # in units of two scales often are, then go to either side. A divisor that depends on x stays one.
    return jnp.clip(jnp.round(x / jnp.where(jnp.isnan(x), x, s)) + z, low, high)


def _along(v: jax.Array, x: jax.Array, axis: int | None) -> jax.Array:
    """Reshapes a scalar or (x.shape[axis],) to broadcast against x."""
    v = jnp.asarray(v)
    if axis is None:
        return v.reshape((1,) * x.ndim)
    return v.reshape(tuple(-1 if n == axis % x.ndim else 1 for n in range(x.ndim)))


# -- the primitive

_fake_quantize = core.Primitive("repopt_fake_quantize")


@_fake_quantize.def_impl
def _(*operands: Any, **params: Any) -> Any:
    return jax.jit(functools.partial(_computed, **params))(*operands)


@_fake_quantize.def_abstract_eval
def _(x: Any, scale: Any, zero_point: Any, **params: Any) -> Any:
    del scale, zero_point, params
    return x


def _batched(operands: Any, axes: Any, **params: Any) -> Any:
    x, scale, zero_point = operands
    if axes[1] is None and axes[2] is None:
        x, axis = jnp.moveaxis(x, axes[0], 0), params["axis"]
        params = params | {"axis": None if axis is None else axis + 1}
        return _fake_quantize.bind(x, scale, zero_point, **params), 0
    return jax.vmap(functools.partial(_computed, **params), axes)(x, scale, zero_point), 0


batching.primitive_batchers[_fake_quantize] = _batched
mlir.register_lowering(_fake_quantize, mlir.lower_fun(_computed, multiple_results=False))
