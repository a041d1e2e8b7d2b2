"""RepOpt-VGG and RepVGG: the published networks, counted without allocating them, and the small ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import abstract as abstract_network
from networks import count, deployed_count, parameter_shapes, relative

from repopt_jax.core import paths
from repopt_jax.models import KINDS, VGG_VARIANTS, RepOptVGG, VGGVariant
from repopt_jax.models.vgg import block_specs
from repopt_jax.nn import CSLAConv, FrozenScale, PlainBlock, RepVGGBlock, SqueezeExcite
from repopt_jax.nn.blocks import batch_norm, conv
from repopt_jax.surgery.modules import named_modules

# RepVGG with 1000 classes, counted on the published code: (in training, deployed)
REPVGG = {
    "A0": (9_108_968, 8_309_384),
    "A1": (14_092_264, 12_789_864),
    "A2": (28_210_600, 25_499_944),
    "B0": (15_817_960, 14_339_048),
    "B1": (57_415_016, 51_829_480),
    "B1g2": (45_782_376, 41_360_104),
    "B1g4": (39_966_056, 36_125_416),
    "B2": (89_022_376, 80_315_112),
    "B2g2": (70_846_376, 63_956_712),
    "B2g4": (61_758_376, 55_777_512),
    "B3": (123_085_288, 110_960_872),
    "B3g2": (96_911_848, 87_404_776),
    "B3g4": (83_825_128, 75_626_728),
    "D2se": (133_334_836, 120_387_572),
}
REPVGG_PLUS_L2PSE = (140_099_224, 127_151_960)  # without its training-only extra heads

# RepOpt-VGG with 1000 classes; as many in the search's target as in every plain network
REPOPT = {"B1": 51_841_832, "B2": 80_330_536, "L1": 76_037_928, "L2": 118_132_776}

SHORT = VGGVariant("short", (1, 1, 1, 1), (4, 4, 4, 4, 4), (1, 1, 1, 2, 1))
TINY = VGGVariant("tiny", (2, 1, 2, 1), (4, 4, 6, 8, 8), (1, 1, 2, 1, 2))


def abstract(variant, **options):
    """The network's shapes; nothing is drawn."""
    return abstract_network(RepOptVGG, variant, **{"num_classes": 10, **options})


@pytest.mark.parametrize("name", REPVGG)
def test_repvgg_has_the_published_number_of_parameters(name):
    model = abstract(VGG_VARIANTS[name], kind="repvgg", num_classes=1000)
    assert (count(model), deployed_count(model)) == REPVGG[name]


def test_repvgg_with_squeeze_and_excitation_too():
    model = abstract(VGG_VARIANTS["L2"], kind="repvgg", num_classes=1000, post_se=True)
    assert (count(model), deployed_count(model)) == REPVGG_PLUS_L2PSE


@pytest.mark.parametrize("name", REPOPT)
def test_repopt_vgg_has_the_published_number_of_parameters(name):
    assert count(abstract(VGG_VARIANTS[name], num_classes=1000)) == REPOPT[name]


