"""Structures: every published description, and drawn ones, run branch by branch and merged, against the slow
reference of `slow_structures`."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow_structures
import tiers
from flax import nnx
from forms import is_of_small_windows
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import abstract, assert_close, randomised, relative
from slow_structures import arrays_of, image

from repopt_jax import Geometry, Identity, Kernel, Pool, Stage, Structure, nn
from repopt_jax.core.branches import Average, Frequency, Local
from repopt_jax.core.published import (
    STRUCTURES,
    acnet,
    dbb,
    mobileone,
    of_branches,
    orepa,
    orepa_repvgg,
    qarepvgg,
    repghost,
    replknet,
    repmlp,
    repopt,
    repopt_ghost,
    repopt_mlp,
    repvgg,
    slak,
    unireplknet,
)
from repopt_jax.surgery.fuse import fuse

# Largest difference, relative to the largest entry, in float64. Measured: at most 1e-14.
EXACT = 1e-12
# What a mistake must change at least; measured: 2e-2 and more.
MISTAKE = 1e-3
# Of complex steps along a direction; its square is nothing beside 1.
STEP = 1e-30

LAYERS = {
    "plain": Geometry((3, 3), 4, 4),
    "wider": Geometry((3, 3), 4, 8),
    "strided": Geometry((3, 3), 4, 4, strides=2),
    "grouped": Geometry((3, 3), 4, 8, 2),
    "depthwise": Geometry((3, 3), 4, 4, 4),
    "depthwise, wider": Geometry((3, 3), 4, 8, 4),
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
    # A small kernel is smaller than the window in these alone, and a set of dilated ones has several.
    "large, grouped": Geometry((7, 7), 4, 8, 2),
    "large, strided, dilated": Geometry((7, 7), 2, 2, strides=2, dilation=2),
    "oblong": Geometry((3, 5), 4, 4),
    # Without a tap in the middle, so that there is neither a 1x1 kernel nor an identity.
    "even": Geometry((4, 2), 4, 4),
    "3-D, strided, dilated, grouped": Geometry((3, 1, 3), 4, 4, 2, strides=(1, 2, 1), dilation=(2, 1, 1)),
    "cut off": Geometry((5, 3), 4, 4, padding=((-1, 2), (0, -1))),
    # With an output for each position of the window, which lies side by side or does not.
    "maps": Geometry((3, 3), 2, 18, 2, strides=3, padding=((0, 0), (0, 0))),
    "maps of every window": Geometry((2, 3), 2, 12, strides=(2, 1)),
}
# The others are `long`: what each of them adds is, with something else, in one of these.
OFTEN = (
    *("plain", "depthwise", "dilated, strided, grouped", "pads of its own", "circular", "reflected", "1-D"),
    *("1x1", "dense", "large, grouped", "large, strided, dilated", "even", "cut off"),
    *("3-D, strided, dilated, grouped", "maps", "maps of every window"),
)
DESCRIPTIONS = STRUCTURES | {
    "mobileone": functools.partial(mobileone, copies=2),
    "dbb, wide": functools.partial(dbb, middle=12),
    "repghost, raw": functools.partial(repghost, raw_identity=True),
}


def made(structure, kind=nn.Branched, **options):
    """A layer in evaluation mode whose every array, running statistics among them, is drawn."""
    return randomised(abstract(kind, structure, param_dtype=jnp.float64, **options))


@jax.jit
def outputs(layers, x):
    """What each layer gives, and the one plain layer that `fuse` makes of it."""
    return {name: (layer(x), fuse(layer)(x)) for name, layer in layers.items()}


def defined(layer):
    """The structure of each description that is defined for this layer."""
    found = {}
    for name, description in DESCRIPTIONS.items():
        with contextlib.suppress(ValueError):
            found[name] = description(layer)
    return found


@pytest.mark.parametrize("kind", tiers.often(LAYERS, *OFTEN))
def test_merged_is_branch_by_branch(x64, kind):
    """Every description that is defined for this layer, compiled in one program."""
    layer = LAYERS[kind]
    layers = {name: made(structure) for name, structure in defined(layer).items()}
    x = image(layer)
    for name, found in outputs(layers, x).items():
        expected, _ = slow_structures.run(layers[name].structure, arrays_of(layers[name]), x)
        for y in found:
            assert relative(y, expected) <= EXACT, name


def test_every_description_is_defined_for_some_layers_and_most_for_all():
    """Of which the test above has looked at these, with those of its cases that are `long`."""
    undefined = {
        name: [kind for kind, layer in LAYERS.items() if name not in defined(layer)] for name in DESCRIPTIONS
    }
    by_window = {"plain", "wider", "strided", "grouped", "depthwise", "dilated", "circular", "reflected"}
    assert by_window < set(undefined.pop("unireplknet"))
    assert undefined.pop("orepa") == undefined.pop("orepa_repvgg") == ["1x1", "dense"]
    maps = {"maps", "maps of every window"}
    assert set(undefined.pop("repmlp")) == set(LAYERS) - maps
    for name in ("dbb", "dbb, wide"):  # pooling keeps the channels, and a 1x1 kernel needs a centre
        assert set(undefined.pop(name)) <= maps | {"even"}
    assert undefined.pop("acnet") == ["even", "maps of every window"]
    assert {name for kinds in undefined.values() for name in kinds} <= {"maps of every window"}
    assert [name for name, _ in defined(LAYERS["even"])["repvgg"].chains] == ["4x2"]


def with_norms(trained, statistics):
    norms = {key: trained["norms"][key] | statistics[key] for key in statistics}
    return trained | {"norms": norms}


# Descriptions that have several branches, or any, in larger windows alone.
OF_LARGE, LARGE = ("replknet", "slak", "unireplknet"), (7, 7)


def test_which_need_larger_windows():
    """No other is left out where networks of small windows are tested."""
    small = {name for name in STRUCTURES if is_of_small_windows(name)}
    assert set(STRUCTURES) - small == {*OF_LARGE, "repmlp"}


def in_training(kind):
    """Layers of every description in training mode, of this kind of layer, and an input of theirs."""
    base, layers = LAYERS[kind], {}
    for name, description in DESCRIPTIONS.items():
        layer = dataclasses.replace(base, window=LARGE, padding=None) if name in OF_LARGE else base
        with contextlib.suppress(ValueError):  # where each is defined is a test of its own
            layers[name] = made(description(layer))
            layers[name].train()
    return layers, image(dataclasses.replace(base, window=LARGE, padding=None))


@pytest.mark.parametrize(
    "kind",
    tiers.often(
        ("plain", "strided", "grouped", "depthwise", "dilated", "dilated, strided, grouped", "maps"),
        *("plain", "dilated, strided, grouped", "maps"),
    ),
)
def test_training_is_the_reference(x64, kind):
    """Of every description, in one program: running statistics after a step and the gradient along a random
    direction, from statistics of the batch; the padding after a norm is that of the running statistics,
    without a gradient."""
    (layers, x), rng = in_training(kind), np.random.default_rng(2)
    targets = {
        name: rng.normal(size=jax.eval_shape(lambda m: m(x), layer).shape) for name, layer in layers.items()
    }

    @jax.jit
    def gradients_and_statistics(layers, x):
        def loss(layer, target):
            value = ((layer(x) - target) ** 2).mean()
            return value, {
                key: {n: getattr(norm, n)[...] for n in ("mean", "var")} for key, norm in layer.norms.items()
            }

        return {name: jax.grad(loss, has_aux=True)(layer, targets[name]) for name, layer in layers.items()}

    for name, (gradients, moved) in gradients_and_statistics(layers, x).items():
        layer, arrays = layers[name], arrays_of(layers[name])
        statistics = {key: {n: norm.pop(n) for n in ("mean", "var")} for key, norm in arrays["norms"].items()}
        direction = jax.tree.map(lambda w: rng.normal(size=w.shape), arrays)
        along = jax.tree.map(lambda w, v: w + STEP * 1j * v, arrays, direction)
        y, after = slow_structures.run(layer.structure, with_norms(along, statistics), x, training=True)
        assert_close(moved, jax.tree.map(np.real, after), EXACT)
        expected = ((y - targets[name]) ** 2).mean().imag / STEP
        gradients = nnx.to_pure_dict(nnx.state(gradients, nnx.Param))
        products = jax.tree.map(lambda g, v: np.vdot(g, v), gradients, prune(direction, gradients))
        assert relative(sum(jax.tree.leaves(products)), expected) <= EXACT, name


def prune(tree, like):
    """The part of `tree` that has the keys of `like`."""
    return {k: prune(tree[k], v) for k, v in like.items()} if isinstance(like, dict) else tree


@pytest.mark.parametrize("mistake", ["border", "bias", "groups", "sum"])
def test_mistakes_show(x64, mistake):
    """Negative control: the comparison finds the mistakes that such code is known for."""
    layer = LAYERS["grouped"]
    branched = made(orepa_repvgg(layer) if mistake == "sum" else dbb(layer, middle=8))
    x = image(layer)
    wrong, _ = slow_structures.run(branched.structure, arrays_of(branched), x, wrong=mistake)
    for y in outputs({"any": branched}, x)["any"]:
        assert relative(y, wrong) > MISTAKE


@pytest.mark.parametrize("mistake", ["border", "bias", "groups", "sum", "batch"])
def test_mistakes_show_in_training(x64, mistake):
    """The same for one step; and the border from the batch's statistics in place of the running ones."""
    layer = LAYERS["grouped"]
    branched = made(orepa_repvgg(layer) if mistake == "sum" else dbb(layer, middle=8))
    arrays, x = arrays_of(branched), image(layer)
    branched.train()
    y = branched(x)
    right, _ = slow_structures.run(branched.structure, arrays, x, training=True)
    wrong, _ = slow_structures.run(branched.structure, arrays, x, training=True, wrong=mistake)
    assert relative(y, right) <= EXACT
    assert relative(y, wrong) > MISTAKE


