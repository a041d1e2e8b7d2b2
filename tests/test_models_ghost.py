"""RepGhostNet and RepOpt-GhostNet: published counts, shapes, bottlenecks against loops, scales, deploying."""

import dataclasses
import functools

import chex
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
    values,
)

from repopt_jax import depth_scales, extract_scales, fuse, nn, prepare, reinitialize, verify_equivalence
from repopt_jax.models import GHOST_VARIANTS, GhostRow, GhostVariant, ghostnet
from repopt_jax.models.ghost import divisible, ghost_specs
from repopt_jax.surgery.modules import named_modules
from repopt_jax.surgery.reinitialize import merge_weights, sample_weights
from repopt_jax.surgery.search import csla_twin

EXACT = 1e-12  # of the largest output, float64; measured: 2e-15 at most
SINGLE = 1e-4  # of the largest output, float32; measured: 2e-6
WRONG = 0.01  # of the largest output: what a mistake exceeds; measured: 0.03 at least
TRAINED = 1e-10  # relative, float64, 5 steps with batch norm in training mode; measured: 6e-16

# With 1000 classes, counted on the published code: RepGhostNet in training and deployed by its authors (the
# ghost modules' branches merged, batch norms kept elsewhere), RepOpt-GhostNet in training
PUBLISHED = {
    "0.5": (2_313_968, 2_306_528, 2_309_008),
    "0.58": (2_546_388, 2_537_736, 2_540_620),
    "0.8": (3_278_968, 3_267_112, 3_271_064),
    "1.0": (4_073_604, 4_058_772, 4_063_716),
    "1.11": (4_539_984, 4_523_568, 4_529_040),
    "1.3": (5_478_612, 5_459_316, 5_465_748),
    "1.5": (6_575_336, 6_553_064, 6_560_488),
    "2.0": (9_796_124, 9_766_460, 9_776_348),
}

# Channels of the two ghost modules of every bottleneck of 0.5x, as in the scales that the authors released
RELEASED = [
    [(4, 8)],
    [(12, 12)],
    [(20, 12)],
    [(20, 20)],
    [(32, 20)],
    [(60, 40)],
    [(52, 40), (60, 40), (60, 40), (120, 56), (168, 56)],
    [(168, 80)],
    [(240, 80)] * 4,
]

TINY = GhostVariant(
    "tiny",
    1.0,
    ((GhostRow(3, 4, 8, False, 1),), (GhostRow(5, 8, 12, True, 2),)),
    stem=8,
    features=6,
)
KERNELS = [f"stages/{a}/0/{ghost}/cheap/conv/kernel" for a in (1, 2) for ghost in ("ghost1", "ghost2")]


@functools.cache
def full(name, mode="plain"):
    """A published network's shapes."""
    return made_ready(ghostnet, mode, GHOST_VARIANTS[name], num_classes=1000, dropout=0.0)


def tiny(mode="plain", variant=TINY, **options):
    return made_ready(ghostnet, mode, variant, **{"num_classes": 5, "dropout": 0.0, **options})


def csla():
    """The shapes of the twin with constant scales."""

    def build(rngs):
        model = ghostnet(TINY, num_classes=5, dropout=0.0, rngs=rngs)
        scales = depth_scales(model)
        return csla_twin(model, scales, sample_weights(scales, rngs.params()))

    return abstract(build)


def with_dropout(mode, variant=TINY):
    model = randomised(tiny(mode, variant), dtype=jnp.float32)
    model.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    return model


@pytest.mark.once
@pytest.mark.parametrize("name", tiers.often(PUBLISHED, "0.5"))
def test_published_numbers_of_parameters(name):
    rep, plain = (full(name, mode) for mode in ("repghost", "plain"))
    authors = deployed_count(rep, only=(nn.Branched,))
    assert (count(rep), authors, count(plain)) == PUBLISHED[name]


def test_every_width_is_counted():
    assert set(PUBLISHED) == set(GHOST_VARIANTS) - {"digits"}


@pytest.mark.once
def test_a_search_adds_its_vectors():
    plain, search = full("0.5"), full("0.5", "search")
    channels = sum(branches.out for branches in plain.branch_sets().values())
    assert count(search) == count(plain) + 2 * channels  # s and u


