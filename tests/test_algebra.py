"""Kernel maps against loops written out index by index."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances

from repopt_jax.core import algebra
from repopt_jax.core.algebra import Taps


def placed_by_loops(w, window, starts, steps):
    kernel = np.zeros((*window, *w.shape[-2:]))
    for index in itertools.product(*(range(n) for n in w.shape[:-2])):
        target = tuple(s + i * d for s, i, d in zip(starts, index, steps))
        kernel[target] = w[index]
    return kernel


@pytest.mark.parametrize(
    ("size", "window", "dilation", "starts"),
    [
        ((3, 3), (3, 3), (1, 1), (0, 0)),
        ((1, 1), (3, 3), (1, 1), (1, 1)),
        ((1, 3), (3, 3), (1, 1), (1, 0)),
        ((3, 1), (5, 3), (2, 1), (0, 1)),
        ((3, 3), (5, 7), (2, 3), (0, 0)),
        ((2, 2), (4, 4), (1, 1), (1, 1)),
        ((3,), (7,), (2,), (1,)),
        ((1, 3, 1), (3, 3, 5), (1, 1, 1), (1, 0, 2)),
        ((), (), (), ()),
    ],
)
def test_place_and_covers_agree_with_loops(size, window, dilation, starts):
    w = np.random.default_rng(0).normal(size=(*size, 2, 3)).astype(np.float32)
    taps = algebra.centred_taps(size, window, dilation)
    assert [t.start for t in taps] == list(starts)
    expected = placed_by_loops(w, window, starts, dilation)
    np.testing.assert_array_equal(algebra.place(jnp.asarray(w), window, taps), expected)
    ones = placed_by_loops(np.ones_like(w), window, starts, dilation)
    np.testing.assert_array_equal(algebra.covers((*window, 2, 3), taps), ones.astype(bool))


@pytest.mark.parametrize(("size", "window"), [((1, 1), (3, 3)), ((1, 3), (3, 3)), ((1,), (5,))])
def test_placing_single_taps_under_every_transformation(x64, size, window):
    """It is a primitive of its own, whose derivatives, batches and programs must be those of `lax.pad`."""
    taps = algebra.centred_taps(size, window, (1,) * len(size))
    rng = np.random.default_rng(0)
    w, v = (jnp.asarray(rng.normal(size=(2, *size, 2, 3))) for _ in range(2))
    g = jnp.asarray(rng.normal(size=(2, *window, 2, 3)))
    pads = [(0, 0, 0), *((t.start, n - t.start - t.count, 0) for t, n in zip(taps, window)), *[(0, 0, 0)] * 2]

    def padded(w):
        return jax.lax.pad(w, jnp.zeros(()), pads)

    def placed(w):
        return jax.vmap(lambda w: algebra.place(w, window, taps))(w)

    def last(w):  # mapped over another axis
        moved = jax.vmap(lambda w: algebra.place(w, window, taps), in_axes=-1, out_axes=-1)
        return jnp.moveaxis(moved(jnp.moveaxis(w, 0, -1)), -1, 0)

    for fn in (placed, jax.jit(placed), jax.checkpoint(placed), last):
        np.testing.assert_array_equal(fn(w), padded(w))
        for found, expected in zip(jax.jvp(fn, (w,), (v,)), jax.jvp(padded, (w,), (v,))):
            np.testing.assert_array_equal(found, expected)
        (adjoint,), (expected,) = (jax.linear_transpose(f, w)(g) for f in (fn, padded))
        np.testing.assert_array_equal(adjoint, expected)

    def curved(fn):
        return jax.grad(lambda w: jnp.vdot(v, jax.grad(lambda w: jnp.sum(jnp.sin(fn(w)) * g))(w)))

    np.testing.assert_allclose(curved(placed)(w), curved(padded)(w), rtol=0, atol=1e-15)


@pytest.mark.parametrize("size", [(2, 2), (4, 1), (0, 1)])
def test_a_kernel_that_cannot_be_centred_is_refused(size):
    with pytest.raises(ValueError, match="cannot be centred in a window of 3 taps"):
        algebra.centred_taps(size, (3, 3), (1, 1))


def test_one_entry_for_each_axis():
    with pytest.raises(ValueError, match="one entry for each spatial axis"):
        algebra.centred_taps((3,), (3, 3), (1, 1))


@pytest.mark.parametrize(
    ("channels", "groups", "window"), [(4, 1, (3, 3)), (6, 2, (3,)), (4, 4, (3, 5)), (5, 1, ())]
)
def test_identity_kernel_returns_its_input(channels, groups, window):
    kernel = algebra.identity(jnp.ones(channels), (*window, channels // groups, channels))
    centre = tuple(n // 2 for n in window)
    for o, i in itertools.product(range(channels), range(channels // groups)):
        group = o // (channels // groups)
        same = group * (channels // groups) + i == o
        assert kernel[(*centre, i, o)] == float(same)
    assert float(jnp.abs(kernel).sum()) == channels  # nothing anywhere else


def test_identity_needs_a_middle_tap():
    with pytest.raises(ValueError, match="cannot be centred in a window of 4"):
        algebra.identity(jnp.ones(2), (4, 3, 2, 2))


def test_average_counts_padding():
    w = jnp.arange(6.0).reshape(1, 1, 2, 3)
    kernel = algebra.average(w, (3, 5))
    chex.assert_shape(kernel, (3, 5, 2, 3))
    np.testing.assert_allclose(kernel[2, 4], w[0, 0] / 15, rtol=tolerances.FEW_OPERATIONS)


def test_bn_affine_is_batch_norm():
    rng = np.random.default_rng(1)
    gamma, beta, mean, x = rng.normal(size=(4, 5))
    var = rng.uniform(0.1, 2, size=5)
    s, b = algebra.bn_affine(gamma, beta, mean, var, eps=1e-3)
    expected = gamma * (x - mean) / np.sqrt(var + 1e-3) + beta
    close = tolerances.FEW_OPERATIONS
    np.testing.assert_allclose(s * x + b, expected, rtol=close, atol=close)


def test_covers_leaves_no_constant_behind():
    """The masks are made in the program from iota: compiled, they are no buffer of the kernel's size."""
    shape = (3, 3, 256, 256)
    taps = algebra.centre_tap(shape[:2])
    text = jax.jit(lambda: algebra.covers(shape, taps)).lower().as_text()
    assert len(text) < 10_000
    assert Taps(1, 1, 1) == taps[0]