def with_scales(structure):
    """With scales in the place of its norms."""
    chains = {
        name: tuple(dataclasses.replace(stage, then="scale") for stage in chain)
        for name, chain in structure.chains
    }
    return dataclasses.replace(structure, chains=chains)


def without_norm(chain):
    """With scales in the place of the norms alone."""
    return tuple(dataclasses.replace(s, then="scale") if s.then == "norm" else s for s in chain)


@pytest.mark.parametrize("kind", tiers.often(LAYERS, *OFTEN))
def test_without_norms_the_layer_can_merge_before_it_runs(x64, kind):
    """And its gradients are those of the branches."""
    layer = LAYERS[kind]
    structures = {"search": repopt(layer), "ghost": repopt_ghost(layer)}
    structures |= {name: s for name, s in defined(layer).items() if name == "orepa"}
    if kind.startswith("maps"):
        structures["maps"] = repopt_mlp(layer)
        structures["a scale for each map"] = with_scales(repmlp(layer))
        structures["a constant for each map"] = with_scales(repmlp(layer)).with_constants()
    layers = {n: [made(s, kind) for kind in (nn.Merged, nn.Branched)] for n, s in structures.items()}
    x = image(layer)

    @jax.jit
    def outputs_and_gradients(layers, x):
        def loss(layer):
            y = layer(x)
            return jnp.sum(jnp.sin(y)), y

        return {
            name: ([jax.grad(loss, has_aux=True)(layer) for layer in pair], fuse(pair[0])(x))
            for name, pair in layers.items()
        }

    for name, (found, fused) in outputs_and_gradients(layers, x).items():
        expected, _ = slow_structures.run(structures[name], arrays_of(layers[name][0]), x)
        (gradients, merged), (of_branches, branched) = found
        for y in (merged, branched, fused):
            assert relative(y, expected) <= EXACT, name
        assert_close(*(nnx.to_pure_dict(nnx.state(g)) for g in (gradients, of_branches)), EXACT)