@pytest.mark.once
def test_folding_everything_takes_one_more_number_for_every_channel_of_the_other_batch_norms():
    model = full("0.5")
    norms = [m for path, m in named_modules(model) if isinstance(m, nnx.BatchNorm) and "/cheap" not in path]
    others = sum(norm.scale.shape[0] for norm in norms)
    assert deployed_count(model) == PUBLISHED["0.5"][1] - others


def test_half_width_has_the_channels_of_the_released_scales():
    model = full("0.5")
    expected = {
        f"stages/{a}/{b}/ghost{g + 1}/cheap/conv/kernel": (3, 3, 1, channels)
        for a, stage in enumerate(RELEASED, start=1)
        for b, pair in enumerate(stage)
        for g, channels in enumerate(pair)
    }
    assert {path: branches.kernel for path, branches in model.branch_sets().items()} == expected
    shapes = parameter_shapes(model)
    assert {path: shapes[path] for path in expected} == expected
    assert all(b.names == ("3x3", "identity") and b.groups == b.out for b in model.branch_sets().values())


@pytest.mark.parametrize(
    ("channels", "rounded"), [(1, 4), (4.4, 4), (5.9, 8), (6, 8), (18, 20), (10, 12), (50, 52), (139.2, 140)]
)
def test_channels_are_rounded_to_multiples_of_four_and_not_down_by_a_tenth(channels, rounded):
    assert divisible(channels) == rounded


def affine(path, channels):
    return {f"{path}/scale": (channels,), f"{path}/bias": (channels,)}


def conv_norm(path, kernel):
    return {f"{path}/conv/kernel": kernel} | affine(f"{path}/bn", kernel[-1])


def cheap(path, c, mode):
    if mode == "plain":
        return conv_norm(path, (3, 3, 1, c))
    shapes = {f"{path}/conv/weights/3x3": (3, 3, 1, c)}
    if mode == "repghost":
        return shapes | affine(f"{path}/conv/norms/3x3", c) | affine(f"{path}/conv/norms/identity", c)
    shapes |= {f"{path}/conv/weights/identity": (c,)} | affine(f"{path}/bn", c)
    return shapes | ({f"{path}/conv/scales/3x3": (c,)} if mode == "search" else {})


@pytest.mark.parametrize("mode", ["plain", "search", "csla", "repghost"])
def test_paths_and_shapes_of_parameters(mode):
    expected = conv_norm("stages/0/0", (3, 3, 3, 8)) | conv_norm("stages/3/0", (1, 1, 12, 16))
    expected |= {
        "features/kernel": (1, 1, 16, 6),
        "features/bias": (6,),
        "head/kernel": (6, 5),
        "head/bias": (5,),
    }
    for path, inputs, hidden, outputs in (("stages/1/0", 8, 4, 8), ("stages/2/0", 8, 8, 12)):
        expected |= conv_norm(f"{path}/ghost1/primary", (1, 1, inputs, hidden))
        expected |= conv_norm(f"{path}/ghost2/primary", (1, 1, hidden, outputs))
        expected |= cheap(f"{path}/ghost1/cheap", hidden, mode) | cheap(f"{path}/ghost2/cheap", outputs, mode)
    expected |= {"stages/2/0/se/down/kernel": (1, 1, 8, 4), "stages/2/0/se/down/bias": (4,)}
    expected |= {"stages/2/0/se/up/kernel": (1, 1, 4, 8), "stages/2/0/se/up/bias": (8,)}
    expected |= conv_norm("stages/2/0/depthwise", (5, 5, 1, 8))
    expected |= conv_norm("stages/2/0/shortcut/0", (5, 5, 1, 8))
    expected |= conv_norm("stages/2/0/shortcut/1", (1, 1, 8, 12))
    model = csla() if mode == "csla" else tiny(mode)
    assert parameter_shapes(model) == expected
    assert len(jax.tree.leaves(nnx.state(model, nn.FrozenScale))) == (4 if mode == "csla" else 0)


