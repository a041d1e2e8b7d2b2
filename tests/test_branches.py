"""Branch sets: every formula against the Jacobian of the merged kernel, for branch sets and stacks drawn at
random."""

import dataclasses
import itertools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from twins import assert_close, jacobian

from repopt_jax.core.branches import (
    AfterPointwise,
    Average,
    Branch,
    BranchSet,
    Identity,
    Kernel,
    Local,
    Pool,
)
from repopt_jax.core.published import default_branches

EXACT = 1e-12  # relative, float64; measured: 5e-15 at most over 500 draws


@st.composite
def branch_sets(draw, mixing=True):
    """A layer of 0 to 3 spatial axes or a stack of such, its groups, and a random set of branches that fit
    it; those that mix taps or channels only with `mixing`."""
    axes = draw(st.integers(0, 3))
    window = tuple(draw(st.sampled_from([1, 3, 5] if axes < 3 else [1, 3])) for _ in range(axes))
    groups = draw(st.sampled_from([1, 2, 4]))
    inputs = draw(st.sampled_from([1, 2])) if groups > 1 else draw(st.integers(1, 4))
    outputs = groups * (inputs if draw(st.booleans()) else draw(st.integers(1, 3)))
    candidates = [Kernel(window)]
    sizes = list(itertools.product(*(range(1, n + 1, 2) for n in window)))
    for size in sizes:
        for dilation in itertools.product(
            *((1, 2) if n == 5 and k == 3 else (1,) for n, k in zip(window, size))
        ):
            candidates.append(Kernel(size, dilation))
    if inputs * groups == outputs:
        candidates.append(Identity())
    if mixing:
        mid = draw(st.integers(1, 3))
        shape = (draw(st.sampled_from([1, groups])), inputs, mid)
        matrix = np.random.default_rng(draw(st.integers(0, 99))).normal(size=shape)
        candidates += [Average(), AfterPointwise(draw(st.sampled_from(sizes)), matrix)]
        candidates += [Pool()] if inputs * groups == outputs else []
    chosen = draw(st.lists(st.sampled_from(candidates), min_size=1, max_size=4, unique_by=lambda b: b.name))
    stack = draw(st.sampled_from([(), (2,), (1, 2)]))
    layout = draw(st.sampled_from(["...io", "oi...", "letters"]))
    kernel = (*window, inputs, outputs) if layout == "...io" else (outputs, inputs, *window)
    if layout == "letters":  # inputs and outputs as two axes each, anywhere
        split = [(n, 2 if n % 2 == 0 else 1) for n in (inputs, outputs)]
        axes = [("s", n) for n in window]
        axes += [(c, size) for c, (n, k) in zip("io", split) for size in (k, n // k)]
        order = draw(st.permutations([letter for letter, _ in axes]))
        parts = {c: iter([n for letter, n in axes if letter == c]) for c in "sio"}
        kernel, layout = tuple(next(parts[c]) for c in order), "".join(order)
    return BranchSet((*stack, *kernel), tuple(chosen), groups, layout, len(stack))


@st.composite
def map_sets(draw):
    """A layer with an output for each position of its window, with branches inside the window."""
    window = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)))
    groups, inputs, maps = (draw(st.integers(1, 2)) for _ in range(3))
    sizes = itertools.product(*(range(1, 2 * n, 2) for n in window))
    candidates = [Kernel(window), Average(), *map(Local, sizes)]
    chosen = draw(st.lists(st.sampled_from(candidates), min_size=1, max_size=3, unique_by=lambda b: b.name))
    kernel = (*window, inputs, groups * maps * math.prod(window))
    return BranchSet(kernel, tuple(chosen), groups)


def draw_scales(branches, seed=0):
    """Random vectors of mixed sign."""
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=branches.vector_shape)) for name in branches.names}


def draw_kernel(branches, seed=0):
    return np.random.default_rng(seed + 1).normal(size=branches.kernel)