# --- Descriptions drawn at random.


@st.composite
def layers(draw):
    axes = draw(st.integers(1, 2))
    groups = draw(st.sampled_from([1, 2]))
    channels = st.sampled_from([2, 4])
    window = tuple(draw(st.sampled_from([5, 3, 1])) for _ in range(axes))
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
    sizes = [draw(st.sampled_from([k for k in (3, 5, 1) if k <= n])) for n in layer.window]
    maps = [Kernel(sizes), Average(), Frequency(), Kernel(layer.window), Kernel((1,) * layer.axes)]
    if 5 in layer.window:  # dilated along the sides on which there is room
        room = [n == 5 for n in layer.window]
        maps.insert(0, Kernel([3 if r else 1 for r in room], [2 if r else 1 for r in room]))
    follow = st.sampled_from(["norm", "scale", "constant", ""])
    chains = {}
    if layer.taps > 1 and draw(st.booleans()):
        first = Stage(Kernel(layer.window), draw(follow), expansion=draw(st.integers(1, 2)))
        chains["depthwise"] = (first, Stage(Kernel((1,) * layer.axes), draw(follow)))
    for i in range(draw(st.integers(1, 3))):
        chain, width = [], layer.inputs
        for _ in range(draw(st.integers(0, 2))):
            channels = draw(st.sampled_from([2, 4, width]))
            residual = channels % width == 0 and draw(st.booleans())
            chain.append(Stage(Kernel((1,) * layer.axes), draw(follow), channels=channels, residual=residual))
            width = channels
        own = draw(st.sampled_from([(Pool(), Identity()), maps])) if width == layer.outputs else maps
        last = draw(st.sampled_from(own))
        fixed = own is not maps and draw(st.booleans())
        chain.append(Stage(last, draw(follow), trained=not fixed))
        chains[f"chain{i}"] = tuple(chain)
    sums = {}
    if draw(st.booleans()):
        sums["sum"] = draw(st.lists(st.sampled_from(sorted(chains)), min_size=1, unique=True))
        chains |= {name: without_norm(chains[name]) for name in sums["sum"]}
    return Structure(layer, chains, sums=sums)


