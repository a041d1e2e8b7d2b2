"""The registry, and VGG-style networks: the published ones counted without allocating them, small ones."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiers
from flax import nnx
from networks import abstract, count, deployed_count, made_ready, parameter_shapes, relative, values

from repopt_jax import Mode, depth_scales, extract_scales, models, prepare
from repopt_jax.models import VGG_VARIANTS, VGGVariant, registry, vgg
from repopt_jax.models.vgg import block_specs
from repopt_jax.nn import Block, Branched, FrozenScale, Merged, SqueezeExcite
from repopt_jax.nn.block import batch_norm, conv
from repopt_jax.surgery.modules import named_modules
from repopt_jax.surgery.reinitialize import sample_weights
from repopt_jax.surgery.search import csla_twin

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


def network(variant, mode="plain", **options):
    """A VGG's shapes, ready for a way of training; nothing is drawn."""
    return made_ready(vgg, mode, variant, **{"num_classes": 10, **options})


def csla(variant):
    """Its twin with constant scales."""

    def build(rngs):
        model = vgg(variant, num_classes=10, rngs=rngs)
        scales = depth_scales(model)
        return csla_twin(model, scales, sample_weights(scales, rngs.params()))

    return abstract(build)


# --- The registry.


def test_every_network_has_a_name():
    everything = models.list()  # other tests may have registered some of their own
    tasks = {models.find(name).task for name in everything}
    assert len(tasks) == 2
    assert sorted(everything) == sorted(name for task in tasks for name in models.list(task))
    names = tuple(registry._entries())
    assert set(names) <= set(everything)
    assert {"repopt-vgg-b1", "repvgg-a0", "vgg-digits", "repghost-0.5", "mobileone-s0"} < set(names)
    counts = {"repopt-vgg": 4, "repvgg": 16, "vgg": 6, "repopt-ghostnet": 9, "repghost": 9, "mobileone": 6}
    for prefix, number in (counts | {"repmlpnet": 7, "fcos": 5}).items():
        assert sum(name.rpartition("-")[0].startswith(prefix) for name in names) == number, prefix
    for name in names:
        entry = models.find(name.upper())
        assert entry.name == name
        modes = Mode.REPOPT, Mode.REPVGG, Mode.REPGHOST, Mode.MOBILEONE, Mode.REPMLP
        assert Mode.parse(entry.mode) in modes
        assert entry.task.startswith("detect") == name.startswith("fcos")
    assert models.find("repopt-vgg-b1").variant is models.find("repvgg-b1").variant is VGG_VARIANTS["B1"]


def test_a_network_by_its_name_is_plain():
    found = abstract(models.create, "VGG-digits", num_classes=7, in_channels=1, activation="relu6")
    expected = abstract(vgg, VGG_VARIANTS["digits"], num_classes=7, in_channels=1, activation="relu6")
    assert nnx.graphdef(found) == nnx.graphdef(expected)
    assert parameter_shapes(found) == parameter_shapes(expected)


