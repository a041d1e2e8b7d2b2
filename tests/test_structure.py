"""Structures: every published description, and drawn ones, run branch by branch and merged, against the slow
reference of `slow_structures`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import slow_structures
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from repopt_jax import Geometry, Identity, Kernel, Pool, Stage, Structure, nn
from repopt_jax.core.branches import Average
from repopt_jax.core.structure import (
    STRUCTURES,
    acnet,
    dbb,
    mobileone,
    of_branches,
    qarepvgg,
    replknet,
    repopt,
    repopt_ghost,
    repvgg,
    unireplknet,
)
from repopt_jax.surgery.fuse import fuse

# Largest difference, relative to the largest output, in float64. Measured: at most 3e-15.
EXACT = 1e-12
# What a mistake must change at least; measured: 2e-2 and more.
MISTAKE = 1e-3

LAYERS = {
    "plain": Geometry((3, 3), 6, 6),
    "wider": Geometry((3, 3), 4, 8),
    "strided": Geometry((3, 3), 6, 6, strides=2),
    "grouped": Geometry((3, 3), 4, 8, 2),
    "depthwise": Geometry((3, 3), 6, 6, 6),
    "depthwise, strided": Geometry((5, 5), 4, 4, 4, strides=2),
    "dilated": Geometry((3, 3), 4, 4, dilation=2),
    "dilated, strided, grouped": Geometry((3, 3), 4, 4, 2, strides=2, dilation=2),
    "pads of its own": Geometry((3, 3), 4, 4, padding=((0, 2), (2, 1))),
    "circular": Geometry((3, 3), 4, 4, pad_mode="wrap"),
    "reflected": Geometry((3, 3), 4, 4, pad_mode="reflect"),
    "1-D": Geometry((5,), 4, 4),
    "3-D": Geometry((3, 3, 3), 2, 2),
    "1x1": Geometry((1, 1), 4, 4),
    "dense": Geometry((), 5, 5),
    "large": Geometry((9, 9), 3, 3, 3),
    "oblong": Geometry((3, 5), 4, 4),
}
DESCRIPTIONS = {
    **STRUCTURES,
    "three copies": functools.partial(mobileone, copies=3),
    "wide middle": functools.partial(dbb, middle=12),
    "small 3": functools.partial(replknet, small=3),
}


def randomised(layer, seed=0):
    """A layer whose every array, running statistics among them, is drawn: fresh ones hide mistakes."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(layer)

    def draw(path, leaf):
        low, high = (
            (0.5, 2.0) if path[-1].name == "value" and "var" in map(str, _names(path)) else (-1.0, 1.0)
        )
        return jnp.asarray(rng.uniform(low, high, leaf.shape), jnp.float64)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state), copy=True)


def _names(path):
    return [getattr(key, "key", getattr(key, "name", "")) for key in path]


def made(structure, kind=nn.Branched, seed=0):
    return randomised(kind(structure, param_dtype=jnp.float64, rngs=nnx.Rngs(seed)), seed)


def arrays_of(layer, as_array=np.asarray):
    return {
        "weights": {key: as_array(w[...]) for key, w in layer.weights.items()},
        "scales": {key: as_array(s[...]) for key, s in layer.scales.items()},
        "norms": {
            key: {name: as_array(getattr(norm, name)[...]) for name in ("scale", "bias", "mean", "var")}
            for key, norm in layer.norms.items()
        },
    }


def image(layer, seed=1, size=7):
    shape = (2, *(max(size, n * d) for n, d in zip(layer.window, layer.dilation)), layer.inputs)
    return np.random.default_rng(seed).normal(size=shape)


