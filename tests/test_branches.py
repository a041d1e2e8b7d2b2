"""Branch sets: every formula against the Jacobian of the merged kernel, for branch sets drawn at random."""

import dataclasses
import itertools
import os

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from repopt_jax.branches import Average, Branch, BranchSet, Identity, Kernel, default_branches

EXACT = 1e-12  # relative, float64; measured: 5e-15 at most over 500 draws

# Every draw compiles anew, so the ordinary suite takes few; `REPOPT_EXAMPLES=500 pytest
# tests/test_branches.py` takes more.
hypothesis.settings.register_profile(
    "repopt", deadline=None, max_examples=int(os.environ.get("REPOPT_EXAMPLES", "8")), derandomize=True
)
hypothesis.settings.load_profile("repopt")


@st.composite
def branch_sets(draw, averaging=True):
    """A layer of 0 to 3 spatial axes, its groups, and a random set of branches that fit it."""
    axes = draw(st.integers(0, 3))
    window = tuple(draw(st.sampled_from([1, 3, 5] if axes < 3 else [1, 3])) for _ in range(axes))
    groups = draw(st.sampled_from([1, 2, 4]))
    inputs = draw(st.sampled_from([1, 2])) if groups > 1 else draw(st.integers(1, 4))
    outputs = groups * (inputs if draw(st.booleans()) else draw(st.integers(1, 3)))
    candidates = [Kernel(window)]
    for size in itertools.product(*(range(1, n + 1, 2) for n in window)):
        for dilation in itertools.product(
            *((1, 2) if n == 5 and k == 3 else (1,) for n, k in zip(window, size))
        ):
            candidates.append(Kernel(size, dilation))
    if inputs * groups == outputs:
        candidates.append(Identity())
    if averaging:
        candidates.append(Average())
    chosen = draw(st.lists(st.sampled_from(candidates), min_size=1, max_size=4, unique_by=lambda b: b.name))
    kernel = (*window, inputs, outputs)
    if draw(st.booleans()):
        return BranchSet((outputs, inputs, *window), tuple(chosen), groups, "oi...")
    return BranchSet(kernel, tuple(chosen), groups)


def draw_scales(branches, seed=0):
    """Random vectors of mixed sign."""
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=branches.out)) for name in branches.names}


def jacobian(branches, scales):
    """dK/dw for all branch tensors side by side: (size of K, number of branch weights)."""
    weights = branches.sample(jax.random.key(0), dtype=jnp.float64)
    parts = jax.jacobian(lambda w: branches.merge(w, scales).ravel())(weights)
    return np.concatenate([np.reshape(parts[n], (parts[n].shape[0], -1)) for n in branches.names], axis=1)


@hypothesis.given(branch_sets(), st.integers(0, 2**16))
def test_precondition_is_jjt(branches, seed):
    """P = J J^T with J the Jacobian of the merge: the change of K when SGD moves the branches."""
    with jax.enable_x64(True):
        scales = draw_scales(branches, seed)
        g = jnp.asarray(np.random.default_rng(seed + 1).normal(size=branches.kernel))
        j = jacobian(branches, scales)
        expected = (j @ (j.T @ np.ravel(g))).reshape(branches.kernel)
        found = branches.precondition(g, scales)
        np.testing.assert_allclose(found, expected, rtol=EXACT, atol=EXACT * np.abs(expected).max() + 1e-300)


@hypothesis.given(branch_sets(averaging=False), st.integers(0, 2**16))
def test_multiplier_is_the_diagonal_and_there_is_nothing_else(branches, seed):
    with jax.enable_x64(True):
        scales = draw_scales(branches, seed)
        j = jacobian(branches, scales)
        jjt = j @ j.T
        m = np.ravel(branches.multiplier(scales, dtype=jnp.float64))
        np.testing.assert_allclose(m, np.diag(jjt), rtol=EXACT)
        assert np.abs(jjt - np.diag(np.diag(jjt))).max() == 0
        power1 = np.ravel(branches.multiplier(scales, power=1, dtype=jnp.float64))
        np.testing.assert_allclose(power1, np.abs(j).sum(axis=1), rtol=EXACT)


@hypothesis.given(branch_sets(), st.integers(0, 2**16))
def test_branch_gradients_are_the_chain_rule(branches, seed):
    with jax.enable_x64(True):
        scales = draw_scales(branches, seed)
        g = jnp.asarray(np.random.default_rng(seed).normal(size=branches.kernel))
        weights = branches.sample(jax.random.key(seed), dtype=jnp.float64)
        expected = jax.grad(lambda w: jnp.vdot(branches.merge(w, scales), g))(weights)
        found = branches.branch_gradients(g, scales)
        assert {n: v.shape for n, v in found.items()} == branches.shapes()
        for name in branches.names:
            np.testing.assert_allclose(found[name], expected[name], rtol=EXACT, atol=EXACT)


@hypothesis.given(branch_sets())
def test_json_round_trip(branches):
    assert BranchSet.from_json(branches.to_json()) == branches
    assert hash(BranchSet.from_json(branches.to_json())) == hash(branches)