@pytest.mark.parametrize(
    ("name", "size", "maps"),
    [
        pytest.param("1.0", 224, (112, 56, 28, 14, 7), marks=pytest.mark.long),
        ("0.5", 33, (17, 9, 5, 3, 2)),
    ],
)
def test_map_sizes(name, size, maps):
    def maps_of(model, x):
        sizes = [x]
        for stage in model.stages:
            for block in stage:
                sizes.append(block(sizes[-1]))
        return sizes[1:]

    variant = GHOST_VARIANTS[name]
    sizes = nnx.eval_shape(maps_of, full(name), jnp.zeros((1, size, size, 3)))
    stem, *blocks, last = [y.shape[1:] for y in sizes]
    shrinks = 0
    assert stem == (maps[0], maps[0], divisible(16 * variant.width))
    for spec, shape in zip(ghost_specs(variant), blocks, strict=True):
        shrinks += spec.stride == 2
        assert shape == (maps[shrinks], maps[shrinks], spec.outputs)
    assert shrinks == 4
    assert last == (maps[-1], maps[-1], divisible(960 * variant.width))


def layer_by_hand(layer, x, *, stride=1, groups=1):
    """bn(conv(x)), of layers made of branches branch by branch."""
    conv = layer.conv
    if isinstance(conv, nnx.Conv):
        y = conv_by_hand(x, conv.kernel[...], stride=stride, groups=groups)
        return norm_by_hand(y, layer.bn)
    y = conv_by_hand(x, conv.weights["3x3"][...], groups=groups)
    if isinstance(conv, nn.Branched):
        return norm_by_hand(y, conv.norms["3x3"]) + norm_by_hand(x, conv.norms["identity"])
    y = np.asarray(conv.scales["3x3"][...]) * y + np.asarray(conv.weights["identity"][...]) * x
    return norm_by_hand(y, layer.bn)


def ghost_by_hand(module, x, *, relu, inner_relu=None):
    y = layer_by_hand(module.primary, x)
    y = np.maximum(y, 0) if (relu if inner_relu is None else inner_relu) else y
    y = layer_by_hand(module.cheap, y, groups=y.shape[-1])
    return np.maximum(y, 0) if relu else y


def bottleneck_by_hand(block, x, *, hard=True, **options):
    y = ghost_by_hand(block.ghost1, x, relu=True, **options)
    if block.depthwise is not None:
        y = layer_by_hand(block.depthwise, y, stride=2, groups=y.shape[-1])
    if block.se is not None:
        down, up = block.se.down, block.se.up
        hidden = np.maximum(y.mean((1, 2)) @ np.asarray(down.kernel[0, 0]) + np.asarray(down.bias[...]), 0)
        gate = hidden @ np.asarray(up.kernel[0, 0]) + np.asarray(up.bias[...])
        gate = np.clip(gate / 6 + 0.5, 0, 1) if hard else 1 / (1 + np.exp(-gate))
        y = y * gate[:, None, None]
    y = ghost_by_hand(block.ghost2, y, relu=False)
    if block.shortcut:
        x = layer_by_hand(block.shortcut[0], x, stride=2, groups=x.shape[-1])
        x = layer_by_hand(block.shortcut[1], x)
    return y + x


# In both of the kept ones every layer but the cheap operations is a plain network's.
MODES = [pytest.param("plain", marks=pytest.mark.long), "search", "repghost"]


@pytest.mark.parametrize("mode", MODES)
def test_bottlenecks_are_the_published_ones(mode, x64):
    """Against loops, on an odd and an even side; with controls that the comparison notices."""
    model, x = randomised(tiny(mode)), random_input(2, 5, 6, 8)
    for stage, size in ((1, (5, 6)), (2, (3, 3))):
        block = settled(model.stages[stage][0], x)
        found = np.asarray(run(block, x))
        assert found.shape[1:3] == size
        assert relative(bottleneck_by_hand(block, x), found) <= EXACT
        assert relative(bottleneck_by_hand(block, x, inner_relu=False), found) > WRONG
        if block.se is not None:
            assert relative(bottleneck_by_hand(block, x, hard=False), found) > WRONG
        for number, layer in enumerate(block.shortcut):
            layer.bn.bias[...] += 1.0
            assert relative(bottleneck_by_hand(block, x), found) > WRONG, number
            layer.bn.bias[...] -= 1.0