@hypothesis.given(branch_sets() | map_sets(), st.integers(0, 2**16))
def test_merge_gradients_and_precondition_against_the_jacobian(branches, seed):
    """K = J w, dL/dw = J^T g and P(g) = J J^T g, with J the Jacobian of the merge made entry by entry: the
    change of K when SGD moves the branches."""

    @jax.jit
    def formulas(weights, scales, g):
        gradients = branches.branch_gradients(g, scales)
        return branches.merge(weights, scales), gradients, branches.precondition(g, scales)

    with jax.enable_x64(True):
        scales, g = draw_scales(branches, seed), draw_kernel(branches, seed)
        rng = np.random.default_rng(seed)
        weights = {name: rng.normal(size=shape) for name, shape in branches.shapes().items()}
        kernel, gradients, p = formulas(weights, scales, g)
        j = jacobian(branches, scales)
        assert {n: v.shape for n, v in gradients.items()} == branches.shapes()
        assert kernel.shape == p.shape == branches.kernel
        assert_close(np.ravel(kernel), j @ side_by_side(branches, weights), EXACT)
        assert_close(side_by_side(branches, gradients), j.T @ g.ravel(), EXACT)
        assert_close(np.ravel(p), j @ (j.T @ g.ravel()), EXACT)


def side_by_side(branches, weights):
    return np.concatenate([np.ravel(weights[name]) for name in branches.names])


@hypothesis.given(branch_sets(mixing=False), st.integers(0, 2**16))
def test_multiplier_is_the_diagonal_and_there_is_nothing_else(branches, seed):
    @jax.jit
    def multipliers(scales):
        return [branches.multiplier(scales, power=power, dtype=jnp.float64) for power in (2, 1)]

    with jax.enable_x64(True):
        scales = draw_scales(branches, seed)
        j = jacobian(branches, scales)
        jjt = j @ j.T
        squares, absolutes = multipliers(scales)
        assert squares.shape == branches.kernel
        np.testing.assert_allclose(np.ravel(squares), np.diag(jjt), rtol=EXACT)
        assert np.abs(jjt - np.diag(np.diag(jjt))).max() == 0
        np.testing.assert_allclose(np.ravel(absolutes), np.abs(j).sum(axis=1), rtol=EXACT)


@hypothesis.given(branch_sets() | map_sets())
def test_json_round_trip(branches):
    assert BranchSet.from_json(branches.to_json()) == branches
    assert hash(BranchSet.from_json(branches.to_json())) == hash(branches)


STACKED = default_branches((2, 3, 3, 3, 4, 4), stacked=2)


def test_a_stack_says_what_one_layer_of_it_is():
    assert STACKED.layer == default_branches((3, 3, 4, 4))
    assert (one := STACKED.layer).layer is one
    assert (STACKED.stack, STACKED.canonical, STACKED.out) == ((2, 3), (3, 3, 4, 4), 4)
    assert STACKED.vector_shape == (2, 3, 4)
    assert STACKED.shapes() == {"3x3": (2, 3, 3, 3, 4, 4), "1x1": (2, 3, 1, 1, 4, 4), "identity": (2, 3, 4)}
    torch = default_branches((5, 8, 2, 3, 1), groups=2, layout="oi...", stacked=1)
    assert (torch.layer.kernel, torch.canonical, torch.vector_shape) == ((8, 2, 3, 1), (3, 1, 2, 8), (5, 8))
    alone = BranchSet((2, 4, 4), (Identity(),), stacked=1)  # no array tells the stack's size
    assert alone.merge({"identity": jnp.ones((2, 4))}, {}).shape == (2, 4, 4)
    np.testing.assert_array_equal(alone.multiplier({}), np.stack([np.eye(4)] * 2))