def kinds_of(structure):
    """What there is in a structure, in words."""
    layer, stages = structure.layer, [stage for _, chain in structure.chains for stage in chain]
    dilated = [s.map for s in stages if isinstance(s.map, Kernel) and s.map.dilation != (1,) * layer.axes]
    found = {
        "strided": max(layer.strides) > 1,
        "dilated": max(layer.dilation) > 1,
        "grouped": layer.groups > 1,
        "a dilated kernel": bool(dilated),
        "a norm inside": any(s.then == "norm" for _, chain in structure.chains for s in chain[:-1]),
        "no norm": not structure.followers("norm"),
        "a residual": any(s.residual for s in stages),
        "a fixed vector": any(not s.trained for s in stages),
        "a depthwise stage": any(s.expansion for s in stages),
        "a chain of three": any(len(chain) == 3 for _, chain in structure.chains),
        "a sum with a norm": bool(structure.sums),
    }
    return {kind for kind, there in found.items() if there} | {type(s.map).__name__ for s in stages}


KINDS = {
    *("strided", "dilated", "grouped", "a dilated kernel", "a norm inside", "no norm", "a residual"),
    *("a fixed vector", "a depthwise stage", "a chain of three", "a sum with a norm"),
    *("Kernel", "Identity", "Pool", "Average", "Frequency", "a wrong border"),
}


@pytest.mark.once
def test_drawn_structures():
    """Branch by branch and merged, and where no norm prevents it merged before it runs; and what was drawn
    has everything in it that a structure can have, and a border that can be wrong."""
    drawn = set()

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(structures())
    def is_the_reference(structure):
        drawn.update(kinds_of(structure))
        layers, x = {"branched": made(structure)}, image(structure.layer)
        if not structure.followers("norm"):
            layers["merged"] = made(structure, nn.Merged)
        arrays = arrays_of(layers["branched"])
        expected, _ = slow_structures.run(structure, arrays, x)
        wrong, _ = slow_structures.run(structure, arrays, x, wrong="border")
        for pair in outputs(layers, x).values():
            for y in pair:
                assert relative(y, expected) <= EXACT
                drawn.update({"a wrong border"} if relative(y, wrong) > MISTAKE else ())

    with jax.enable_x64(True):
        is_the_reference()
    assert drawn >= KINDS


def test_the_identity_of_a_wider_stage_is_repeated_in_each_group(x64):
    """As of OREPA's 1x1 before the kernel in more than 4 groups: it has twice as many outputs as inputs."""
    structure = orepa(Geometry((3, 3), 10, 5, 5))
    first = structure.placed["1x1_3x3"][0]
    kernel = first.kernel({first.key: jnp.zeros(first.shape)}, jnp.float64)[0, 0]
    assert kernel.shape == (2, 20)
    np.testing.assert_array_equal(kernel, np.tile(np.eye(2), 10))
    layer, x = made(structure), image(structure.layer)
    expected, _ = slow_structures.run(structure, arrays_of(layer), x)
    for y in outputs({"orepa": layer}, x)["orepa"]:
        assert relative(y, expected) <= EXACT


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
    assert names(replknet, LAYERS["large"]) == ["9x9", "5x5"]
    assert names(functools.partial(replknet, small=3), LAYERS["large"]) == ["9x9", "3x3"]
    assert names(slak, LAYERS["large"]) == ["9x5", "5x9", "5x5"]
    assert names(functools.partial(slak, small=3), LAYERS["oblong"]) == ["3x3", "3x5"]
    assert names(unireplknet, LAYERS["large"]) == ["9x9", "5x5", "5x5_d2x2", "3x3_d3x3", "3x3_d4x4"]
    assert names(functools.partial(qarepvgg, pool=True)) == ["3x3", "1x1", "identity", "pool"]
    inner = ["3x3", "average", "frequency", "1x1_3x3", "depthwise_1x1"]
    assert names(orepa) == [*inner, "1x1"]
    assert names(orepa_repvgg) == [*inner, "1x1", "identity"]
    assert orepa_repvgg(LAYERS["strided"]).sums == (("squeezed", tuple(inner)),)
    assert set(orepa_repvgg(LAYERS["plain"]).followers("norm")) == {"squeezed", "1x1", "identity"}
    assert names(repmlp, LAYERS["maps"]) == names(repopt_mlp, LAYERS["maps"])
    assert names(repmlp, LAYERS["maps"]) == ["3x3", "local_1x1", "local_3x3"]
    assert [s(LAYERS["plain"]).norm for s in (repopt, qarepvgg, repvgg, dbb)] == [True, True, False, False]