@pytest.mark.parametrize("mode", MODES)
def test_a_deployed_network_computes_the_same(mode, x64):
    x = random_input(3, 17, 16, 3)
    model = settled(randomised(tiny(mode)), x)
    deployed = fuse(model)
    logits = run(deployed, x)
    assert relative(logits, run(model, x)) <= EXACT
    left = {type(m) for _, m in named_modules(deployed)}
    assert not {nnx.BatchNorm, nn.Merged, nn.Branched} & left
    names = parameter_shapes(deployed)
    block = {name.removeprefix("stages/2/0/") for name in names if name.startswith("stages/2/0/")}
    blocks = ("ghost1/primary", "ghost1/cheap", "ghost2/primary", "ghost2/cheap", "depthwise")
    convs = [f"{name}/conv" for name in (*blocks, "shortcut/0", "shortcut/1")] + ["se/down", "se/up"]
    assert block == {f"{conv}/{leaf}" for conv in convs for leaf in ("kernel", "bias")}
    assert {"stages/0/0/conv/bias", "stages/3/0/conv/bias", "features/bias"} <= set(names)
    if mode == "repghost":  # the authors' deployed form, which keeps the other batch norms
        authors = fuse(model, only=(nn.Branched,))
        assert relative(run(authors, x), run(model, x)) <= EXACT
        cheap = {type(m) for path, m in named_modules(authors) if path.endswith("/cheap/conv")}
        assert cheap == {nnx.Conv}
        before, after = (
            {path for path, m in named_modules(n) if isinstance(m, nnx.BatchNorm)} for n in (model, authors)
        )
        assert after == {path for path in before if "/cheap/" not in path}
    cheap = model.stages[2][0].ghost2.cheap
    norm = cheap.conv.norms["identity"] if mode == "repghost" else cheap.bn
    norm.mean[...] += 3 * jnp.sqrt(norm.var[...])  # statistics that the deployed kernels do not know
    assert relative(logits, run(model, x)) > WRONG


def test_in_single_precision_too():
    x = random_input(2, 9, 8, 3).astype(np.float32)
    model = with_dropout("repghost")
    assert relative(run(fuse(model), x), run(model, x)) <= SINGLE


def test_scales_start_by_the_published_depth_rule():
    """sqrt(2 / (n + 1)), n counting ghost modules since width or resolution changed; the identity at 1."""
    model = full("0.5")
    depths = [[1], [1], [2], [1], [2], [1], [2, 3, 4, 1, 2], [1], [2, 3, 4, 5]]
    scales = depth_scales(model)
    for a, stage in enumerate(depths, start=1):
        for b, depth in enumerate(stage):
            for name, n in (("ghost1", 2 * depth - 1), ("ghost2", 2 * depth)):
                vectors = scales.entries[f"stages/{a}/{b}/{name}/cheap/conv/kernel"].vectors
                np.testing.assert_array_equal(
                    vectors["3x3"], np.full_like(vectors["3x3"], (2 / (n + 1)) ** 0.5)
                )
                np.testing.assert_array_equal(vectors["identity"], np.ones_like(vectors["identity"]))
    assert sum(len(stage) for stage in depths) * 2 == len(scales.entries)
    assert scales.metadata.architecture == "GhostNet-0.5"
    ones = model.unit_scales().entries["stages/9/3/ghost2/cheap/conv/kernel"].vectors
    assert all((np.asarray(v) == 1).all() for v in ones.values())


def signed(scales, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda v: v * jnp.asarray(rng.normal(size=v.shape), v.dtype), scales)


def test_scales_go_in_and_come_out():
    scales = signed(depth_scales(tiny()))
    assert list(scales.entries) == KERNELS

    @jax.jit  # which leaves out the draws of what is not asked for
    def extract():
        model = ghostnet(TINY, num_classes=5, dropout=0.0, rngs=nnx.Rngs(0))
        modes = [prepare(model, "search", scales=given, rngs=nnx.Rngs(0)).model for given in (scales, None)]
        return [extract_scales(model) for model in modes]

    found, start = extract()
    assert found.branch_sets == scales.branch_sets
    chex.assert_trees_all_equal(found.vectors, scales.vectors)
    chex.assert_trees_all_equal(start.vectors, depth_scales(tiny()).vectors)


