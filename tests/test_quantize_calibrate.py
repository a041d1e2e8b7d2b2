"""Histograms of inputs and the ranges that are chosen on them, against sorted values and loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quantize import Chain, random_chain, slow_input

from repopt_jax.quantize import calibrate, find_ranges, run_with_inputs
from repopt_jax.quantize.calibration import (
    BINS,
    CANDIDATES,
    SMOOTHING,
    _counted,
    _histogram,
    entropy_threshold,
    mse_threshold,
    percentile_threshold,
)


def histogram(values):
    return _histogram(*jax.device_get(_counted([jnp.asarray(values, jnp.float32)])))


def heavy(seed=0, count=20_000, signed=False):
    """Values with a heavy tail; not signed ones are what a ReLU leaves, half of them zero."""
    x = np.random.default_rng(seed).standard_t(3, count).astype(np.float32)
    return x if signed else np.maximum(x, 0)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
@settings(deadline=None, max_examples=25)
def test_histograms_add_up_whatever_the_parts(seed, parts):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=600) * 10.0 ** rng.uniform(-6, 6, 600)
    values = values.astype(np.float32)
    whole = histogram(values)
    added = sum(
        (histogram(part) for part in np.array_split(values, parts)[1:]),
        start=histogram(np.array_split(values, parts)[0]),
    )
    assert (added.low, added.high, added.exponent) == (whole.low, whole.high, whole.exponent)
    np.testing.assert_array_equal(added.counts, whole.counts)
    assert added.square_sum == pytest.approx(whole.square_sum, rel=1e-5)
    assert whole.count == 600
    assert whole.low == values.min()
    assert whole.high == values.max()
    edges = np.arange(BINS + 1) * whole.width
    np.testing.assert_array_equal(whole.counts, np.histogram(np.abs(values), edges)[0])
    assert edges[-1] > whole.largest >= edges[-1] / 2


def test_histograms_of_zeros_and_of_very_different_sizes():
    zeros = histogram(np.zeros(5))
    assert (zeros.largest, zeros.counts[0], zeros.count) == (0, 5, 5)
    both = zeros + histogram(np.full(3, 1e15))
    assert both.counts[0] == 5
    assert both.count == 8
    assert all(value == (0.0, 0.0) for value in find_ranges({"x": zeros}, "mse").values())
    for method in ("abs-max", "percentile", "entropy", "mse"):
        assert find_ranges({"x": zeros}, method)["x"] == (0.0, 0.0)


def test_calibration_counts_what_the_layers_are_given():
    model, x = random_chain(dtype=jnp.float32)
    found = calibrate(model, x, batch_size=3)
    _, inputs = run_with_inputs(model, x)
    assert list(found) == ["first", "head", "second"]
    for path, one in found.items():
        values = np.asarray(inputs[path][0])
        assert one.count == values.size
        assert one.low == pytest.approx(values.min(), rel=1e-5)
        assert one.high == pytest.approx(values.max(), rel=1e-5)
        assert one.mean_square == pytest.approx(np.square(values).mean(), rel=1e-4)
    again = calibrate(model, iter([x[:5], x[5:]]))
    np.testing.assert_array_equal(again["first"].counts, found["first"].counts)


def test_calibration_does_not_write_to_the_network():
    model, x = random_chain(dtype=jnp.float32)
    assert isinstance(model, Chain)
    before = np.asarray(model(x))
    calibrate(model, x)
    np.testing.assert_array_equal(model(x), before)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("percentile", [90, 99.9, 99.99, 100])
def test_percentiles_are_those_of_sorted_values(signed, percentile):
    values = heavy(signed=signed)
    one = histogram(values)
    got = percentile_threshold(one, percentile=percentile)
    ordered = np.sort(np.abs(values))
    wanted = ordered[math.ceil(len(values) * percentile / 100 * (1 - 1e-12)) - 1]
    assert wanted <= got <= wanted + one.width
    low, high = find_ranges({"x": one}, "percentile", percentile=percentile)["x"]
    assert high == min(got, one.high)
    assert low == (max(-got, one.low) if signed else 0)


@pytest.mark.parametrize(
    ("bits", "signed"),
    tiers.often([(bits, signed) for bits in (8, 4, 2) for signed in (False, True)], (8, False), (2, True)),
)
def test_the_mse_threshold_is_the_best_of_the_values_themselves(bits, signed):
    values = heavy(signed=signed)
    one = histogram(values)

    def error(threshold):
        low, high = one.clipped(threshold)
        return np.square(slow_input(values.astype(np.float64), low, high, bits) - values).mean()

    tried = [one.largest * k / CANDIDATES for k in range(8, CANDIDATES + 1, 8)]
    got = error(mse_threshold(one, levels=2**bits - 1))
    assert got <= 1.02 * min(map(error, tried))
    if bits < 8:  # clipping a heavy tail pays
        assert error(one.largest) > 2 * got


def slow_entropy_threshold(one, levels):
    """TensorRT's method by loops over the same histogram and the same candidates."""
    counts = [float(c) for c in one.counts]
    counts[0] = counts[1]
    used = max(k for k, c in enumerate(one.counts) if c) + 1
    groups = levels // 2 if one.low < 0 < one.high else levels
    found = []
    for bins in range(used, groups - 1, -max(1, (used - groups) // CANDIDATES)):
        p = counts[:bins]
        p[-1] += sum(counts[bins:])
        q = [0.0] * bins
        for g in range(groups):
            members = [k for k in range(bins) if k * groups // bins == g and counts[k] > 0]
            for k in members:
                q[k] = sum(counts[k] for k in members) / len(members)
        p, q = ([(1 - SMOOTHING) * v / sum(d) + SMOOTHING / bins for v in d] for d in (p, q))
        divergence = sum(a * math.log(a / b) for a, b in zip(p, q))
        found.append((divergence, min(bins * one.width, one.largest)))
    return min(found)[1]


def test_the_entropy_threshold_is_that_of_loops(monkeypatch):
    monkeypatch.setattr("repopt_jax.quantize.calibration.CANDIDATES", 12)
    monkeypatch.setitem(globals(), "CANDIDATES", 12)
    for signed in (False, True):
        one = histogram(heavy(1, signed=signed))
        got = entropy_threshold(one, levels=15)
        assert got == slow_entropy_threshold(one, 15)
        assert got < one.largest


def test_methods_differ_where_there_are_outliers():
    values = heavy(2)
    values[7] = 500.0
    one = {"x": histogram(values)}
    ranges = {m: find_ranges(one, m, levels=255)["x"][1] for m in ("abs-max", "percentile", "entropy", "mse")}
    assert ranges["abs-max"] == 500
    assert ranges["percentile"] < 50
    assert ranges["entropy"] < 50
    # One value of 20,000 costs more if it is clipped than 255 coarse steps do.
    assert ranges["mse"] > 450
