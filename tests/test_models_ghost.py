"""RepGhostNet and RepOpt-GhostNet: published counts, shapes, bottlenecks against loops, scales, deploying."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import (
    abstract,
    conv_by_hand,
    count,
    deployed_count,
    norm_by_hand,
    parameter_shapes,
    random_input,
    randomised,
    relative,
    run,
    settled,
)

from repopt_jax import extract_scales, fuse, nn, reinitialize, verify_equivalence
from repopt_jax.core import paths
from repopt_jax.models import GHOST_KINDS, GHOST_VARIANTS, GhostRow, GhostVariant, RepGhostNet
from repopt_jax.models.ghost import divisible, ghost_specs
from repopt_jax.surgery.modules import named_modules
from repopt_jax.surgery.search import csla_twin, merge_weights, sample_weights

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
KERNELS = [f"blocks/{a}/0/{ghost}/cheap/conv/kernel" for a in (0, 1) for ghost in ("ghost1", "ghost2")]


@functools.cache
def full(name, kind="target"):
    """A published network's shapes."""
    return abstract(RepGhostNet, GHOST_VARIANTS[name], kind=kind, num_classes=1000, dropout=0.0)


def tiny(kind="target", **options):
    return abstract(RepGhostNet, TINY, kind=kind, num_classes=5, dropout=0.0, **options)


def with_dropout(kind, variant=TINY):
    model = abstract(RepGhostNet, variant, kind=kind, num_classes=5, dropout=0.0)
    model = randomised(model, dtype=jnp.float32)
    model.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_of_parameters(name):
    rep, target, search = (full(name, kind) for kind in ("repghost", "target", "search"))
    authors = deployed_count(rep, only=(nn.RepGhostConv,))
    assert (count(rep), authors, count(target)) == PUBLISHED[name]
    channels = sum(branches.out for branches in target.branch_sets().values())
    assert count(search) == count(target) + 2 * channels  # s and u


def test_every_width_is_counted():
    assert set(PUBLISHED) == set(GHOST_VARIANTS)


def test_folding_everything_takes_one_more_number_for_every_channel_of_the_other_batch_norms():
    model = full("0.5")
    norms = [m for path, m in named_modules(model) if isinstance(m, nnx.BatchNorm) and "/cheap" not in path]
    others = sum(norm.scale.shape[0] for norm in norms)
    assert deployed_count(model) == PUBLISHED["0.5"][1] - others