def test_a_search_adds_its_1x1_kernels_and_vectors_and_nothing_else():
    variant = VGG_VARIANTS["digits"]
    specs = list(block_specs(variant))
    ones = sum(s.inputs // s.groups * s.outputs for s in specs)
    identities = sum(s.outputs for s in specs if s.inputs == s.outputs and s.stride == 1)
    scales = 2 * sum(s.outputs for s in specs)
    target, csla, search = (count(abstract(variant, kind=k)) for k in ("target", "csla", "search"))
    assert csla == target + ones + identities
    assert search == csla + scales


@pytest.mark.parametrize(("name", "groups", "blocks"), [("B1g2", 2, 28), ("B3g4", 4, 28)])
def test_groups_are_those_of_every_second_block_of_the_whole_network(name, groups, blocks):
    specs = list(block_specs(VGG_VARIANTS[name]))
    assert len(specs) == blocks
    assert [i for i, s in enumerate(specs) if s.groups == groups] == list(range(2, 27, 2))
    assert {s.groups for s in specs} == {1, groups}


@pytest.mark.parametrize("kind", ["search", "repvgg"])
def test_groups_reach_the_kernels(kind):
    variant = dataclasses.replace(TINY, groups=2)
    shapes = parameter_shapes(abstract(variant, kind=kind))
    names = {
        "search": ("conv/weights/3x3", "conv/weights/1x1"),
        "repvgg": ("conv_3x3/kernel", "conv_1x1/kernel"),
    }
    for i, spec in enumerate(block_specs(variant)):
        inputs = spec.inputs // (2 if i in (2, 4, 6) else 1)
        assert shapes[f"{spec.path}/{names[kind][0]}"] == (3, 3, inputs, spec.outputs)
        assert shapes[f"{spec.path}/{names[kind][1]}"] == (1, 1, inputs, spec.outputs)


def affine(path, channels):
    return {f"{path}/scale": (channels,), f"{path}/bias": (channels,)}


def expected_block(spec, kind):
    path, o = spec.path, spec.outputs
    big, small = (3, 3, spec.inputs, o), (1, 1, spec.inputs, o)
    identity = spec.inputs == o and spec.stride == 1
    if kind == "target":
        return {f"{path}/conv/kernel": big} | affine(f"{path}/bn", o)
    if kind == "repvgg":
        block = {f"{path}/conv_3x3/kernel": big, f"{path}/conv_1x1/kernel": small}
        for name in ("3x3", "1x1", "identity")[: 2 + identity]:
            block |= affine(f"{path}/bn_{name}", o)
        return block
    block = {f"{path}/conv/weights/3x3": big, f"{path}/conv/weights/1x1": small} | affine(f"{path}/bn", o)
    if identity:
        block[f"{path}/conv/weights/identity"] = (o,)
    if kind == "search":
        block |= {f"{path}/conv/scales/{name}": (o,) for name in ("3x3", "1x1")}
    return block


@pytest.mark.parametrize("kind", KINDS)
def test_paths_and_shapes_of_parameters(kind):
    expected = {"head/kernel": (8, 10), "head/bias": (10,)}
    for spec in block_specs(TINY):
        expected |= expected_block(spec, kind)
    assert parameter_shapes(abstract(TINY, kind=kind)) == expected


def test_kinds_are_made_of_their_blocks():
    for kind in KINDS:
        model = abstract(TINY, kind=kind)
        blocks = [block for stage in model.stages for block in stage]
        assert {type(b) for b in blocks} == {RepVGGBlock if kind == "repvgg" else PlainBlock}
        layers = [m for _, m in named_modules(model) if isinstance(m, CSLAConv)]
        assert len(layers) == (7 if kind in ("search", "csla") else 0)
        assert len(jax.tree.leaves(nnx.state(model, FrozenScale))) == (14 if kind == "csla" else 0)


def test_squeeze_and_excitation_has_a_quarter_of_the_width():
    shapes = parameter_shapes(abstract(TINY, post_se=True))
    assert shapes["stages/4/0/se/down/kernel"] == (1, 1, 8, 2)
    assert shapes["stages/4/0/se/down/bias"] == (2,)
    assert shapes["stages/4/0/se/up/kernel"] == (1, 1, 2, 8)
    assert shapes["stages/4/0/se/up/bias"] == (8,)
    assert not any("/se/" in path for path in parameter_shapes(abstract(TINY)))


@pytest.mark.parametrize("se_first", [False, True])
def test_where_squeeze_and_excitation_comes(se_first):
    """After the ReLU or before it: its mean is over other numbers."""

    def build(rngs):
        return PlainBlock(
            conv(3, 4, 3, rngs=rngs),
            batch_norm(4, rngs=rngs),
            SqueezeExcite(4, 2, rngs=rngs),
            se_first=se_first,
        )

    block, rng = abstract_network(build), np.random.default_rng(0)
    drawn = jax.tree.map(lambda v: jnp.asarray(rng.uniform(0.1, 1, v.shape), v.dtype), nnx.state(block))
    nnx.update(block, drawn)
    block.eval()
    x = rng.normal(size=(2, 4, 4, 3)).astype(np.float32)
    before = np.asarray(block.bn(block.conv(x)))
    before = before if se_first else np.maximum(before, 0)
    w = {path: np.asarray(p) for path, p in paths.named_leaves(nnx.state(block.se, nnx.Param))[0].items()}
    hidden = np.maximum(before.mean((1, 2)) @ w["down/kernel"][0, 0] + w["down/bias"], 0)
    gate = 1 / (1 + np.exp(-(hidden @ w["up/kernel"][0, 0] + w["up/bias"])))
    expected = np.maximum(before * gate[:, None, None], 0)
    np.testing.assert_allclose(block(x), expected, rtol=1e-5, atol=1e-6)
    block.se_first = not se_first
    assert relative(block(x), expected) > 0.01  # measured: 0.16 at least


@pytest.mark.parametrize("kind", KINDS)
def test_a_variant_may_have_squeeze_and_excitation_before_every_relu(kind):
    model = abstract(dataclasses.replace(SHORT, pre_se=2), kind=kind)
    blocks = [block for stage in model.stages for block in stage]
    assert all(block.se_first and block.se.down.kernel.shape == (1, 1, 4, 2) for block in blocks)
    plain = abstract(SHORT, kind=kind, post_se=True)
    assert not any(block.se_first for stage in plain.stages for block in stage)


@pytest.mark.parametrize(
    ("name", "size", "maps"),
    [
        ("cifar-small", 32, (32, 32, 16, 8, 8)),
        ("cifar-A0", 32, (32, 32, 16, 8, 4)),
        ("digits", 8, (8, 8, 4, 2, 2)),
        ("B1", 224, (112, 56, 28, 14, 7)),
        ("B1", 32, (16, 8, 4, 2, 1)),
    ],
)
@pytest.mark.parametrize("kind", ["target", "repvgg"])
def test_map_sizes(name, size, maps, kind):
    if name == "B1" and kind == "repvgg":
        kind = "search"
    variant = dataclasses.replace(VGG_VARIANTS[name], blocks=(1, 1, 1, 1))

    def run(model, x):
        sizes = []
        for stage in model.stages:
            for block in stage:
                x = block(x)
            sizes.append(x)
        return sizes

    outputs = nnx.eval_shape(run, abstract(variant, kind=kind), jnp.zeros((1, size, size, 3)))
    assert [y.shape for y in outputs] == [(1, n, n, w) for n, w in zip(maps, variant.widths)]


@pytest.mark.parametrize("kind", ["search", "csla"])
def test_scales_start_by_the_published_depth_rule(kind):
    """1 for stage 0 and the block that opens a stage, then sqrt(2 / i); the identity at 1."""
    variant = VGGVariant("deep", (1, 4, 1, 1), (4, 4, 4, 4, 4))
    rule = {0: 1.0, 1: 2**0.5, 2: 1.0, 3: (2 / 3) ** 0.5}

    @jax.jit  # which leaves out the draws of what is not asked for
    def start():
        model = RepOptVGG(variant, kind=kind, num_classes=2, rngs=nnx.Rngs(0))
        layers = {s.path: model.stages[s.stage][s.index].conv.scale_vectors() for s in block_specs(variant)}
        return layers, model.depth_scales().vectors, model.unit_scales().vectors

    layers, stored, ones = start()
    for spec in block_specs(variant):
        vectors = layers[spec.path]
        assert set(vectors) == {"3x3", "1x1", *(["identity"] if spec.index else [])}
        for name, vector in vectors.items():
            value = 1.0 if name == "identity" else rule[spec.index]
            np.testing.assert_array_equal(vector, np.full(4, value, np.float32))
            np.testing.assert_array_equal(vector, stored[f"{spec.path}/conv/kernel"][name])
            np.testing.assert_array_equal(ones[f"{spec.path}/conv/kernel"][name], np.ones(4))
    metadata = abstract(variant, kind=kind).depth_scales().metadata
    assert metadata.architecture == "deep"


def test_the_form_reaches_every_layer():
    for form in ("merged", "branches"):
        model = abstract(SHORT, kind="search", form=form)
        assert {m.form for _, m in named_modules(model) if isinstance(m, CSLAConv)} == {form}


@pytest.mark.parametrize(
    ("kind", "images"), [*((kind, jnp.float32) for kind in KINDS), ("target", jnp.bfloat16)]
)
def test_bfloat16_networks_give_float32_logits(kind, images):
    model = abstract(SHORT, kind=kind, post_se=True, dtype=jnp.bfloat16)
    x = jnp.zeros((2, 8, 8, 3), images)
    first, logits = nnx.eval_shape(lambda m, x: (m.stages[0][0](x), m(x)), model, x)
    assert first.dtype == jnp.bfloat16
    assert (logits.shape, logits.dtype) == ((2, 10), jnp.float32)
    assert {p.dtype for p in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype(jnp.float32)}


def test_grey_images_and_their_number_of_classes():
    model = abstract(VGG_VARIANTS["digits"], num_classes=7, in_channels=1)
    assert parameter_shapes(model)["stages/0/0/conv/kernel"] == (3, 3, 1, 16)
    assert nnx.eval_shape(lambda m, x: m(x), model, jnp.zeros((5, 8, 8, 1))).shape == (5, 7)
    assert model.branch_sets()["stages/0/0/conv/kernel"].kernel == (3, 3, 1, 16)


def test_what_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="`kind` is 'hs': it must be one of target, search, csla, repvgg"):
        abstract(TINY, kind="hs")
    other = abstract(VGG_VARIANTS["digits"]).unit_scales()
    with pytest.raises(ValueError, match=r"searched on digits\) do not fit the model: .* missing layers"):
        abstract(VGG_VARIANTS["cifar-small"], kind="search", scales=other)
    with pytest.raises(ValueError, match="`post_se` is True, but every block of D2se has squeeze"):
        abstract(VGG_VARIANTS["D2se"], kind="repvgg", post_se=True)