def test_branch_set_and_back():
    structure = repopt(LAYERS["plain"])
    branches = structure.branch_set()
    assert branches.kernel == (3, 3, 4, 4)
    assert of_branches(branches, structure.layer) == structure
    assert structure.branch_set(stack=(2,)).kernel == (2, 3, 3, 4, 4)
    with pytest.raises(ValueError, match="3x3, 1x1, identity are not one trained map"):
        repvgg(LAYERS["plain"]).branch_set()
    with pytest.raises(ValueError, match=r"local_1x1, local_3x3 are not .* a constant scale for each output"):
        with_scales(repmlp(LAYERS["maps"])).branch_set()


@pytest.mark.parametrize(
    ("chains", "message"),
    [
        ({}, "at least one"),
        ({"a/b": (Stage(Kernel((3, 3))),)}, "without `/`"),
        ({"a": ()}, "a: it has no stage"),
        ({"a": (Stage(Kernel((3, 3))), Stage(Kernel((3, 3))))}, "3x3 stands before another stage"),
        ({"a": (Stage(Kernel((5, 5))),)}, "cannot be centred in a window of 3 taps"),
        ({"a": (Stage(Kernel((1, 1)), channels=6), Stage(Identity()))}, "as many input as output channels"),
        ({"a": (Stage(Kernel((3, 3)), trained=False),)}, "only an identity or a pooling has a fixed tensor"),
        ({"a": (Stage(Kernel((3, 3)), channels=6),)}, "gives 6 channels, the layer 4"),
        ({"a": (Stage(Kernel((3, 3)), residual=True),)}, "`residual` needs a 1x1 stage"),
        ({"a": (Stage(Kernel((3, 3)), expansion=2),)}, "`expansion` is for the first of two stages"),
        ({"a": (Stage(Kernel((3, 3)), expansion=2), Stage(Identity()))}, "identity stands after a depthwise"),
        ({"a": (Stage(Kernel((3, 3)), expansion=0), Stage(Kernel((1, 1))))}, "an `expansion` of at least 1"),
        ({"a": (Stage(Kernel((1, 1))), Stage(Kernel((3, 3)), expansion=2))}, "`expansion` is for the first"),
        ({"a": (Stage(Kernel((3, 3)), "batch"),)}, "`then` is 'batch'"),
        ({"a": (Stage(Pool()),), "b": (Stage(Kernel((2, 2))),)}, "b: a kernel of 2 taps"),
        ({"a": (Stage(Local((3, 3))),)}, "the layer has 4 outputs in 1 groups, where it needs maps of 9"),
        ({"a": (Stage(Kernel((3, 3)), shared=3),)}, "`shared` is 3: it must divide the 4 channels"),
        ({"a": (Stage(Kernel((3, 3)), "", shared=2),)}, "`shared` is 2: it must divide .* of a norm or a"),
    ],
)
def test_what_a_structure_refuses(chains, message):
    with pytest.raises(ValueError, match=message):
        Structure(LAYERS["plain"], chains)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"chains": {"3x3": Kernel((3, 3))}}, r"'3x3': Kernel\(.*from a name to \(Stage\(Kernel\("),
        ({"chains": {"3x3": Stage(Kernel((3, 3)))}}, r"`chains` has '3x3': Stage\("),
        ({"chains": {"3x3": (Kernel((3, 3)),)}}, r"`chains` has '3x3': \(Kernel\("),
        ({"chains": {"3x3": "3x3"}}, "`chains` has '3x3': '3x3'"),
        ({"chains": {Kernel((3, 3)): (Stage(Kernel((3, 3))),)}}, r"`chains` has Kernel\("),
        ({"chains": Stage(Kernel((3, 3)))}, "`chains` is of type Stage: it must be a mapping from names"),
        ({"sums": {"sum": "3x3"}}, r"`sums` has 'sum': '3x3': it must be from a name to \("),
        ({"layer": (3, 3)}, "`layer` is of type tuple: it must be a `Geometry`"),
    ],
)
def test_values_of_another_kind_are_refused_by_name(given, message):
    chains = {"3x3": (Stage(Kernel((3, 3))),)}
    with pytest.raises(TypeError, match=message):
        Structure(**{"layer": LAYERS["plain"], "chains": chains} | given)