def difference(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


def merged_output(layer, x):
    """What the one plain layer gives that `fuse` makes of it."""
    return fuse(layer)(jnp.asarray(x))


def cases():
    for name, description in DESCRIPTIONS.items():
        for kind, layer in LAYERS.items():
            try:
                description(layer)
            except ValueError:
                continue
            yield pytest.param(description, layer, id=f"{name}, {kind}")


@pytest.mark.parametrize(("description", "layer"), list(cases()))
def test_merged_is_branch_by_branch(x64, description, layer):
    branched = made(description(layer))
    branched.eval()
    x = image(layer)
    expected, _ = slow_structures.run(branched.structure, arrays_of(branched), x)
    assert difference(branched(jnp.asarray(x)), expected) < EXACT
    # Nothing that wraps or reflects has a plain form with pads of its own; all of these have.
    assert difference(merged_output(branched, x), expected) < EXACT


@pytest.mark.parametrize("name", [*STRUCTURES, "wide middle"])
@pytest.mark.parametrize("kind", ["plain", "strided", "grouped", "depthwise"])
def test_one_training_step_is_the_reference(x64, name, kind):
    """Output, running statistics and every parameter after a step of SGD, from statistics of the batch; the
    padding after a norm is the one of the running statistics, without a gradient."""
    window = (5, 5) if name == "unireplknet" else (3, 3)
    base = LAYERS[kind]
    layer = Geometry(window, base.inputs, base.outputs, base.groups, strides=base.strides)
    branched = made(DESCRIPTIONS[name](layer))
    branched.train()
    x, arrays = jnp.asarray(image(layer)), arrays_of(branched, jnp.asarray)
    y, _ = slow_structures.run(branched.structure, arrays_of(branched), np.asarray(x))
    target = jnp.asarray(np.random.default_rng(2).normal(size=y.shape))
    statistics = {k: {n: v.pop(n) for n in ("mean", "var")} for k, v in arrays["norms"].items()}

    def reference_loss(trained):
        norms = {k: trained["norms"][k] | statistics[k] for k in statistics}
        y, after = slow_structures.run(
            branched.structure, trained | {"norms": norms}, x, training=True, xp=jnp
        )
        return ((y - target) ** 2).mean(), after

    with jax.numpy_rank_promotion("allow"):
        gradients, after = jax.jit(jax.grad(reference_loss, has_aux=True))(arrays)
    expected = jax.tree.map(lambda w, g: w - 0.1 * g, arrays, gradients)

    @nnx.jit
    def step(model, optimizer, x):
        gradients = nnx.grad(lambda m: ((m(x) - target) ** 2).mean())(model)
        optimizer.update(model, gradients)

    step(branched, nnx.Optimizer(branched, optax.sgd(0.1), wrt=nnx.Param), x)
    found = arrays_of(branched)
    for key, moved in after.items():
        for part, value in moved.items():
            np.testing.assert_allclose(found["norms"][key].pop(part), value, rtol=0, atol=EXACT)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=10 * EXACT), found, expected)


@pytest.mark.parametrize("mistake", ["border", "bias", "groups"])
def test_mistakes_show(x64, mistake):
    """Negative control: the comparison finds the mistakes that such code is known for."""
    layer = LAYERS["grouped"]
    branched = made(dbb(layer, middle=8))
    branched.eval()
    x = image(layer)
    wrong, _ = slow_structures.run(branched.structure, arrays_of(branched), x, wrong=mistake)
    assert difference(merged_output(branched, x), wrong) > MISTAKE
    assert difference(branched(jnp.asarray(x)), wrong) > MISTAKE


@pytest.mark.parametrize("description", [repopt, repopt_ghost])
@pytest.mark.parametrize("kind", LAYERS)
def test_without_norms_the_layer_can_merge_before_it_runs(x64, description, kind):
    layer = LAYERS[kind]
    merged, branched = (made(description(layer), kind=k) for k in (nn.Merged, nn.Branched))
    x = jnp.asarray(image(layer))
    expected, _ = slow_structures.run(merged.structure, arrays_of(merged), np.asarray(x))
    assert difference(merged(x), expected) < EXACT
    assert difference(branched(x), expected) < EXACT
    assert difference(merged_output(merged, x), expected) < EXACT
    # And its gradients are those of the branches.
    of_merged, of_branched = (nnx.grad(lambda m: (m(x) ** 2).mean())(m) for m in (merged, branched))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=EXACT),
        nnx.to_pure_dict(of_merged),
        nnx.to_pure_dict(of_branched),
    )


# --- Descriptions drawn at random.


