"""Affine quantization: the formula, its derivative, and that every transformation of JAX takes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from repopt_jax.quantize import fake_quantize, quantize_array


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def slow(x, scale, zero_point, low, high):
    """One number at a time, in Python's own arithmetic, whose `round` takes halves to the even number."""
    out = np.empty(x.shape)
    for index, value in np.ndenumerate(x):
        s, z = (float(v if np.ndim(v) == 0 else v[index[-1]]) for v in (scale, zero_point))
        out[index] = (min(max(round(float(value) / s) + z, low), high) - z) * s
    return out


@pytest.mark.parametrize(("low", "high"), [(0, 255), (-63, 63), (-8, 7), (0, 3)])
@pytest.mark.parametrize("axis", [None, -1])
def test_values(rng, x64, low, high, axis):
    x = jnp.asarray(rng.normal(size=(5, 7, 4)) * 3)
    scale = np.asarray(0.11) if axis is None else rng.uniform(0.01, 0.5, 4)
    zero_point = rng.integers(low, high + 1, scale.shape)
    options = {"low": low, "high": high, "axis": axis}
    got = fake_quantize(x, scale, zero_point, **options)
    np.testing.assert_allclose(got, slow(np.asarray(x), scale, zero_point, low, high), atol=1e-12)
    q = quantize_array(x, scale, zero_point, **options)
    assert q.dtype == jnp.int32
    assert q.min() >= low
    assert q.max() <= high
    np.testing.assert_allclose((np.asarray(q) - zero_point) * scale, got, atol=1e-12)
    np.testing.assert_array_equal(fake_quantize(jnp.zeros(x.shape), scale, zero_point, **options), 0)


def test_halves_are_rounded_to_even():
    x = jnp.asarray([0.5, 1.5, 2.5, -0.5, -1.5])
    np.testing.assert_array_equal(fake_quantize(x, 1.0, 0, low=-8, high=7), [0, 2, 2, 0, -2])


def test_quotients_are_not_products_with_a_reciprocal():
    """XLA divides by one number by multiplying with its reciprocal, which sends halves to either side."""
    scale, x = np.float32(13 / 512), np.arange(-20_000, 20_000, dtype=np.float32) * np.float32(143 / 2**14)
    options = {"low": -(2**20), "high": 2**20}
    wanted = np.round(x / scale)
    assert np.sum(x / scale * 2 % 2 == 1) > 1000
    for run in (quantize_array, jax.jit(quantize_array, static_argnames=("low", "high"))):
        np.testing.assert_array_equal(run(jnp.asarray(x), jnp.asarray(scale), 0, **options), wanted)
    fixed = jax.jit(lambda x: fake_quantize(x, scale, 0, **options))
    np.testing.assert_array_equal(fixed(x), wanted * scale)
    np.testing.assert_array_equal(fixed(jnp.full(3, jnp.nan)), jnp.nan)
    assert np.sum(np.round(x * (1 / scale)) != wanted) > 100


def test_the_derivative_is_that_of_clipping():
    x = jnp.asarray([-2.0, -0.1, 0.3, 1.1, 9.0])
    options = {"low": 0, "high": 15}
    got = jax.grad(lambda x: (fake_quantize(x, 0.1, 3, **options) * jnp.arange(1.0, 6)).sum())(x)
    np.testing.assert_array_equal(got, [0, 2, 3, 4, 0])
    of_scale = jax.grad(lambda s: fake_quantize(x, s, 3, **options).sum())(0.1)
    assert of_scale == 0


def test_transformations(rng):
    x, scale = jnp.asarray(rng.normal(size=(2, 3, 4))), jnp.asarray(rng.uniform(0.1, 0.2, (2, 4)))
    zero = jnp.zeros(4)

    def f(x, scale):
        return fake_quantize(x, scale, zero, low=-7, high=7, axis=1)

    expected = jnp.stack([f(x[i], scale[i]) for i in range(2)])
    np.testing.assert_array_equal(jax.jit(jax.vmap(f))(x, scale), expected)
    one = jnp.stack([f(x[i], scale[0]) for i in range(2)])
    np.testing.assert_array_equal(jax.vmap(f, (0, None))(x, scale[0]), one)
    last = jax.vmap(f, (1, None), 1)(jnp.moveaxis(x, 0, 1), scale[0])
    np.testing.assert_array_equal(jnp.moveaxis(last, 1, 0), one)


def test_symbolic_shapes_and_other_platforms(rng):
    def f(x):
        return fake_quantize(x, jnp.float32(0.1), 3, low=0, high=15)

    [b] = export.symbolic_shape("b")
    exported = export.export(jax.jit(f), platforms=["cpu", "cuda", "tpu"])(
        jax.ShapeDtypeStruct((b, 3), jnp.float32)
    )
    x = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    np.testing.assert_array_equal(exported.call(x), f(x))


def test_wrong_arguments():
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="`low` is 3 and `high` 3"):
        fake_quantize(x, 1.0, 0, low=3, high=3)
    with pytest.raises(ValueError, match=r"`scale` is of shape \(2,\).*must be \(3,\)"):
        fake_quantize(x, jnp.ones(2), jnp.zeros(2), low=0, high=3, axis=1)