def test_names_and_options_that_do_not_exist():
    with pytest.raises(
        ValueError, match=r"no network 'repvgg-a9' \(did you mean 'repvgg-a\d'\?\): it must be"
    ):
        models.create("repvgg-a9", num_classes=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^there is no network 'zzz': it must be one of repopt-vgg-b1, "):
        models.find("zzz")
    with pytest.raises(TypeError, match="num_keypoints"):
        models.create("vgg-digits", num_classes=2, num_keypoints=3, rngs=nnx.Rngs(0))


def test_a_network_of_ones_own(monkeypatch):
    monkeypatch.setattr(registry, "NETWORKS", dict(registry.NETWORKS))

    def make(*, num_classes, in_channels, dtype, rngs):
        return nnx.Conv(in_channels, num_classes, (3, 3), dtype=dtype, rngs=rngs)

    def executed_again():
        def make(variant, *, num_classes, in_channels, dtype, rngs):
            return nnx.Conv(in_channels, num_classes, variant, dtype=dtype, rngs=rngs)

        return make

    models.register(models.Entry("own", make))
    assert models.find("own").architecture == "own"
    assert models.create("OWN", num_classes=2, in_channels=1, rngs=nnx.Rngs(0)).kernel.shape == (3, 3, 1, 2)
    models.register(models.Entry("own", make))  # the same once more
    with pytest.raises(ValueError, match="`entry` is named 'own': it must be in lower case and not taken"):
        models.register(models.Entry("own", executed_again()))
    with pytest.raises(ValueError, match="not taken"):
        models.register(models.Entry("vgg-digits", models.vgg, VGG_VARIANTS["A0"]))
    with pytest.raises(ValueError, match="in lower case"):
        models.register(models.Entry("Own", make))
    # A config file, or a cell of a notebook, that is executed twice.
    for side in (3, 5):
        models.register(models.Entry("again", executed_again(), (side, side)))
        kernel = models.create("again", num_classes=2, in_channels=1, rngs=nnx.Rngs(0)).kernel
        assert kernel.shape == (side, side, 1, 2)
    models.register(models.Entry("row", models.vgg, VGG_VARIANTS["A0"]))
    assert models.find("row").architecture == VGG_VARIANTS["A0"].architecture


# --- Counts.


# A plain one, a grouped one, and the one with squeeze-and-excitation.
@pytest.mark.parametrize("name", tiers.often(REPVGG, "A0", "B1g4", "D2se"))
def test_repvgg_has_the_published_number_of_parameters(name):
    model = network(VGG_VARIANTS[name], "repvgg", num_classes=1000)
    assert (count(model), deployed_count(model)) == REPVGG[name]


def test_repvgg_with_squeeze_and_excitation_too():
    model = network(VGG_VARIANTS["L2"], "repvgg", num_classes=1000, post_se=True)
    assert (count(model), deployed_count(model)) == REPVGG_PLUS_L2PSE


@pytest.mark.parametrize("name", REPOPT)
def test_repopt_vgg_has_the_published_number_of_parameters(name):
    assert count(network(VGG_VARIANTS[name], num_classes=1000)) == REPOPT[name]


def test_a_search_adds_its_1x1_kernels_and_vectors_and_nothing_else():
    variant = VGG_VARIANTS["digits"]
    specs = list(block_specs(variant))
    ones = sum(s.inputs // s.groups * s.outputs for s in specs)
    identities = sum(s.outputs for s in specs if s.inputs == s.outputs and s.stride == 1)
    scales = 2 * sum(s.outputs for s in specs)
    plain, search = (count(network(variant, mode)) for mode in ("plain", "search"))
    assert count(csla(variant)) == plain + ones + identities
    assert search == plain + ones + identities + scales


# --- Shapes.


@pytest.mark.parametrize(("name", "groups", "blocks"), [("B1g2", 2, 28), ("B3g4", 4, 28)])
def test_groups_are_those_of_every_second_block_of_the_whole_network(name, groups, blocks):
    specs = list(block_specs(VGG_VARIANTS[name]))
    assert len(specs) == blocks
    assert [i for i, s in enumerate(specs) if s.groups == groups] == list(range(2, 27, 2))
    assert {s.groups for s in specs} == {1, groups}


@pytest.mark.parametrize("mode", ["plain", "search", "repvgg"])
def test_groups_reach_the_kernels(mode):
    variant = dataclasses.replace(TINY, groups=2)
    shapes = parameter_shapes(network(variant, mode))
    for i, spec in enumerate(block_specs(variant)):
        inputs = spec.inputs // (2 if i in (2, 4, 6) else 1)
        for size, name in ((3, "3x3"), (1, "1x1")):
            path = f"{spec.path}/conv/" + (f"weights/{name}" if mode != "plain" else "kernel")
            if size == 3 or mode != "plain":
                assert shapes[path] == (size, size, inputs, spec.outputs)


def affine(path, channels):
    return {f"{path}/scale": (channels,), f"{path}/bias": (channels,)}


def expected_block(spec, mode):
    path, o = spec.path, spec.outputs
    if mode == "plain":
        return {f"{path}/conv/kernel": (3, 3, spec.inputs, o)} | affine(f"{path}/bn", o)
    shapes = {f"{path}/conv/weights/{k}x{k}": (k, k, spec.inputs, o) for k in (3, 1)}
    identity = ["identity"] if spec.inputs == o and spec.stride == 1 else []
    if mode == "repvgg":
        for name in ("3x3", "1x1", *identity):
            shapes |= affine(f"{path}/conv/norms/{name}", o)
        return shapes
    shapes |= {f"{path}/conv/weights/{name}": (o,) for name in identity} | affine(f"{path}/bn", o)
    if mode == "search":
        shapes |= {f"{path}/conv/scales/{name}": (o,) for name in ("3x3", "1x1")}
    return shapes


@pytest.mark.parametrize("mode", ["plain", "search", "csla", "repvgg"])
def test_paths_and_shapes_of_parameters(mode):
    expected = {"head/kernel": (8, 10), "head/bias": (10,)}
    for spec in block_specs(TINY):
        expected |= expected_block(spec, mode)
    model = csla(TINY) if mode == "csla" else network(TINY, mode)
    assert parameter_shapes(model) == expected
    kind = {"plain": nnx.Conv, "repvgg": Branched}.get(mode, Merged)
    blocks = [m for _, m in named_modules(model) if isinstance(m, Block)]
    assert [type(block.conv) for block in blocks] == [kind] * 7
    assert [block.bn is None for block in blocks] == [mode == "repvgg"] * 7
    assert len(jax.tree.leaves(nnx.state(model, FrozenScale))) == (14 if mode == "csla" else 0)


def test_squeeze_and_excitation_has_a_quarter_of_the_width():
    shapes = parameter_shapes(network(TINY, post_se=True))
    assert shapes["stages/4/0/se/down/kernel"] == (1, 1, 8, 2)
    assert shapes["stages/4/0/se/down/bias"] == (2,)
    assert shapes["stages/4/0/se/up/kernel"] == (1, 1, 2, 8)
    assert shapes["stages/4/0/se/up/bias"] == (8,)
    assert not any("/se/" in path for path in parameter_shapes(network(TINY)))


@pytest.mark.parametrize("se_first", [False, True])
def test_where_squeeze_and_excitation_comes(se_first):
    """After the ReLU or before it: its mean is over other numbers."""

    def build(rngs):
        layer, norm = conv(3, 4, 3, rngs=rngs), batch_norm(4, rngs=rngs)
        return Block(layer, norm, SqueezeExcite(4, 2, rngs=rngs), se_first=se_first)

    block, rng = abstract(build), np.random.default_rng(0)
    drawn = jax.tree.map(lambda v: jnp.asarray(rng.uniform(0.1, 1, v.shape), v.dtype), nnx.state(block))
    nnx.update(block, drawn)
    block.eval()
    x = rng.normal(size=(2, 4, 4, 3)).astype(np.float32)
    before = np.asarray(block.bn(block.conv(x)))
    before = before if se_first else np.maximum(before, 0)
    w = values(block.se)
    hidden = np.maximum(before.mean((1, 2)) @ w["down/kernel"][0, 0] + w["down/bias"], 0)
    gate = 1 / (1 + np.exp(-(hidden @ w["up/kernel"][0, 0] + w["up/bias"])))
    expected = np.maximum(before * gate[:, None, None], 0)
    np.testing.assert_allclose(block(x), expected, rtol=1e-5, atol=1e-6)
    block.se_first = not se_first
    assert relative(block(x), expected) > 0.01  # measured: 0.16 at least


@pytest.mark.parametrize("mode", ["plain", "search", "repvgg"])
def test_where_a_variant_has_squeeze_and_excitation_stays_in_every_mode(mode):
    model = network(dataclasses.replace(SHORT, pre_se=2), mode)
    blocks = [block for stage in model.stages for block in stage]
    assert all(block.se_first and block.se.down.kernel.shape == (1, 1, 4, 2) for block in blocks)
    after = network(SHORT, mode, post_se=True, activation="relu6")
    assert {(b.se_first, b.activation) for stage in after.stages for b in stage} == {(False, "relu6")}


@pytest.mark.parametrize(
    ("name", "size", "maps", "mode"),
    [
        ("cifar-small", 32, (32, 32, 16, 8, 8), "plain"),
        ("cifar-A0", 32, (32, 32, 16, 8, 4), "repvgg"),
        ("digits", 8, (8, 8, 4, 2, 2), "repvgg"),
        ("B1", 224, (112, 56, 28, 14, 7), "plain"),
        ("B1", 32, (16, 8, 4, 2, 1), "search"),
    ],
)
def test_map_sizes(name, size, maps, mode):
    variant = dataclasses.replace(VGG_VARIANTS[name], blocks=(1, 1, 1, 1))

    def run(model, x):
        sizes = []
        for stage in model.stages:
            for block in stage:
                x = block(x)
            sizes.append(x)
        return sizes

    outputs = nnx.eval_shape(run, network(variant, mode), jnp.zeros((1, size, size, 3)))
    assert [y.shape for y in outputs] == [(1, n, n, w) for n, w in zip(maps, variant.widths)]


def test_scales_start_by_the_published_depth_rule():
    """1 for stage 0 and the block that opens a stage, then sqrt(2 / i); the identity at 1."""
    variant = VGGVariant("deep", (1, 4, 1, 1), (4, 4, 4, 4, 4))
    rule = {0: 1.0, 1: 2**0.5, 2: 1.0, 3: (2 / 3) ** 0.5}

    @jax.jit  # which leaves out the draws of what is not asked for
    def start():
        model = vgg(variant, num_classes=2, rngs=nnx.Rngs(0))
        search = prepare(model, "search", rngs=nnx.Rngs(0)).model
        return extract_scales(search).vectors, depth_scales(model).vectors, model.unit_scales().vectors

    searched, stored, ones = start()
    for spec in block_specs(variant):
        path = f"{spec.path}/conv/kernel"
        assert set(searched[path]) == {"3x3", "1x1", *(["identity"] if spec.index else [])}
        for name, vector in searched[path].items():
            value = 1.0 if name == "identity" else rule[spec.index]
            np.testing.assert_array_equal(vector, np.full(4, value, np.float32))
            np.testing.assert_array_equal(vector, stored[path][name])
            np.testing.assert_array_equal(ones[path][name], np.ones(4))
    model = network(variant)
    assert model.architecture == depth_scales(model).metadata.architecture == "deep"
    assert model.unit_scales().metadata.architecture == "deep"


@pytest.mark.parametrize(
    ("mode", "images"),
    [*((mode, jnp.float32) for mode in ("plain", "search", "repvgg", "dbb")), ("plain", jnp.bfloat16)],
)
def test_bfloat16_networks_give_float32_logits(mode, images):
    model = network(SHORT, mode, post_se=True, dtype=jnp.bfloat16)
    x = jnp.zeros((2, 8, 8, 3), images)
    first, logits = nnx.eval_shape(lambda m, x: (m.stages[0][0](x), m(x)), model, x)
    assert first.dtype == jnp.bfloat16
    assert (logits.shape, logits.dtype) == ((2, 10), jnp.float32)
    assert {p.dtype for p in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("name", "options", "side"),
    [
        ("vgg-digits", {}, 8),
        ("repghost-digits", {}, 8),
        ("mobileone-digits", {}, 8),
        ("repmlpnet-digits", {"published_order": True}, 8),
        ("fcos-scenes", {"num_keypoints": 3}, 64),
    ],
)
def test_an_empty_batch_gives_empty_outputs_and_gradients(name, options, side):
    model = abstract(models.create, name, num_classes=2, in_channels=1, **options)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def run(params, rest, images):
        outputs = nnx.merge(graph, params, rest, copy=True)(images)
        return sum(leaf.sum() for leaf in jax.tree.leaves(outputs)), outputs

    images = jax.ShapeDtypeStruct((0, side, side, 1), jnp.float32)
    gradients, outputs = jax.eval_shape(jax.grad(run, has_aux=True), params, rest, images)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(outputs)} == {0}
    chex.assert_trees_all_equal_shapes(gradients, params)


def test_grey_images_and_their_number_of_classes():
    model = network(VGG_VARIANTS["digits"], num_classes=7, in_channels=1)
    assert parameter_shapes(model)["stages/0/0/conv/kernel"] == (3, 3, 1, 16)
    assert nnx.eval_shape(lambda m, x: m(x), model, jnp.zeros((5, 8, 8, 1))).shape == (5, 7)
    assert model.branch_sets()["stages/0/0/conv/kernel"].kernel == (3, 3, 1, 16)


def test_what_does_not_fit_is_refused():
    digits, other = network(VGG_VARIANTS["digits"]), network(VGG_VARIANTS["cifar-small"])
    with pytest.raises(ValueError, match=r"searched on digits\) do not fit the model: .* missing layers"):
        prepare(other, "search", scales=digits.unit_scales(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="`post_se` is True, but every block of D2se has squeeze"):
        network(VGG_VARIANTS["D2se"], post_se=True)
    with pytest.raises(ValueError, match="`num_classes` is 0: it must be at least 1"):
        network(TINY, num_classes=0)
    with pytest.raises(
        ValueError, match="`activation` is 'swish': it must be one of relu, relu6, gelu, none"
    ):
        network(TINY, activation="swish")


def test_keys_counted_in_python_are_those_of_flax():
    """Also the keys that dropout keeps, and those that are drawn afterwards."""
    by_create, by_family = nnx.Rngs(3), nnx.Rngs(3)
    entry = models.find("repghost-digits")
    options = {"num_classes": 10, "in_channels": 3, "dropout": 0.2}
    found = models.create(entry.name, **options, rngs=by_create)
    expected = entry.family(entry.variant, **options, rngs=by_family)
    assert by_create.default.count[...] == by_family.default.count[...] > 20
    for model in (found, expected):
        model.train()
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    for _ in range(2):
        chex.assert_trees_all_equal(found(x), expected(x))
    chex.assert_trees_all_equal(nnx.state(found), nnx.state(expected))