def test_half_width_has_the_channels_of_the_released_scales():
    model = full("0.5")
    expected = {
        f"blocks/{a}/{b}/ghost{g + 1}/cheap/conv/kernel": (3, 3, 1, channels)
        for a, stage in enumerate(RELEASED)
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


def cheap(path, c, kind):
    shapes = conv_norm(path, (3, 3, 1, c))
    if kind == "repghost":
        shapes |= affine(f"{path}/bn_identity", c)
    if kind in ("search", "csla"):
        del shapes[f"{path}/conv/kernel"]
        shapes |= {f"{path}/conv/weights/3x3": (3, 3, 1, c), f"{path}/conv/weights/identity": (c,)}
    if kind == "search":
        shapes[f"{path}/conv/scales/3x3"] = (c,)
    return shapes


@pytest.mark.parametrize("kind", GHOST_KINDS)
def test_paths_and_shapes_of_parameters(kind):
    expected = conv_norm("stem", (3, 3, 3, 8)) | conv_norm("blocks/2/0", (1, 1, 12, 16))
    expected |= {
        "conv_head/kernel": (1, 1, 16, 6),
        "conv_head/bias": (6,),
        "head/kernel": (6, 5),
        "head/bias": (5,),
    }
    for path, inputs, hidden, outputs in (("blocks/0/0", 8, 4, 8), ("blocks/1/0", 8, 8, 12)):
        expected |= conv_norm(f"{path}/ghost1/primary", (1, 1, inputs, hidden))
        expected |= conv_norm(f"{path}/ghost2/primary", (1, 1, hidden, outputs))
        expected |= cheap(f"{path}/ghost1/cheap", hidden, kind) | cheap(f"{path}/ghost2/cheap", outputs, kind)
    expected |= {"blocks/1/0/se/down/kernel": (1, 1, 8, 4), "blocks/1/0/se/down/bias": (4,)}
    expected |= {"blocks/1/0/se/up/kernel": (1, 1, 4, 8), "blocks/1/0/se/up/bias": (8,)}
    expected |= conv_norm("blocks/1/0/depthwise", (5, 5, 1, 8))
    expected |= conv_norm("blocks/1/0/shortcut/0", (5, 5, 1, 8))
    expected |= conv_norm("blocks/1/0/shortcut/1", (1, 1, 8, 12))
    assert parameter_shapes(tiny(kind)) == expected
    if kind == "csla":
        assert len(jax.tree.leaves(nnx.state(tiny(kind), nn.FrozenScale))) == 4


@pytest.mark.parametrize(
    ("name", "size", "maps"), [("1.0", 224, (112, 56, 28, 14, 7)), ("0.5", 33, (17, 9, 5, 3, 2))]
)
def test_map_sizes(name, size, maps):
    def maps_of(model, x):
        sizes = [model.stem(x)]
        for stage in model.blocks:
            for block in stage:
                sizes.append(block(sizes[-1]))
        return sizes

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
    """bn(conv(x)), of a search layer branch by branch, of RepGhost's with its identity."""
    conv = layer.conv
    if isinstance(conv, nn.CSLAConv):
        weights = {name: np.asarray(w[...]) for name, w in conv.weights.items()}
        y = np.asarray(conv.scales["3x3"][...]) * conv_by_hand(x, weights["3x3"], groups=groups)
        y = y + weights["identity"] * x
    else:
        y = conv_by_hand(x, conv.kernel[...], stride=stride, groups=groups)
    y = norm_by_hand(y, layer.bn)
    return y + norm_by_hand(x, layer.bn_identity) if isinstance(layer, nn.RepGhostConv) else y


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


@pytest.mark.parametrize("kind", ["target", "search", "repghost"])
def test_bottlenecks_are_the_published_ones(kind, x64):
    """Against loops, on an odd and an even side; with controls that the comparison notices."""
    model, x = randomised(tiny(kind)), random_input(2, 5, 6, 8)
    for stage, size in ((0, (5, 6)), (1, (3, 3))):
        block = settled(model.blocks[stage][0], x)
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


@pytest.mark.parametrize("kind", ["target", "csla", "repghost"])
def test_a_deployed_network_computes_the_same(kind, x64):
    x = random_input(3, 17, 16, 3)
    model = settled(randomised(tiny(kind)), x)
    deployed = fuse(model)
    logits = run(deployed, x)
    assert relative(logits, run(model, x)) <= EXACT
    left = [type(m) for _, m in named_modules(deployed)]
    assert not {nnx.BatchNorm, nn.CSLAConv, nn.ConvNorm, nn.RepGhostConv} & set(left)
    names = parameter_shapes(deployed)
    block = {name.removeprefix("blocks/1/0/") for name in names if name.startswith("blocks/1/0/")}
    convs = ("ghost1/primary", "ghost1/cheap", "ghost2/primary", "ghost2/cheap", "depthwise")
    convs += ("shortcut/0", "shortcut/1", "se/down", "se/up")
    assert block == {f"{conv}/{leaf}" for conv in convs for leaf in ("kernel", "bias")}
    assert {"stem/conv/bias", "blocks/2/0/conv/bias", "conv_head/bias"} <= set(names)
    cheap = model.blocks[1][0].ghost2.cheap
    norm = cheap.bn_identity if kind == "repghost" else cheap.bn
    norm.mean[...] += 3 * jnp.sqrt(norm.var[...])  # statistics that the deployed kernels do not know
    assert relative(logits, run(model, x)) > WRONG


def test_the_authors_deployed_form_keeps_the_other_batch_norms(x64):
    x = random_input(3, 17, 16, 3)
    model = settled(randomised(tiny("repghost")), x)
    merged = fuse(model, only=(nn.RepGhostConv,))
    assert relative(run(merged, x), run(model, x)) <= EXACT
    assert {type(m) for path, m in named_modules(merged) if path.endswith("/cheap")} == {nnx.Conv}
    before, after = (
        {path for path, m in named_modules(n) if isinstance(m, nnx.BatchNorm)} for n in (model, merged)
    )
    assert after == {path for path in before if "/cheap/" not in path}


def test_in_single_precision_too():
    x = random_input(2, 9, 8, 3).astype(np.float32)
    model = with_dropout("repghost")
    assert relative(run(fuse(model), x), run(model, x)) <= SINGLE


def test_scales_start_by_the_published_depth_rule():
    """sqrt(2 / (n + 1)), n counting ghost modules since width or resolution changed; the identity at 1."""
    model = full("0.5")
    depths = [[1], [1], [2], [1], [2], [1], [2, 3, 4, 1, 2], [1], [2, 3, 4, 5]]
    scales = model.depth_scales()
    for a, stage in enumerate(depths):
        for b, depth in enumerate(stage):
            for name, n in (("ghost1", 2 * depth - 1), ("ghost2", 2 * depth)):
                vectors = scales.entries[f"blocks/{a}/{b}/{name}/cheap/conv/kernel"].vectors
                np.testing.assert_array_equal(
                    vectors["3x3"], np.full_like(vectors["3x3"], (2 / (n + 1)) ** 0.5)
                )
                np.testing.assert_array_equal(vectors["identity"], np.ones_like(vectors["identity"]))
    assert sum(len(stage) for stage in depths) * 2 == len(scales.entries)
    assert scales.metadata.architecture == "GhostNet-0.5"
    ones = model.unit_scales().entries["blocks/8/3/ghost2/cheap/conv/kernel"].vectors
    assert all((np.asarray(v) == 1).all() for v in ones.values())


def signed(scales, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda v: v * jnp.asarray(rng.normal(size=v.shape), v.dtype), scales)


@pytest.mark.parametrize("kind", ["search", "csla"])
def test_scales_go_in_and_come_out(kind):
    scales = signed(tiny().depth_scales())
    assert list(scales.entries) == KERNELS

    @jax.jit  # which leaves out the draws of what is not asked for
    def extract():
        models = [
            RepGhostNet(TINY, kind=kind, num_classes=5, scales=given, rngs=nnx.Rngs(0))
            for given in (scales, None)
        ]
        return [extract_scales(model) for model in models]

    found, start = extract()
    assert found.branch_sets == scales.branch_sets
    jax.tree.map(np.testing.assert_array_equal, found.vectors, scales.vectors)
    jax.tree.map(np.testing.assert_array_equal, start.vectors, tiny().depth_scales().vectors)


def test_the_form_reaches_every_layer():
    for form in ("merged", "branches"):
        layers = [m for _, m in named_modules(tiny("search", form=form)) if isinstance(m, nn.CSLAConv)]
        assert [m.form for m in layers] == [form] * 4


def test_reinitialising_scales_the_draw_and_adds_u_at_the_centre():
    """The draw of a depthwise 3x3 lies within 1/3, one over the square root of its nine inputs."""
    scales, target = signed(tiny().depth_scales()), randomised(tiny(), dtype=jnp.float32)
    new = reinitialize(target, scales, rngs=nnx.Rngs(1), allow_trained=True)
    before, after = (paths.named_leaves(nnx.state(m, nnx.Param))[0] for m in (target, new))
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


def test_the_twin_of_the_target_is_the_csla_network(x64):
    scales = signed(tiny().depth_scales())
    target = randomised(tiny())
    weights = sample_weights(scales, jax.random.key(0), dtype=jnp.float64)
    twin = csla_twin(target, scales, weights)
    shapes = {path: v.shape for path, v in paths.named_leaves(nnx.state(twin))[0].items()}
    assert shapes == {path: v.shape for path, v in paths.named_leaves(nnx.state(tiny("csla")))[0].items()}
    merged = merge_weights(scales, weights)
    np.testing.assert_array_equal(twin.blocks[1][0].ghost1.cheap.conv.merged_kernel(), merged[KERNELS[2]])


def test_training_is_that_of_the_twin():
    """With dropout, and batch norm in training mode. Biases start at 0, as in a fresh network: those in front
    of another batch norm have no gradient and stay there but for rounding, which must not count."""
    rng = np.random.default_rng(0)
    batches = [
        {"image": rng.normal(size=(4, 8, 8, 3)).astype(np.float32), "label": rng.integers(0, 5, 4)}
        for _ in range(5)
    ]
    model = with_dropout("target", dataclasses.replace(TINY, stages=TINY.stages[1:]))
    for _, module in named_modules(model):
        if isinstance(module, nnx.BatchNorm):
            module.bias[...] = jnp.zeros_like(module.bias[...])
    model.train()
    scales = signed(model.depth_scales())
    result = verify_equivalence(model, scales, batches, tolerance=TRAINED, rngs=nnx.Rngs(1))
    assert result.equivalent
    assert result.movement > 0.01
    assert {"blocks/0/0/ghost1/cheap/conv/kernel", "blocks/0/0/ghost2/cheap/bn/mean"} < set(
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
    assert tiny().dropout.rngs is None
    drop = nnx.eval_shape(lambda: RepGhostNet(TINY, num_classes=5, rngs=nnx.Rngs(0))).dropout
    assert (drop.rate, drop.deterministic) == (0.2, False)


def test_bfloat16_networks_give_float32_logits():
    for kind in GHOST_KINDS:
        model = abstract(
            RepGhostNet, TINY, kind=kind, num_classes=7, in_channels=1, dropout=0.0, dtype=jnp.bfloat16
        )
        logits = nnx.eval_shape(lambda m, x: m(x), model, jnp.zeros((2, 8, 8, 1)))
        assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
        assert {p.dtype for p in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype(jnp.float32)}


def test_what_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="`kind` is 'rep': it must be one of target, search, csla, repghost"):
        tiny("rep")
    other = abstract(
        RepGhostNet, dataclasses.replace(TINY, name="other", width=2.0), num_classes=5, dropout=0.0
    ).unit_scales()
    with pytest.raises(ValueError, match=r"searched on GhostNet-other\) do not fit the model: 4 misshapen"):
        tiny("search", scales=other)
    with pytest.raises(TypeError, match="`only` names Linear, for which no deployed form is registered"):
        fuse(tiny(), only=(nnx.Linear,))
