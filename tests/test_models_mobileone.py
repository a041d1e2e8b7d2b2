"""MobileOne: published counts, shapes, the block against loops, and deploying in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiers
from flax import nnx
from networks import (
    abstract,
    conv_by_hand,
    count,
    deployed_count,
    made_ready,
    norm_by_hand,
    parameter_shapes,
    random_input,
    randomised,
    relative,
    run,
    settled,
)

from repopt_jax import Geometry, fuse, to_structure
from repopt_jax.core import published
from repopt_jax.models import MOBILEONE_VARIANTS, MobileOneVariant, mobileone
from repopt_jax.models.mobileone import mobileone_specs
from repopt_jax.nn import Block, Branched, SqueezeExcite
from repopt_jax.nn.block import block
from repopt_jax.surgery.modules import named_modules

EXACT = 1e-12  # of the largest output, float64; measured: 1e-15 at most
SINGLE = 1e-4  # of the largest output, float32; measured: 8e-7
WRONG = 0.01  # of the largest output: what a mistake exceeds; measured: 0.04 at least

# With 1000 classes, counted on the published code: (in training, deployed)
PUBLISHED = {
    "s0": (5_293_272, 2_078_504),
    "s1": (4_825_192, 4_764_840),
    "s2": (7_884_648, 7_808_168),
    "s3": (10_170_600, 10_078_312),
    "s4": (14_951_248, 14_838_352),
}

TINY = MobileOneVariant("tiny", (4, 4, 16, 16, 6), copies=2, pairs=(1, 2, 2, 1), se_pairs=(0, 0, 1, 0))


def network(variant, mode="mobileone", **options):
    """The shapes of a network, by default with the branches that it is trained with."""
    return made_ready(mobileone, mode, variant, **{"num_classes": 10, **options})


# The one with several copies of a convolution, and the one with squeeze-and-excitation.
@pytest.mark.parametrize("name", tiers.often(PUBLISHED, "s0", "s4"))
def test_published_numbers_of_parameters(name):
    model = network(MOBILEONE_VARIANTS[name], num_classes=1000)
    assert (count(model), deployed_count(model)) == PUBLISHED[name]


def test_every_variant_is_counted():
    assert set(PUBLISHED) == set(MOBILEONE_VARIANTS) - {"digits"}


def test_a_plain_network_deploys_as_the_trained_one():
    assert deployed_count(network(TINY, "plain")) == deployed_count(network(TINY))


def test_squeeze_and_excitation_is_in_the_last_half_of_stage_3_and_in_stage_4_of_s4_alone():
    with_se = {
        name: [(s.stage, s.index) for s in mobileone_specs(variant) if s.se]
        for name, variant in MOBILEONE_VARIANTS.items()
    }
    assert with_se.pop("s4") == [*((3, i) for i in range(10, 20)), (4, 0), (4, 1)]
    assert not any(with_se.values())


def affine(path, channels):
    return {f"{path}/scale": (channels,), f"{path}/bias": (channels,)}


def block_shapes(path, kernel, copies, *, identity, se=0):
    """One copy of the convolution keeps a number in its name, as several do."""
    size, outputs = kernel[0], kernel[-1]
    shapes = {f"{path}/conv/weights/{size}x{size}_{j}": kernel for j in range(copies)}
    if size > 1:
        shapes[f"{path}/conv/weights/1x1"] = (1, 1, *kernel[2:])
    norms = [*(name.replace("weights", "norms") for name in shapes)]
    for name in norms + ([f"{path}/conv/norms/identity"] if identity else []):
        shapes |= affine(name, outputs)
    if se:
        down, up = (1, 1, outputs, se), (1, 1, se, outputs)
        shapes |= {f"{path}/se/down/kernel": down, f"{path}/se/down/bias": (se,)}
        shapes |= {f"{path}/se/up/kernel": up, f"{path}/se/up/bias": (outputs,)}
    return shapes


def test_paths_and_shapes_of_parameters():
    expected = {"head/kernel": (6, 10), "head/bias": (10,)}
    for path, kernel, copies, identity, se in (
        ("stages/0/0", (3, 3, 3, 4), 1, False, 0),
        ("stages/1/0", (3, 3, 1, 4), 2, False, 0),
        ("stages/1/1", (1, 1, 4, 4), 2, True, 0),
        ("stages/2/0", (3, 3, 1, 4), 2, False, 0),
        ("stages/2/1", (1, 1, 4, 16), 2, False, 0),
        ("stages/2/2", (3, 3, 1, 16), 2, True, 0),
        ("stages/2/3", (1, 1, 16, 16), 2, True, 0),
        ("stages/3/0", (3, 3, 1, 16), 2, False, 0),
        ("stages/3/1", (1, 1, 16, 16), 2, True, 0),
        ("stages/3/2", (3, 3, 1, 16), 2, True, 1),
        ("stages/3/3", (1, 1, 16, 16), 2, True, 1),
        ("stages/4/0", (3, 3, 1, 16), 2, False, 0),
        ("stages/4/1", (1, 1, 16, 6), 2, False, 0),
    ):
        expected |= block_shapes(path, kernel, copies, identity=identity, se=se)
    assert parameter_shapes(network(TINY)) == expected


@pytest.mark.parametrize(
    ("name", "size", "maps"),
    [
        pytest.param("s0", 224, (112, 56, 28, 14, 7), marks=pytest.mark.long),
        ("s4", 65, (33, 17, 9, 5, 3)),
        ("s2", 32, (16, 8, 4, 2, 1)),
    ],
)
def test_map_sizes(name, size, maps):
    variant = dataclasses.replace(MOBILEONE_VARIANTS[name], pairs=(1, 1, 1, 1))

    def maps_of(model, x):
        sizes = []
        for stage in model.stages:
            for layer in stage:
                x = layer(x)
            sizes.append(x)
        return sizes

    model = network(variant)
    outputs = nnx.eval_shape(maps_of, model, jnp.zeros((1, size, size, 3)))
    assert [y.shape for y in outputs] == [(1, n, n, w) for n, w in zip(maps, variant.widths)]


def block_by_hand(model, x, *, stride=1, groups=1, se_first=True, without=""):
    layer = model.conv
    y = 0.0
    for name, norm in layer.norms.items():
        if name != without:
            kernel = layer.weights[name][...] if name != "identity" else None
            z = x if kernel is None else conv_by_hand(x, kernel, stride=stride, groups=groups)
            y = y + norm_by_hand(z, norm)
    if model.se is None:
        return np.maximum(y, 0)
    before = y if se_first else np.maximum(y, 0)
    down, up = model.se.down, model.se.up
    hidden = np.maximum(before.mean((1, 2)) @ np.asarray(down.kernel[0, 0]) + np.asarray(down.bias[...]), 0)
    gate = 1 / (1 + np.exp(-(hidden @ np.asarray(up.kernel[0, 0]) + np.asarray(up.bias[...]))))
    return np.maximum(before * gate[:, None, None], 0)


# Inputs, outputs, size, stride, groups, copies, with squeeze-and-excitation; and the branches.
BLOCKS = [
    ((4, 4, 3, 1, 4, 3, False), {"3x3_0", "3x3_1", "3x3_2", "1x1", "identity"}),
    ((4, 4, 3, 2, 4, 2, True), {"3x3_0", "3x3_1", "1x1"}),
    ((4, 6, 1, 1, 1, 4, False), {"1x1_0", "1x1_1", "1x1_2", "1x1_3"}),
    ((4, 4, 1, 1, 1, 1, True), {"1x1_0", "identity"}),
    ((3, 4, 3, 2, 1, 1, False), {"3x3_0", "1x1"}),
]


def random_block(inputs, outputs, size, stride, groups, copies, se):
    description = functools.partial(published.mobileone, copies=copies)

    def build(rngs):
        gate = SqueezeExcite(outputs, 2, rngs=rngs) if se else None
        options = {"stride": stride, "groups": groups, "se": gate, "se_first": True, "rngs": rngs}
        return to_structure(block(inputs, outputs, size, **options), description, "conv", rngs=rngs)

    return randomised(abstract(build))


@pytest.mark.parametrize(("shape", "branches"), BLOCKS)
def test_a_block_and_its_deployed_form_are_the_published_sum(shape, branches, x64):
    """Against loops; odd and even maps."""
    inputs, _, _, stride, groups, *_ = shape
    model = random_block(*shape)
    assert isinstance(model.conv, Branched)
    assert set(model.conv.norms) == branches
    fused = fuse(model)
    assert (type(fused), type(fused.conv), fused.bn) == (Block, nnx.Conv, None)
    x = random_input(2, 5, 6, inputs)
    expected = block_by_hand(model, x, stride=stride, groups=groups)
    assert relative(model(x), expected) <= EXACT
    assert relative(fused(x), expected) <= EXACT


def test_mistakes_in_the_sum_would_be_noticed(x64):
    """Negative control: a copy, the identity, the 1x1 branch or the place of the gate."""
    model = random_block(4, 4, 3, 1, 4, 3, True)
    x = random_input(2, 5, 6, 4)
    expected = np.asarray(model(x))
    assert relative(block_by_hand(model, x, groups=4), expected) <= EXACT
    assert relative(block_by_hand(model, x, groups=4, se_first=False), expected) > WRONG
    for part in ("1x1", "identity", "3x3_1"):
        assert relative(block_by_hand(model, x, groups=4, without=part), expected) > WRONG


@pytest.mark.once
def test_a_deployed_network_computes_the_same(x64):
    x = random_input(3, 32, 32, 3)
    model = settled(randomised(network(TINY)), x)
    deployed = fuse(model)
    logits = run(deployed, x)
    assert relative(logits, run(model, x)) <= EXACT
    assert {(type(b.conv), b.bn) for stage in deployed.stages for b in stage} == {(nnx.Conv, None)}
    assert not [m for _, m in named_modules(deployed) if isinstance(m, nnx.BatchNorm)]
    norm = model.stages[2][2].conv.norms["identity"]  # statistics that the deployed kernels do not know
    norm.mean[...] += jnp.sqrt(norm.var[...])
    assert relative(logits, run(model, x)) > WRONG


@pytest.mark.once
def test_in_single_precision_too():
    x = random_input(3, 32, 32, 3).astype(np.float32)
    short = dataclasses.replace(TINY, copies=1, pairs=(1, 1, 1, 1))
    model = settled(randomised(network(short), dtype=jnp.float32), x)
    assert relative(run(fuse(model), x), run(model, x)) <= SINGLE


def test_bfloat16_networks_give_float32_logits():
    model = network(TINY, in_channels=1, dtype=jnp.bfloat16)
    logits = nnx.eval_shape(lambda m, x: m(x), model, jnp.zeros((2, 64, 64, 1)))
    assert (logits.shape, logits.dtype) == ((2, 10), jnp.float32)
    assert {p.dtype for p in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype(jnp.float32)}


def test_a_block_without_a_convolution_is_refused():
    with pytest.raises(ValueError, match="`copies` is 0: a block has at least one convolution"):
        published.mobileone(Geometry((1, 1), 2, 2), copies=0)