@st.composite
def layers(draw):
    axes = draw(st.integers(1, 2))
    groups = draw(st.sampled_from([1, 2]))
    channels = st.sampled_from([2, 4])
    window = tuple(draw(st.sampled_from([1, 3, 5])) for _ in range(axes))
    inputs = draw(channels)
    return Geometry(
        window,
        inputs,
        draw(st.sampled_from([inputs, 4])),
        groups,
        strides=draw(st.integers(1, 2)),
        dilation=draw(st.integers(1, 2)),
        padding=tuple((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(axes)),
    )


@st.composite
def structures(draw):
    layer = draw(layers())
    sizes = [tuple(draw(st.sampled_from([k for k in (1, 3, 5) if k <= n])) for n in layer.window)]
    maps = [Kernel(layer.window), Kernel((1,) * layer.axes), Kernel(sizes[0]), Average()]
    maps += [Kernel((3,) * layer.axes, (2,) * layer.axes)] if min(layer.window) >= 5 else []
    follow = st.sampled_from(["norm", "scale", "constant", ""])
    chains = {}
    for i in range(draw(st.integers(1, 3))):
        chain, width = [], layer.inputs
        for _ in range(draw(st.integers(0, 2))):
            channels = draw(st.sampled_from([2, 4, width]))
            residual = channels == width and draw(st.booleans())
            chain.append(Stage(Kernel((1,) * layer.axes), draw(follow), channels=channels, residual=residual))
            width = channels
        last = draw(st.sampled_from([*maps, *([Identity(), Pool()] if width == layer.outputs else [])]))
        fixed = isinstance(last, (Identity, Pool)) and draw(st.booleans())
        chain.append(Stage(last, draw(follow), trained=not fixed))
        chains[f"chain{i}"] = tuple(chain)
    return Structure(layer, chains)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(structures())
def test_drawn_structures(structure):
    with jax.enable_x64(True):
        branched = made(structure)
        branched.eval()
        x = image(structure.layer, size=6)
        expected, _ = slow_structures.run(structure, arrays_of(branched), x)
        assert difference(branched(jnp.asarray(x)), expected) < EXACT
        assert difference(merged_output(branched, x), expected) < EXACT


# --- What a structure says of itself, and refuses.


def test_published_descriptions():
    def names(description, layer=LAYERS["plain"]):
        return [name for name, _ in description(layer).chains]

    assert names(repvgg) == names(repopt) == ["3x3", "1x1", "identity"]
    assert names(repvgg, LAYERS["strided"]) == ["3x3", "1x1"]
    assert names(repvgg, LAYERS["depthwise"]) == ["3x3", "1x1", "identity"]
    assert names(repopt, LAYERS["depthwise"]) == ["3x3", "1x1"]
    assert names(repvgg, LAYERS["1x1"]) == ["1x1", "identity"]
    assert names(repopt_ghost, LAYERS["depthwise"]) == ["3x3", "identity"]
    assert names(acnet) == ["3x3", "3x1", "1x3"]
    assert names(dbb) == ["3x3", "1x1", "average", "1x1_3x3"]
    assert names(dbb, LAYERS["depthwise"]) == ["3x3", "average", "1x1_3x3"]
    assert names(functools.partial(mobileone, copies=2)) == ["3x3_0", "3x3_1", "1x1", "identity"]
    assert names(unireplknet, LAYERS["large"]) == ["9x9", "5x5", "5x5_d2x2", "3x3_d3x3", "3x3_d4x4"]
    assert names(functools.partial(qarepvgg, pool=True)) == ["3x3", "1x1", "identity", "pool"]
    assert [s(LAYERS["plain"]).norm for s in (repopt, qarepvgg, repvgg, dbb)] == [True, True, False, False]


def test_branch_set_and_back():
    structure = repopt(LAYERS["plain"])
    branches = structure.branch_set()
    assert branches.kernel == (3, 3, 6, 6)
    assert of_branches(branches, structure.layer) == structure
    assert structure.branch_set(stack=(2,)).kernel == (2, 3, 3, 6, 6)
    with pytest.raises(ValueError, match="3x3, 1x1, identity are not one trained map"):
        repvgg(LAYERS["plain"]).branch_set()


@pytest.mark.parametrize(
    ("chains", "message"),
    [
        ({}, "at least one"),
        ({"a/b": (Stage(Kernel((3, 3))),)}, "without `/`"),
        ({"a": ()}, "a: it has no stage"),
        ({"a": (Stage(Kernel((3, 3))), Stage(Kernel((3, 3))))}, "3x3 stands before another stage"),
        ({"a": (Stage(Kernel((5, 5))),)}, "cannot be centred in a window of 3 taps"),
        ({"a": (Stage(Kernel((1, 1)), channels=4), Stage(Identity()))}, "as many input as output channels"),
        ({"a": (Stage(Kernel((3, 3)), trained=False),)}, "only an identity or a pooling has a fixed tensor"),
        ({"a": (Stage(Kernel((3, 3)), channels=4),)}, "gives 4 channels, the layer 6"),
        ({"a": (Stage(Kernel((3, 3)), residual=True),)}, "`residual` needs a 1x1 stage"),
        ({"a": (Stage(Kernel((3, 3)), "batch"),)}, "`then` is 'batch'"),
        ({"a": (Stage(Pool()),), "b": (Stage(Kernel((2, 2))),)}, "b: a kernel of 2 taps"),
    ],
)
def test_what_a_structure_refuses(chains, message):
    with pytest.raises(ValueError, match=message):
        Structure(LAYERS["plain"], chains)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 4}, "`groups` is 4: it must divide the 6 inputs"),
        ({"strides": (1, 2, 3)}, "`strides` is .* one number or 2"),
        ({"dilation": 0}, "must be at least 1"),
        ({"padding": ((1, 1),)}, "a pair for each of the 2 spatial axes"),
        ({"pad_mode": "edge"}, "`pad_mode` is 'edge'"),
        ({"pad_mode": "wrap", "padding": ((-1, 0), (0, 0))}, "nothing can be cut off"),
    ],
)
def test_what_a_geometry_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Geometry((3, 3), 6, 6, **options)


def test_what_layers_refuse():
    structure = repopt(LAYERS["plain"])
    with pytest.raises(ValueError, match="have batch norms, so that the branches cannot be merged"):
        nn.Merged(repvgg(LAYERS["plain"]), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="build the layer under nnx.vmap"):
        nn.Branched(repvgg(LAYERS["plain"]), stack=(2,), rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"`values` or `bias` do not fit.*3x3 \(expected \(6,\), found \(5,\)\)"
    ):
        nn.Merged(structure, values={"3x3": jnp.ones(5)}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="extra vectors: 7x7"):
        nn.Branched(structure, values={"7x7": jnp.ones(6)}, rngs=nnx.Rngs(0))