def test_the_layers_of_a_stack_are_drawn_apart():
    """Each within the bound of its own layer, which a fan-in that counts the stack would not be."""
    weights = jax.jit(STACKED.sample)(jax.random.key(0))
    assert {n: w.shape for n, w in weights.items()} == STACKED.shapes()
    for name, fan_in in (("3x3", 36), ("1x1", 4)):
        layers = np.asarray(weights[name]).reshape(6, -1)
        assert len(np.unique(layers)) == layers.size
        assert 0.8 * fan_in**-0.5 < np.abs(layers).max() <= fan_in**-0.5
    assert (weights["identity"] == 1).all()


def test_scales_of_another_layer_of_the_stack_are_noticed(x64):
    """Negative control: P(g) with the scales of another layer of the stack is another one."""
    scales, g = draw_scales(STACKED), draw_kernel(STACKED)
    expected = STACKED.precondition(g, scales)
    swapped = STACKED.precondition(g, {n: s[::-1] for n, s in scales.items()})
    assert np.abs(swapped - expected).max() > 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("stacked", [-1, 2, 3])
def test_a_stack_that_leaves_no_kernel(stacked):
    with pytest.raises(ValueError, match=r"`stacked` is .*`kernel` \(3, 4, 4\) .* of layers, 0 to 1"):
        BranchSet((3, 4, 4), (Kernel((3,)),), stacked=stacked)