@pytest.mark.parametrize(
    ("sums", "message"),
    [
        ({"sum": ()}, "sum: it has no chain"),
        ({"sum": ("a", "z")}, "sum: there is no chain z"),
        ({"sum": ("a", "normed")}, "sum: normed has a batch norm, and cannot be merged"),
        ({"sum": ("a", "b"), "other": ("b",)}, "sum: b is added twice; other: b is added twice"),
        ({"a": ("a",)}, "a: a sum has a name of its own"),
        ({"b_1": ("a",)}, "b_1: a sum has a name of its own"),
        ({"a/b": ("a",)}, "without `/`"),
    ],
)
def test_what_sums_of_chains_refuse(sums, message):
    own, point = Kernel((3, 3)), Kernel((1, 1))
    chains = {"a": (Stage(own, ""),), "b": (Stage(point, ""), Stage(own, "scale")), "normed": (Stage(own),)}
    with pytest.raises(ValueError, match=f"`sums` that are not defined for these chains: .*{message}"):
        Structure(LAYERS["plain"], chains, sums=sums)


@pytest.mark.parametrize(("description", "size"), [(orepa, 6), (orepa_repvgg, 3)])
def test_orepa_starts_as_published(description, size):
    """Kaiming's uniform distribution for a slope of 0 or 1, and the scales of each branch."""
    structure = description(Geometry((3, 3), 8, 8))
    drawn = structure.sample(jax.random.key(0))
    assert not drawn.pop("1x1_3x3_0").any()
    for key, w in drawn.items():
        alone = key == "1x1" and description is orepa_repvgg  # RepVGG's own
        bound = np.sqrt((1 if alone else size) / np.prod(w.shape[:-1]))
        assert 0.9 * bound < np.abs(w).max() <= 1.0001 * bound, key
    starts = {key: part.stage.start for key, part in structure.followers("scale").items()}
    assert starts.pop("1x1", 1.0) == 1.0
    assert list(starts.values()) == [0.25, 0.25, 0.0, 0.5, 0.5]
    decayed = structure.decayed()
    assert all(decayed[f"weights/{key}"] for key in structure.shapes())
    assert all(decayed[f"scales/{key}"] for key in starts)


def test_a_sum_of_chains_is_one_convolution():
    """Of OREPA's RepVGG, beside the 1x1; the same chains one by one are eight."""
    structure, x = orepa_repvgg(LAYERS["plain"]), jnp.zeros((1, 5, 5, 4))

    def convolutions(structure):
        graph, state = nnx.split(abstract(nn.Branched, structure))
        program = jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, x)
        return str(program).count(" repopt_convolution[")

    assert convolutions(structure) == 2
    assert convolutions(dataclasses.replace(structure, sums={})) == 8


def test_sums_of_chains_have_no_constant_rule():
    """And no other form than that of the network, where they are merged before they run."""
    structure = Structure(LAYERS["plain"], {"3x3": (Stage(Kernel((3, 3)), "scale"),)}, sums={"sum": ("3x3",)})
    with pytest.raises(ValueError, match="the chains sum are not one trained map, of its name, with"):
        structure.branch_set()
    with pytest.raises(ValueError, match="sum have batch norms, so that the branches cannot be merged"):
        nn.Merged(structure, rngs=nnx.Rngs(0))
    assert structure.decayed()["norms/sum/scale"] is False


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
    with pytest.raises(ValueError, match=r"build the layer under nnx\.vmap"):
        nn.Branched(repvgg(LAYERS["plain"]), stack=(2,), rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"`values` or `bias` do not fit.*3x3 \(expected \(4,\), found \(5,\)\)"
    ):
        nn.Merged(structure, values={"3x3": jnp.ones(5)}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="extra vectors: 7x7"):
        nn.Branched(structure, values={"7x7": jnp.ones(4)}, rngs=nnx.Rngs(0))