def test_average_pooling_has_no_elementwise_rule(x64):
    """A negative control: the best elementwise mask is far from P(g) when a branch averages."""
    branches = BranchSet((3, 3, 2, 2), (Kernel((3, 3)), Average()))
    scales = draw_scales(branches)
    assert not branches.elementwise
    with pytest.raises(ValueError, match="average mixes taps or channels and has no elementwise multiplier"):
        branches.multiplier(scales)
    j = jacobian(branches, scales)
    g = np.random.default_rng(0).normal(size=branches.kernel).ravel()
    p = j @ (j.T @ g)
    assert np.abs(np.diag(j @ j.T) * g - p).max() / np.abs(p).max() > 0.01


@pytest.mark.parametrize(
    ("kernel", "options", "names"),
    [
        ((3, 3, 8, 8), {}, ("3x3", "1x1", "identity")),
        ((3, 3, 4, 8), {}, ("3x3", "1x1")),
        ((3, 3, 8, 8), {"stride": 2}, ("3x3", "1x1")),
        ((3, 3, 1, 8), {"groups": 8}, ("3x3", "1x1", "identity")),
        ((3, 3, 2, 8), {"groups": 4}, ("3x3", "1x1", "identity")),
        ((1, 1, 8, 8), {}, ("1x1", "identity")),
        ((8, 8), {}, ("dense", "identity")),
        ((8, 4), {}, ("dense",)),
        ((5, 8, 8), {}, ("5", "1", "identity")),
        ((3, 3, 3, 4, 4), {}, ("3x3x3", "1x1x1", "identity")),
        ((2, 2, 4, 4), {}, ("2x2",)),
        ((8, 8, 3, 3), {"layout": "oi..."}, ("3x3", "1x1", "identity")),
    ],
)
def test_default_branches(kernel, options, names):
    assert default_branches(kernel, **options).names == names


@pytest.mark.parametrize(
    ("kernel", "branches", "groups", "message"),
    [
        (
            (3, 3, 4, 8),
            (Identity(),),
            1,
            "identity does not fit .* as many input as output channels, not 4 and 8",
        ),
        ((2, 3, 4, 4), (Identity(),), 1, "cannot be centred in a window of 2"),
        ((3, 3, 4, 4), (Kernel((5, 5)),), 1, "branch 5x5 does not fit .* cannot be centred"),
        ((3, 3, 4, 4), (Kernel((3, 3)), Kernel((3, 3))), 1, "each name once"),
        ((3, 3, 4, 4), (), 1, "at least one"),
        ((3, 3, 4, 4), (Kernel((3, 3)),), 3, "must divide the 4 output channels"),
        ((4,), (Kernel(()),), 1, "must be a shape"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(kernel, branches, groups, message):
    with pytest.raises(ValueError, match=message):
        BranchSet(kernel, branches, groups)


def test_unknown_layout_and_branch_type():
    with pytest.raises(ValueError, match=r"must be '\.\.\.io' or 'oi"):
        BranchSet((3, 3, 2, 2), (Kernel((3, 3)),), layout="hwio")
    text = BranchSet((3, 3, 2, 2), (Kernel((3, 3)),)).to_json().replace('"Kernel"', '"Wavelet"')
    with pytest.raises(ValueError, match="unknown branch type 'Wavelet'"):
        BranchSet.from_json(text)


def test_draws_follow_the_branch_s_own_layer():
    """uniform(-b, b), b = 1/sqrt(fan_in): its standard deviation is b/sqrt(3); the identity starts at one."""
    branches = default_branches((3, 3, 64, 64))
    weights = branches.sample(jax.random.key(0))
    for name, fan_in in (("3x3", 9 * 64), ("1x1", 64)):
        w = np.asarray(weights[name])
        assert np.abs(w).max() <= fan_in**-0.5
        assert np.std(w) == pytest.approx((3 * fan_in) ** -0.5, rel=0.05)  # 4096 draws: 1.6 % per sigma
    assert (weights["identity"] == 1).all()


def test_half_precision_gradients_meet_scales_squared_in_float32():
    """1e-4 has no square in float16: the scale must be cast up before it is squared."""
    branches = BranchSet((1, 1, 1, 2), (Kernel((1, 1)),))
    g = jnp.full(branches.kernel, 1e4, jnp.float16)
    update = branches.precondition(g, {"1x1": jnp.full((2,), 1e-4, jnp.float32)})
    assert update.dtype == jnp.float16
    np.testing.assert_allclose(np.asarray(update, np.float32), 1e-4, rtol=1e-3)


def test_a_branch_of_one_s_own_is_one_class(x64):
    """Its shape and its embedding; merging, P(g), the multiplier and the file format follow."""

    @dataclasses.dataclass(frozen=True)
    class Corner(Branch):
        """A 1x1 kernel on the first tap, as after a shift of the image."""

        axis: int = 0

        @property
        def name(self):
            return f"corner{self.axis}"

        def shape(self, kernel):
            return kernel[-2:]

        def embed(self, w, kernel):
            return jnp.zeros(kernel, w.dtype).at[0, 0].set(w)

        def support(self, kernel):
            return self.embed(jnp.ones(kernel[-2:]), kernel) > 0

    branches = BranchSet((3, 3, 2, 2), (Kernel((3, 3)), Corner(7)))
    assert BranchSet.from_json(branches.to_json()) == branches
    scales = draw_scales(branches)
    g = jnp.asarray(np.random.default_rng(0).normal(size=branches.kernel))
    j = jacobian(branches, scales)
    expected = (j @ (j.T @ np.ravel(g))).reshape(branches.kernel)
    np.testing.assert_allclose(branches.precondition(g, scales), expected, rtol=EXACT)
    del Branch.types["Corner"]