def test_whole_numbers_of_any_library_go_through_a_file():
    kernel = Kernel(np.array([3, 1]), np.array([1, 1]))
    assert kernel == Kernel((3, 1))
    branches = BranchSet(np.array([2, 3, 3, 1, 4]), (kernel,), groups=np.int64(4), stacked=np.int64(1))
    assert BranchSet.from_json(branches.to_json()) == branches


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Kernel((3.0, 3.0)),
            r"`size` is \(3\.0, 3\.0\): it must hold whole numbers, one for each axis",
        ),
        (lambda: Kernel(3), "`size` is 3: it must hold"),
        (lambda: Kernel((3, 3), 2), "`dilation` is 2: it must hold"),
        (lambda: Local("33"), "`size` is '33': it must hold"),
        (
            lambda: BranchSet((3, 3.0, 4, 4), (Kernel((3, 3)),)),
            r"`kernel` is \(3, 3\.0, 4, 4\): it must hold",
        ),
        (lambda: BranchSet((3, 4, 4), (Kernel((3,)),), 2.0), "`groups` is 2.0: it must be a whole number"),
        (lambda: BranchSet((3, 4, 4), (Kernel((3,)),), stacked=1.0), "`stacked` is 1.0: it must be a whole"),
        (
            lambda: BranchSet((3, 4, 4), (Kernel((3,)),), stacked=None),
            "`stacked` is None: it must be a whole",
        ),
    ],
)
def test_sizes_that_no_file_could_hold(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_average_pooling_has_no_elementwise_rule(x64):
    """A negative control: the best elementwise mask is far from P(g) when a branch averages."""
    branches = BranchSet((3, 3, 2, 2), (Kernel((3, 3)), Average()))
    scales = draw_scales(branches)
    assert not branches.elementwise
    with pytest.raises(ValueError, match="average mixes taps or channels and has no elementwise multiplier"):
        branches.multiplier(scales)
    j = jacobian(branches, scales)
    g = draw_kernel(branches).ravel()
    p = j @ (j.T @ g)
    assert np.abs(np.diag(j @ j.T) * g - p).max() / np.abs(p).max() > 0.01


@pytest.mark.parametrize(
    ("kernel", "options", "names"),
    [
        ((3, 3, 8, 8), {}, ("3x3", "1x1", "identity")),
        ((3, 3, 4, 8), {}, ("3x3", "1x1")),
        ((3, 3, 8, 8), {"stride": 2}, ("3x3", "1x1")),
        ((3, 3, 1, 8), {"groups": 8}, ("3x3", "1x1")),
        ((3, 1, 16), {"groups": 8}, ("3", "1")),
        ((1, 1, 1, 8), {"groups": 8}, ("1x1", "identity")),
        ((3, 3, 1, 1), {}, ("3x3", "1x1", "identity")),
        ((3, 3, 2, 8), {"groups": 4}, ("3x3", "1x1", "identity")),
        ((1, 1, 8, 8), {}, ("1x1", "identity")),
        ((8, 8), {}, ("dense", "identity")),
        ((8, 4), {}, ("dense",)),
        ((5, 8, 8), {}, ("5", "1", "identity")),
        ((3, 3, 3, 4, 4), {}, ("3x3x3", "1x1x1", "identity")),
        ((2, 2, 4, 4), {}, ("2x2",)),
        ((8, 8, 3, 3), {"layout": "oi..."}, ("3x3", "1x1", "identity")),
        ((5, 2, 3, 3, 8, 8), {"stacked": 2}, ("3x3", "1x1", "identity")),
        ((8, 2, 4), {"layout": "ioo"}, ("dense", "identity")),
        ((2, 4, 3), {"layout": "oio"}, ("dense",)),
        ((8, 3, 3, 8), {"layout": "isso"}, ("3x3", "1x1", "identity")),
        ((5, 8, 1, 3, 3), {"stacked": 1, "groups": 8, "layout": "oi..."}, ("3x3", "1x1")),
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
        ((3, 3, 4, 8), (Pool(),), 1, "pool does not fit .* as many input as output channels, not 4 and 8"),
        ((2, 3, 4, 4), (Identity(),), 1, "cannot be centred in a window of 2"),
        ((3, 3, 4, 4), (Kernel((5, 5)),), 1, "branch 5x5 does not fit .* cannot be centred"),
        ((3, 3, 4, 4), (Kernel((3, 3)), Kernel((3, 3))), 1, "each name once"),
        ((3, 3, 4, 4), (), 1, "at least one"),
        ((3, 3, 4, 4), (Kernel((3, 3)),), 3, "must divide the 4 output channels"),
        ((4,), (Kernel(()),), 1, "must be a shape"),
        ((3, 3, 1, 8), (Local((3, 3)),), 1, "has 8 outputs in 1 groups, where it needs maps of 9 outputs"),
        ((3, 3, 1, 9), (Local((3, 3)),), 3, "has 9 outputs in 3 groups"),
        ((3, 3, 1, 9), (Local((2, 3)),), 1, "must have an odd side below 2 \\* n"),
        ((3, 1, 1, 3), (Local((3, 3)),), 1, "must have an odd side below 2 \\* n"),
        ((4, 4), (Local(()),), 1, "has no window to be inside of"),
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
    for others in ((), (Average(),)):  # by the multiplier, and by transposition
        branches = BranchSet((1, 1, 1, 2), (Kernel((1, 1)), *others))
        scales = {name: jnp.full((2,), 1e-4, jnp.float16) for name in branches.names}
        update = branches.precondition(g, scales)
        assert update.dtype == jnp.float16
        np.testing.assert_allclose(np.asarray(update, np.float32), 1e-4 * len(scales), rtol=1e-3)


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
    g = draw_kernel(branches)
    j = np.zeros((36, 40))
    j[:, :36] = np.diag(np.tile(scales["3x3"], 18))
    j[:4, 36:] = np.diag(np.tile(scales["corner7"], 2))
    assert_close(np.ravel(branches.precondition(g, scales)), j @ (j.T @ g.ravel()), EXACT)
    del Branch.types["Corner"]


def test_a_branch_has_a_class_name_of_its_own():
    """A file of scales has the name. A class that is defined again in its file takes its own place."""
    with pytest.raises(
        TypeError, match=r"class Average of test_branches .* branch of repopt_jax\.core\.branches,"
    ):
        type("Average", (Pool,), {"__module__": __name__})
    assert Branch.types["Average"] is Average
    _, again = (type("Again", (Pool,), {"__module__": __name__}) for _ in range(2))
    assert Branch.types.pop("Again") is again
