"""The search layer: one merged convolution against its branches run one by one, and against loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from repopt_jax.core import algebra
from repopt_jax.core.branches import (
    AfterPointwise,
    Average,
    Branch,
    BranchSet,
    Identity,
    Kernel,
    default_branches,
)
from repopt_jax.nn import CSLAConv, FrozenScale
from repopt_jax.nn.csla import convolve, per_axis, run_branch

EXACT = 1e-12  # of the largest value, float64; measured: 1.3e-14 at most
WRONG = 0.05  # a wrong layer differs by more than this much of the largest value; measured: 0.19 at least

K33 = (Kernel((3, 3)), Kernel((1, 1)))
MIXING = (Average(), AfterPointwise((3, 3), np.random.default_rng(2).normal(size=(4, 3))))
WIDE = (Kernel((5, 5)), Kernel((3, 3), (2, 2)), Kernel((1, 5)), Identity())

# name -> branch set, options of the layer, spatial shape of the input
LAYERS = {
    "3x3+1x1+identity": (BranchSet((3, 3, 4, 4), (*K33, Identity())), {}, (6, 5)),
    "3x3+1x1": (BranchSet((3, 3, 3, 5), K33), {}, (5, 6)),
    "grouped": (BranchSet((3, 3, 2, 6), (*K33, Identity()), 3), {}, (5, 5)),
    "depthwise": (BranchSet((3, 3, 1, 4), (*K33, Identity()), 4), {}, (5, 5)),
    "strided, even size": (BranchSet((3, 3, 2, 4), K33), {"strides": 2}, (6, 8)),
    "strided, odd size": (BranchSet((3, 3, 2, 4), K33, 2), {"strides": (2, 3)}, (7, 5)),
    "dilated": (BranchSet((3, 3, 4, 4), (*K33, Identity())), {"dilation": 2}, (7, 8)),
    "5x5+3x3 dilated+1x5+identity": (BranchSet((5, 5, 4, 4), WIDE), {}, (8, 7)),
    "those at stride 2, dilated": (
        BranchSet((5, 5, 4, 4), WIDE[:3], 2),
        {"strides": 2, "dilation": (1, 2)},
        (8, 11),
    ),
    "1-D": (default_branches((5, 3, 3)), {}, (9,)),
    "3-D": (default_branches((3, 3, 3, 2, 2)), {}, (4, 3, 5)),
    "dense": (default_branches((5, 5)), {}, ()),
    "uneven padding": (
        BranchSet((3, 3, 4, 4), (*K33, Identity())),
        {"padding": ((0, 2), (1, 0))},
        (6, 6),
    ),
    "average": (BranchSet((3, 3, 4, 4), (*K33, Average(), Identity())), {}, (5, 6)),
    "average, strided, grouped": (BranchSet((3, 5, 2, 4), (Average(),), 2), {"strides": 2}, (6, 8)),
    "average, dilated": (BranchSet((3, 3, 2, 4), (Kernel((3, 3)), Average())), {"dilation": 2}, (7, 6)),
    "circular": (BranchSet((3, 3, 4, 4), (*K33, *MIXING, Identity())), {"pad_mode": "wrap"}, (5, 6)),
    "reflected, strided, dilated": (
        BranchSet((5, 3, 4, 4), (Kernel((5, 3)), *MIXING, Identity())),
        {"pad_mode": "reflect", "strides": (2, 1), "dilation": 2},
        (8, 7),
    ),
    "circular, uneven padding, 1-D": (
        BranchSet((4, 3, 3), (Kernel((4,)), Kernel((2,)))),
        {"pad_mode": "wrap", "padding": ((1, 2),)},
        (6,),
    ),
}


def make_layer(branches, *, form="merged", padding=None, dilation=1, **options):
    """A float64 layer whose weights and scales are random numbers of mixed sign, the same for both forms.

    Built abstractly and then filled, so that nothing is compiled for its own initial draws.
    """
    dilations = per_axis(dilation, len(branches.kernel) - 2)
    half = tuple((n // 2 * d,) * 2 for n, d in zip(branches.kernel, dilations))
    layer = nnx.eval_shape(
        lambda: CSLAConv(
            branches,
            padding=half if padding is None else padding,
            dilation=dilation,
            form=form,
            param_dtype=jnp.float64,
            rngs=nnx.Rngs(0),
            **options,
        )
    )
    rng = np.random.default_rng(0)
    state = nnx.state(layer)
    nnx.update(layer, jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape)), state))
    return layer


def make_input(branches, spatial):
    inputs = branches.kernel[-2] * branches.groups
    return jnp.asarray(np.random.default_rng(1).normal(size=(2, *spatial, inputs)))


def value_and_gradients(layer, x):
    """Outputs, and gradients of a function that weighs them unequally with respect to every parameter and the
    input."""
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def loss(params, x):
        y = nnx.merge(graph, params, rest, copy=True)(x)
        return jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    return y, nnx.to_pure_dict(gradients[0]), gradients[1]


def relative(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


@pytest.mark.parametrize("name", LAYERS)
def test_both_forms_give_the_same_outputs_and_gradients(name, x64):
    branches, options, spatial = LAYERS[name]
    x = make_input(branches, spatial)
    merged = value_and_gradients(make_layer(branches, form="merged", **options), x)
    apart = value_and_gradients(make_layer(branches, form="branches", **options), x)
    assert jax.tree.structure(merged) == jax.tree.structure(apart)
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(apart)):
        assert a.dtype == jnp.float64
        assert a.shape == b.shape
        assert relative(a, b) <= EXACT
    scaled = {b.name for b in branches.branches if b.has_scale}
    assert set(merged[1]["scales"]) == scaled
    assert set(merged[1]["weights"]) == set(branches.names)


def looped_conv(x, kernel, *, strides, offset, dilation, groups, out_shape):
    """Cross-correlation in two dimensions written out: output (p, q) reads x at p * stride + tap * dilation -
    offset."""
    batch, height, width, _ = x.shape
    per_group_in, outputs = kernel.shape[2:]
    per_group_out = outputs // groups
    y = np.zeros((batch, *out_shape, outputs))
    for p, q, o in itertools.product(*map(range, out_shape), range(outputs)):
        first = o // per_group_out * per_group_in
        for a, b, i in itertools.product(range(kernel.shape[0]), range(kernel.shape[1]), range(per_group_in)):
            row = p * strides[0] + a * dilation[0] - offset[0]
            column = q * strides[1] + b * dilation[1] - offset[1]
            if 0 <= row < height and 0 <= column < width:
                y[:, p, q, o] += x[:, row, column, first + i] * kernel[a, b, i, o]
    return y


@pytest.mark.parametrize("form", ["merged", "branches"])
@pytest.mark.parametrize(
    ("outputs", "stride", "groups"), [(4, 1, 1), (4, 1, 2), (4, 1, 4), (6, 2, 2), (4, 2, 1)]
)
def test_agrees_with_loops(form, outputs, stride, groups, x64):
    """s * conv3x3(x) + t * conv1x1(x) + u * x as published: the 3x3 padded by one pixel, the 1x1 by none."""
    branches = default_branches((3, 3, 4 // groups, outputs), groups=groups, stride=stride)
    layer = make_layer(branches, form=form, strides=stride, bias=jnp.zeros(outputs))
    x = np.asarray(make_input(branches, (5, 6)))
    w = {name: np.asarray(value[...]) for name, value in layer.weights.items()}
    s = {name: np.asarray(value[...]) for name, value in layer.scales.items()}
    out_shape = ((5 - 1) // stride + 1, (6 - 1) // stride + 1)
    common = {"strides": (stride,) * 2, "dilation": (1, 1), "groups": groups, "out_shape": out_shape}
    expected = looped_conv(x, w["3x3"], offset=(1, 1), **common) * s["3x3"]
    expected += looped_conv(x, w["1x1"], offset=(0, 0), **common) * s["1x1"]
    assert ("identity" in w) == (stride == 1 and outputs == 4 and groups < 4)
    if "identity" in w:
        expected += w["identity"] * x
    assert relative(layer(jnp.asarray(x)), expected + np.asarray(layer.bias[...])) <= EXACT


def test_dilated_and_thin_branches_agree_with_loops(x64):
    """Branches of a 5x5 layer: each centred where the 5x5 is, whatever its own dilation."""
    branches = BranchSet((5, 5, 2, 2), WIDE)
    layer = make_layer(branches)
    x = np.asarray(make_input(branches, (6, 5)))
    w = {name: np.asarray(value[...]) for name, value in layer.weights.items()}
    s = {name: np.asarray(value[...]) for name, value in layer.scales.items()}
    common = {"strides": (1, 1), "groups": 1, "out_shape": (6, 5)}
    expected = w["identity"] * x
    expected = expected + s["5x5"] * looped_conv(x, w["5x5"], offset=(2, 2), dilation=(1, 1), **common)
    dilated = looped_conv(x, w["3x3_d2x2"], offset=(2, 2), dilation=(2, 2), **common)
    thin = looped_conv(x, w["1x5"], offset=(0, 2), dilation=(1, 1), **common)
    expected = expected + s["3x3_d2x2"] * dilated + s["1x5"] * thin
    assert relative(layer(jnp.asarray(x)), expected) <= EXACT


def wrong_kernels(branches, weights, scales):
    """Merged kernels with one mistake each."""
    u = algebra.identity(weights["identity"], branches.kernel)
    small = algebra.scale_output(branches.branches[1].embed(weights["1x1"], branches.kernel), scales["1x1"])
    right = branches.merge(weights, scales)
    ungrouped = np.zeros(branches.kernel)
    for o in range(
        min(branches.kernel[-2:])
    ):  # input o for output o: forgets that inputs count within a group
        ungrouped[1, 1, o, o] = weights["identity"][o]
    yield "identity off centre", right - u + jnp.roll(u, 1, axis=0)
    yield "1x1 off centre", right - small + jnp.roll(small, -1, axis=1)
    yield "identity as if there were no groups", right - u + ungrouped
    yield "no identity", right - u


def test_wrong_merges_are_noticed(x64):
    """Negative control: the tolerance above is far below what a mistake does."""
    branches, _, spatial = LAYERS["grouped"]
    layer = make_layer(branches, form="branches")
    x = make_input(branches, spatial)
    weights = {name: w[...] for name, w in layer.weights.items()}
    scales = {name: s[...] for name, s in layer.scales.items()}
    options = {"strides": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1)}
    assert relative(convolve(x, layer.merged_kernel(), groups=3, **options), layer(x)) <= EXACT
    for mistake, kernel in wrong_kernels(branches, weights, scales):
        assert relative(convolve(x, kernel, groups=3, **options), layer(x)) > WRONG, mistake


@pytest.mark.parametrize(("mode", "theirs"), [("wrap", "CIRCULAR"), ("reflect", "REFLECT")])
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((3, 5, 2, 4), {}),
        ((3, 3, 2, 4), {"strides": (2, 3), "dilation": (1, 2)}),
        ((5, 4, 4), {"strides": 2}),
    ],
    ids=["2-D", "strided, dilated", "1-D"],
)
def test_kinds_of_padding_are_those_of_flax(mode, theirs, kernel, options, x64):
    """`nnx.Conv` with the merged kernel and a named padding; zeros instead, the negative control, are
    noticed."""
    branches = BranchSet(kernel, (Kernel(kernel[:-2]), Kernel((1,) * (len(kernel) - 2))))
    layer = make_layer(branches, pad_mode=mode, **options)
    theirs = nnx.eval_shape(
        lambda: nnx.Conv(
            *kernel[-2:],
            kernel[:-2],
            strides=options.get("strides", 1),
            kernel_dilation=options.get("dilation", 1),
            padding=theirs,
            use_bias=False,
            param_dtype=jnp.float64,
            rngs=nnx.Rngs(0),
        )
    )
    theirs.kernel.set_value(layer.merged_kernel())
    x = make_input(branches, (7, 8)[: len(kernel) - 2])
    assert relative(layer(x), theirs(x)) <= EXACT
    assert relative(make_layer(branches, **options)(x), theirs(x)) > WRONG


def made_stack(stack=(3,), **options):
    """A float64 layer of stacked ones, filled with random numbers."""
    branches = default_branches((3, 3, 4, 4))
    return make_layer(branches, stack=stack, bias=jnp.zeros((*stack, 4)), **options)


def scanned(layers, x):
    return nnx.scan(lambda x, layer: jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
        x, layers
    )


def one_after_the_other(layers, x, order):
    """The same with a layer of its own for each."""
    graph, state = nnx.split(layers)
    for index in order:
        x = jnp.tanh(nnx.merge(graph, jax.tree.map(lambda a, i=index: a[i], state))(x))
    return x


@pytest.mark.parametrize("form", ["merged", "branches"])
def test_a_stack_runs_under_scan_as_its_layers_do(form, x64):
    layers = made_stack(form=form, pad_mode="wrap")
    x = make_input(layers.branches, (5, 6))
    found = scanned(layers, x)
    assert relative(found, one_after_the_other(layers, x, (0, 1, 2))) <= EXACT
    assert relative(found, one_after_the_other(layers, x, (1, 0, 2))) > WRONG


def test_a_stack_trains_as_its_layers_do(x64):
    """Gradients of every array, and a loss that falls."""
    layers = made_stack()
    graph, state = nnx.split(layers)
    x = make_input(layers.branches, (4, 4))

    def loss(state, run):
        return jnp.mean((run(nnx.merge(graph, state), x) - jnp.cos(jnp.arange(x.size)).reshape(x.shape)) ** 2)

    by_layer = jax.grad(loss)(state, lambda layers, x: one_after_the_other(layers, x, range(3)))
    value, gradients = jax.value_and_grad(loss)(state, scanned)
    for found, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(by_layer)):
        assert relative(found, expected) <= EXACT
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, state, gradients)
    assert loss(moved, scanned) < 0.99 * value


def test_a_stack_s_set_kernels_and_vectors(x64):
    layers = made_stack(stack=(2, 3))
    branches = layers.stacked_branches()
    assert branches == default_branches((2, 3, 3, 3, 4, 4), stacked=2)
    assert layers.branches == branches.layer
    kernels, vectors = layers.merged_kernel(), layers.scale_vectors()
    graph, state = nnx.split(layers)
    for at in np.ndindex(2, 3):
        one = nnx.merge(graph, jax.tree.map(lambda a, at=at: a[at], state))
        assert one.stacked_branches() == one.branches == branches.layer
        assert relative(kernels[at], one.merged_kernel()) <= EXACT
        for name, vector in one.scale_vectors().items():
            np.testing.assert_array_equal(vectors[name][at], vector)


def test_layers_of_a_stack_are_drawn_apart_and_start_where_told():
    given = {"1x1": jnp.arange(6.0).reshape(2, 3), "identity": -jnp.ones((2, 3))}
    layers = CSLAConv(
        default_branches((3, 3, 3, 3)), padding=((1, 1), (1, 1)), stack=(2,), scales=given, rngs=nnx.Rngs(0)
    )
    np.testing.assert_array_equal(layers.scale_vectors()["1x1"], given["1x1"])
    np.testing.assert_array_equal(layers.scale_vectors()["identity"], given["identity"])
    np.testing.assert_array_equal(layers.scale_vectors()["3x3"], np.ones((2, 3)))
    first, second = layers.weights["3x3"][...]
    assert np.abs(first - second).min() > 0


def test_a_stack_made_by_vmap_is_the_same():
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def make(rngs):
        return CSLAConv(default_branches((3, 3, 4, 4)), padding=((1, 1), (1, 1)), rngs=rngs)

    layers = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    assert layers.stacked_branches() == default_branches((2, 3, 3, 4, 4), stacked=1)


def test_arrays_that_are_no_stack_or_not_run_as_one_are_refused(x64):
    layers = nnx.eval_shape(made_stack)
    with pytest.raises(ValueError, match=r"stacked along \(3,\): run it under `nnx.scan` or `nnx.vmap`"):
        layers(jnp.zeros((1, 4, 4, 4)))
    layers.scales["1x1"].set_value(jax.ShapeDtypeStruct((4, 3), jnp.float64))
    message = r"1 misshapen arrays: scales/1x1 \(expected \(3, 4\), found \(4, 3\)\). Layers are stacked"
    with pytest.raises(ValueError, match=message):
        layers.stacked_branches()


def test_searched_scales_are_parameters_and_frozen_ones_are_not(x64):
    branches = default_branches((3, 3, 4, 4))
    searched = nnx.state(make_layer(branches), nnx.Param)
    assert set(searched["scales"]) == {"3x3", "1x1"}
    frozen = make_layer(branches, trainable_scales=False)
    assert set(nnx.to_pure_dict(nnx.state(frozen, nnx.Param))) == {"weights"}
    assert set(nnx.state(frozen, FrozenScale)["scales"]) == {"3x3", "1x1"}
    assert set(nnx.state(frozen, nnx.Param)["weights"]) == {"3x3", "1x1", "identity"}


def test_scales_start_where_told_and_the_identity_s_value_is_its_weight():
    branches = default_branches((3, 3, 2, 2))
    given = {"1x1": jnp.array([2.0, 3.0]), "identity": jnp.array([5.0, -7.0])}
    layer = CSLAConv(branches, padding=((1, 1), (1, 1)), scales=given, rngs=nnx.Rngs(0))
    vectors = layer.scale_vectors()
    assert list(vectors) == ["3x3", "1x1", "identity"]
    np.testing.assert_array_equal(vectors["3x3"], [1, 1])
    np.testing.assert_array_equal(vectors["1x1"], [2, 3])
    np.testing.assert_array_equal(vectors["identity"], [5, -7])
    np.testing.assert_array_equal(layer.weights["identity"][...], [5, -7])


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    branches = default_branches((3, 3, 2, 2))

    def outputs():
        layer = CSLAConv(branches, padding=((1, 1), (1, 1)), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        return layer(jnp.ones((1, 4, 4, 2))), layer.merged_kernel()

    y, kernel = nnx.eval_shape(outputs)
    assert y.dtype == jnp.bfloat16
    assert kernel.dtype == jnp.float32


def test_what_does_not_fit_is_refused():
    branches = default_branches((3, 3, 2, 2))
    options = {"padding": ((1, 1), (1, 1)), "rngs": nnx.Rngs(0)}
    with pytest.raises(ValueError, match="`form` is 'fused': it must be"):
        CSLAConv(branches, form="fused", **options)
    with pytest.raises(ValueError, match="it needs a pair for each of the 2 spatial axes"):
        CSLAConv(branches, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="must be one number or 2"):
        CSLAConv(branches, strides=(1, 2, 1), **options)
    with pytest.raises(ValueError, match=r"stacked along \(5,\): give `branches.layer` and `stack`"):
        CSLAConv(default_branches((5, 3, 3, 2, 2), stacked=1), **options)
    with pytest.raises(ValueError, match="`pad_mode` is 'same': it must be one of constant, wrap, reflect"):
        CSLAConv(branches, pad_mode="same", **options)
    with pytest.raises(ValueError, match="with `pad_mode` 'wrap' nothing can be cut off"):
        CSLAConv(branches, pad_mode="wrap", padding=((1, 1), (0, -1)), rngs=nnx.Rngs(0))
    wrong = {"1x1": jnp.ones(2), "5x5": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match=r"1 extra vectors: 5x5 \(4, 2\); 2 misshapen vectors") as error:
        CSLAConv(branches, stack=(4,), scales=wrong, bias=jnp.ones(2), **options)
    assert "1x1 (expected (4, 2), found (2,)), bias (expected (4, 2), found (2,))" in str(error.value)
    with pytest.raises(ValueError, match=r"layout 'oi...': a Flax layer needs '...io'"):
        CSLAConv(default_branches((2, 2, 3, 3), layout="oi..."), **options)


class Doubled(Branch):
    """A branch that the layer has not heard of."""

    name = "doubled"

    def shape(self, kernel):
        return kernel

    def embed(self, w, kernel):
        return 2 * w


def test_a_branch_type_of_one_s_own_works_merged_and_asks_for_its_branch_form(x64):
    branches = BranchSet((3, 3, 2, 2), (Doubled(),))
    x = make_input(branches, (4, 4))
    layer = make_layer(branches)
    with pytest.raises(TypeError, match="no branch-by-branch form is registered for Doubled"):
        make_layer(branches, form="branches")(x)
    run_branch.register(Doubled, lambda branch, x, w, layer: layer._convolve(x, 2 * w))
    assert relative(make_layer(branches, form="branches")(x), layer(x)) <= EXACT