def test_reinitialising_scales_the_draw_and_adds_u_at_the_centre():
    """The draw of a depthwise 3x3 lies within 1/3, one over the square root of its nine inputs."""
    scales, plain = signed(depth_scales(tiny())), randomised(tiny(), dtype=jnp.float32)
    new = reinitialize(plain, scales, rngs=nnx.Rngs(1), allow_trained=True)
    before, after = values(plain), values(new)
    for path in before:
        if path not in scales.entries:
            np.testing.assert_array_equal(after[path], before[path])
            continue
        vectors = {name: np.asarray(v) for name, v in scales.entries[path].vectors.items()}
        drawn = np.array(after[path])
        drawn[1, 1] -= vectors["identity"]
        drawn /= vectors["3x3"]
        assert 0.15 < np.abs(drawn).max() <= 1 / 3 + 1e-5
        assert drawn.min() < 0 < drawn.max()


def test_the_twin_of_a_network_is_its_search_network():
    """With the same tensors and trainable scales: array by array, merged into the network's kernels."""
    scales, plain = signed(depth_scales(tiny())), randomised(tiny(), dtype=jnp.float32)
    search = prepare(plain, "search", scales=scales, trained=False, rngs=nnx.Rngs(3)).model
    weights = sample_weights(scales, nnx.Rngs(3).params())
    twin = csla_twin(plain, scales, weights, trainable_scales=True)
    assert nnx.graphdef(twin) == nnx.graphdef(search)
    chex.assert_trees_all_equal(values(twin), values(search))
    merged = merge_weights(scales, weights)
    np.testing.assert_array_equal(twin.stages[2][0].ghost1.cheap.conv.merged_kernel(), merged[KERNELS[2]])


def test_training_is_that_of_the_twin():
    """With dropout, and batch norm in training mode. Biases start at 0, as in a fresh network: those in front
    of another batch norm have no gradient and stay there but for rounding, which must not count."""
    rng = np.random.default_rng(0)
    batches = [
        {"image": rng.normal(size=(4, 8, 8, 3)).astype(np.float32), "label": rng.integers(0, 5, 4)}
        for _ in range(5)
    ]
    model = with_dropout("plain", dataclasses.replace(TINY, stages=TINY.stages[1:]))
    for _, module in named_modules(model):
        if isinstance(module, nnx.BatchNorm):
            module.bias[...] = jnp.zeros_like(module.bias[...])
    model.train()
    scales = signed(depth_scales(model))
    result = verify_equivalence(model, scales, batches, tolerance=TRAINED, rngs=nnx.Rngs(1))
    assert result.equivalent
    assert result.movement > 0.01
    assert {"stages/1/0/ghost1/cheap/conv/kernel", "stages/1/0/ghost2/cheap/bn/mean"} < set(
        result.differences
    )


def test_dropout_is_for_training_alone():
    model = with_dropout("repghost")
    x = random_input(2, 9, 8, 3).astype(np.float32)
    model.eval()
    first = run(model, x)
    np.testing.assert_array_equal(first, run(model, x))
    model.train()
    assert not model.dropout.deterministic
    model.eval()
    model.dropout.deterministic = False  # alone, so that batch norm changes nothing
    second = run(model, x)
    assert relative(first, second) > WRONG
    assert relative(run(model, x), second) > WRONG
    assert tiny().dropout is None
    drop = nnx.eval_shape(lambda: ghostnet(TINY, num_classes=5, rngs=nnx.Rngs(0))).dropout
    assert (drop.rate, drop.deterministic) == (0.2, False)


@pytest.mark.parametrize("mode", ["plain", "search", "repghost"])
def test_bfloat16_networks_give_float32_logits(mode):
    model = tiny(mode, num_classes=7, in_channels=1, dtype=jnp.bfloat16)
    logits = nnx.eval_shape(lambda m, x: m(x), model, jnp.zeros((2, 8, 8, 1)))
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
    assert {p.dtype for p in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype(jnp.float32)}


def test_what_does_not_fit_is_refused():
    other = tiny(variant=dataclasses.replace(TINY, name="other", width=2.0)).unit_scales()
    with pytest.raises(ValueError, match=r"searched on GhostNet-other\) do not fit the model: 4 misshapen"):
        prepare(tiny(), "search", scales=other, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="`only` names Linear, for which no deployed form is registered"):
        fuse(tiny(), only=(nnx.Linear,))
