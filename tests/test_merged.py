"""Layers without norms: merged before they run, branch by branch, in stacks, against the slow reference."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow_structures
import tiers
from flax import nnx
from networks import abstract, assert_close, randomised, relative
from slow_structures import arrays_of, image

from repopt_jax import (
    AfterPointwise,
    Average,
    Branch,
    BranchSet,
    Geometry,
    Identity,
    Kernel,
    default_branches,
)
from repopt_jax.core import algebra
from repopt_jax.core.published import of_branches, repopt
from repopt_jax.nn import Branched, FrozenScale, Merged
from repopt_jax.nn.branched import run_map
from repopt_jax.nn.geometry import convolve

EXACT = 1e-12  # of the largest value, float64; measured: 2e-14 at most
WRONG = 0.05  # a wrong layer differs by more than this much of the largest value; measured: 0.1 at least

K33 = (Kernel((3, 3)), Kernel((1, 1)))
MIXING = (Average(), AfterPointwise((3, 3), np.random.default_rng(2).normal(size=(4, 3))))
WIDE = (Kernel((5, 5)), Kernel((3, 3), (2, 2)), Kernel((1, 5)), Identity())

# Name -> geometry, branches. The branches of a search and of published blocks are in `test_structure`.
LAYERS = {
    "5x5+3x3 dilated+1x5+identity": (Geometry((5, 5), 4, 4), WIDE),
    "those at stride 2, dilated": (Geometry((5, 5), 4, 4, 2, strides=2, dilation=(1, 2)), WIDE[:3]),
    "strides of their own": (Geometry((3, 3), 4, 4, 2, strides=(2, 3)), K33),
    "average": (Geometry((3, 3), 4, 4), (*K33, Average(), Identity())),
    "average, strided, grouped": (Geometry((3, 5), 4, 4, 2, strides=2), (Average(),)),
    "average, dilated": (Geometry((3, 3), 2, 4, dilation=2), (Kernel((3, 3)), Average())),
    "fixed 1x1 a group": (
        Geometry((3, 3), 4, 6, 2),
        (Kernel((3, 3)), AfterPointwise((1, 3), np.random.default_rng(2).normal(size=(2, 2, 3)))),
    ),
    "circular": (Geometry((3, 3), 4, 4, pad_mode="wrap"), (*K33, *MIXING, Identity())),
    "reflected, strided, dilated": (
        Geometry((5, 3), 4, 4, strides=(2, 1), dilation=2, pad_mode="reflect"),
        (Kernel((5, 3)), *MIXING, Identity()),
    ),
    "even, circular, uneven padding": (
        Geometry((4,), 3, 3, padding=((1, 2),), pad_mode="wrap"),
        (Kernel((4,)), Kernel((2,))),
    ),
    "padding that cuts off": (Geometry((3, 3), 4, 4, padding=((-1, 2), (1, -1))), (*K33, Identity())),
}
PLAIN = Geometry((3, 3), 4, 4)


def made(structure, kind=Merged, **options):
    """A float64 layer whose every array is a random number, the same for both kinds."""
    return randomised(abstract(kind, structure, param_dtype=jnp.float64, **options))


@jax.jit
def value_and_gradients(layer, x):
    """Outputs, and the gradients of an uneven function of them by every parameter and by the input."""

    def loss(layer, x):
        y = layer(x)
        return jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

    (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)
    return y, gradients


# Their kinds are in the others, with something else.
SELDOM = ("strides of their own", "average")


@pytest.mark.parametrize("name", tiers.seldom(LAYERS, *SELDOM))
def test_both_ways_give_the_same_outputs_and_gradients(name, x64):
    layer, branches = LAYERS[name]
    structure, x = of_branches(branches, layer), jnp.asarray(image(layer, size=6))
    merged, branched = (made(structure, kind, bias=jnp.zeros(layer.outputs)) for kind in (Merged, Branched))
    (y, (found, by_input)), (y_branched, (expected, expected_by_input)) = (
        value_and_gradients(m, x) for m in (merged, branched)
    )
    reference, _ = slow_structures.run(structure, arrays_of(merged), np.asarray(x))
    reference = reference + np.asarray(merged.bias[...])
    assert_close([y, y_branched], [reference, reference], EXACT)
    found, expected = (nnx.to_pure_dict(nnx.state(g)) for g in (found, expected))
    assert_close([found, by_input], [expected, expected_by_input], EXACT)
    assert y.dtype == jnp.float64
    assert set(found["weights"]) == {b.name for b in branches}
    assert set(found["scales"]) == {b.name for b in branches if b.has_scale}


def wrong_kernels(branches, weights, scales):
    """Merged kernels with one mistake each."""
    u = algebra.identity(weights["identity"], branches.kernel)
    small = algebra.scale_output(branches.branches[1].embed(weights["1x1"], branches.kernel), scales["1x1"])
    right = branches.merge(weights, scales)
    ungrouped = np.zeros(branches.kernel)
    # Input o for output o: forgets that inputs count within a group.
    for o in range(min(branches.kernel[-2:])):
        ungrouped[1, 1, o, o] = weights["identity"][o]
    yield "identity off centre", right - u + jnp.roll(u, 1, axis=0)
    yield "1x1 off centre", right - small + jnp.roll(small, -1, axis=1)
    yield "identity as if there were no groups", right - u + ungrouped
    yield "no identity", right - u


def test_wrong_merges_are_noticed(x64):
    """Negative control: the tolerance above is far below what a mistake does."""
    geometry = Geometry((3, 3), 6, 6, 3)
    layer = made(repopt(geometry), Branched)
    x = jnp.asarray(image(geometry))
    expected = layer(x)
    weights, scales = ({name: v[...] for name, v in d.items()} for d in (layer.weights, layer.scales))
    assert relative(convolve(x, layer.kernel_and_bias()[0], geometry), expected) <= EXACT
    for mistake, kernel in wrong_kernels(layer.structure.branch_set(), weights, scales):
        assert relative(convolve(x, kernel, geometry), expected) > WRONG, mistake


@pytest.mark.parametrize(("mode", "theirs"), [("wrap", "CIRCULAR"), ("reflect", "REFLECT")])
@pytest.mark.parametrize(
    ("window", "options"),
    [((3, 5), {}), ((3, 3), {"strides": (2, 3), "dilation": (1, 2)}), ((5,), {"strides": 2})],
    ids=["2-D", "strided, dilated", "1-D"],
)
def test_pad_modes_are_those_of_flax(mode, theirs, window, options, x64):
    """`nnx.Conv` with the merged kernel and a named padding; zeros instead, the negative control, are
    noticed."""
    layer = Geometry(window, 2, 4, pad_mode=mode, **options)
    merged = made(repopt(layer))
    conv = abstract(
        nnx.Conv,
        2,
        4,
        window,
        strides=options.get("strides", 1),
        kernel_dilation=options.get("dilation", 1),
        padding=theirs,
        use_bias=False,
        param_dtype=jnp.float64,
    )
    conv.kernel.set_value(merged.merged_kernel())
    x = jnp.asarray(image(layer, size=7))
    assert relative(merged(x), conv(x)) <= EXACT
    assert relative(made(repopt(Geometry(window, 2, 4, **options)))(x), conv(x)) > WRONG


# --- Stacks.


def made_stack(kind=Merged, stack=(3,), layer=PLAIN):
    return made(repopt(layer), kind, stack=stack, bias=jnp.zeros((*stack, layer.outputs)))


def scanned(layers, x):
    return nnx.scan(lambda x, layer: jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
        x, layers
    )


def one_by_one(layers, x, order=(0, 1, 2)):
    """The same with a layer of its own for each."""
    graph, state = nnx.split(layers)
    for index in order:
        x = jnp.tanh(nnx.merge(graph, jax.tree.map(lambda a, i=index: a[i], state))(x))
    return x


@pytest.mark.parametrize("kind", [Merged, Branched])
def test_a_stack_runs_under_scan_as_its_layers_do(kind, x64):
    layer = Geometry((3, 3), 4, 4, pad_mode="wrap")
    layers, x = made_stack(kind, layer=layer), jnp.asarray(image(layer))
    found = scanned(layers, x)
    assert relative(found, one_by_one(layers, x)) <= EXACT
    assert relative(found, one_by_one(layers, x, (1, 0, 2))) > WRONG


def test_a_stack_trains_as_its_layers_do(x64):
    """Gradients of every array, and a loss that falls."""
    layers, x = made_stack(), jnp.asarray(image(PLAIN))
    target = jnp.cos(jnp.arange(x.size)).reshape(x.shape)

    @jax.jit
    def of_both(layers):
        by_layer = jax.grad(lambda layers: jnp.mean((one_by_one(layers, x) - target) ** 2))(layers)
        loss = lambda layers: jnp.mean((scanned(layers, x) - target) ** 2)  # noqa: E731
        value, gradients = jax.value_and_grad(loss)(layers)
        moved = jax.tree.map(lambda p, g: p - 0.1 * g, layers, gradients)
        return nnx.state(gradients), nnx.state(by_layer), value, loss(moved)

    gradients, by_layer, before, after = of_both(layers)
    assert_close(nnx.to_pure_dict(gradients), nnx.to_pure_dict(by_layer), EXACT)
    assert after < 0.99 * before


def test_a_stack_s_set_kernels_and_vectors(x64):
    layers = made_stack(stack=(2, 3))
    assert layers.stack == (2, 3)
    assert layers.branch_set() == default_branches((2, 3, 3, 3, 4, 4), stacked=2)
    kernels, vectors = layers.merged_kernel(), layers.vectors()
    graph, state = nnx.split(layers)
    for at in np.ndindex(2, 3):
        one = nnx.merge(graph, jax.tree.map(lambda a, at=at: a[at], state))
        assert one.stack == ()
        assert one.branch_set() == layers.branch_set().layer == default_branches((3, 3, 4, 4))
        assert relative(kernels[at], one.merged_kernel()) <= EXACT
        chex.assert_trees_all_equal(one.vectors(), {name: v[at] for name, v in vectors.items()})


def test_layers_of_a_stack_are_drawn_apart_and_start_at_the_given_values():
    given = {"1x1": jnp.arange(8.0).reshape(2, 4), "identity": -jnp.ones((2, 4))}
    layers = Merged(repopt(PLAIN), stack=(2,), values=given, rngs=nnx.Rngs(0))
    chex.assert_trees_all_equal(layers.vectors(), given | {"3x3": jnp.ones((2, 4))})
    first, second = layers.weights["3x3"][...]
    assert np.abs(first - second).min() > 0


@pytest.mark.parametrize("kind", [Merged, Branched])
def test_a_stack_made_by_vmap_is_the_same(kind):
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def make(rngs):
        return kind(repopt(PLAIN), rngs=rngs)

    made = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    stacked = nnx.eval_shape(lambda: kind(repopt(PLAIN), stack=(2,), rngs=nnx.Rngs(0)))
    assert made.stack == (2,)
    chex.assert_trees_all_equal_shapes_and_dtypes(nnx.state(made), nnx.state(stacked))


def test_arrays_that_are_no_stack_or_not_run_as_one_are_refused(x64):
    layers = nnx.eval_shape(made_stack)
    with pytest.raises(ValueError, match=r"stacked along \(3,\): run it under `nnx.scan` or `nnx.vmap`"):
        layers(jnp.zeros((1, 4, 4, 4)))
    layers.scales["1x1"].set_value(jax.ShapeDtypeStruct((4, 3), jnp.float64))
    message = r"1 misshapen arrays: scales/1x1 \(expected \(3, 4\), found \(4, 3\)\). Layers are stacked"
    with pytest.raises(ValueError, match=message):
        layers.branch_set()


# --- Arrays.


def test_searched_scales_are_parameters_and_constant_ones_are_not():
    searched = nnx.state(abstract(Merged, repopt(PLAIN)), nnx.Param)
    assert set(searched["scales"]) == {"3x3", "1x1"}
    constant = abstract(Merged, repopt(PLAIN).with_constants())
    assert set(nnx.to_pure_dict(nnx.state(constant, nnx.Param))) == {"weights"}
    assert set(nnx.state(constant, FrozenScale)["scales"]) == {"3x3", "1x1"}
    assert set(nnx.state(constant, nnx.Param)["weights"]) == {"3x3", "1x1", "identity"}


def test_scales_start_at_the_given_values_and_the_identity_s_is_its_weight():
    given = {"1x1": jnp.arange(4.0), "identity": jnp.array([5.0, -7.0, 0.0, 1.0])}
    layer = Merged(repopt(PLAIN), values=given, rngs=nnx.Rngs(0))
    assert list(layer.vectors()) == ["3x3", "1x1", "identity"]
    chex.assert_trees_all_equal(layer.vectors(), given | {"3x3": jnp.ones(4)})
    np.testing.assert_array_equal(layer.weights["identity"][...], given["identity"])


@pytest.mark.parametrize("kind", [Merged, Branched])
def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(kind):
    def outputs():
        layer = kind(repopt(PLAIN), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        return layer(jnp.ones((1, 4, 4, 4))), layer.kernel_and_bias()[0]

    y, kernel = nnx.eval_shape(outputs)
    assert (y.dtype, kernel.dtype) == (jnp.bfloat16, jnp.float32)


def test_vectors_that_do_not_fit_are_listed_at_once():
    """Other refusals are in `test_structure`."""
    wrong = {"1x1": jnp.ones(4), "5x5": jnp.ones((2, 4))}
    with pytest.raises(ValueError, match=r"1 extra vectors: 5x5 \(2, 4\); 2 misshapen vectors") as error:
        Merged(repopt(PLAIN), stack=(2,), values=wrong, bias=jnp.ones(4), rngs=nnx.Rngs(0))
    assert "1x1 (expected (2, 4), found (4,)), bias (expected (2, 4), found (4,))" in str(error.value)


class Doubled(Branch):
    """A branch that the layer has not heard of."""

    name = "doubled"

    def shape(self, kernel):
        return kernel

    def embed(self, w, kernel):
        return 2 * w


def test_a_kind_of_branch_of_one_s_own_runs_by_its_kernel_or_as_registered(x64):
    structure, x = of_branches([Doubled()], PLAIN), jnp.asarray(image(PLAIN))
    merged, branched = (made(structure, kind) for kind in (Merged, Branched))
    expected = merged(x)
    assert isinstance(merged.branch_set(), BranchSet)
    assert relative(branched(x), expected) <= EXACT
    run_map.register(Doubled, lambda m, x, w, layer, precision: convolve(x, 6 * w, layer))
    assert relative(branched(x), 3 * expected) <= EXACT
