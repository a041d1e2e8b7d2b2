"""RepMLPNet: published counts, the mixer against loops, the order of the tiles, and deploying."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiers
import tolerances
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

from repopt_jax import extract_scales, fuse, prepare, to_structure, verify_equivalence
from repopt_jax.core.branches import Kernel, Local
from repopt_jax.core.published import repmlp, repopt_mlp, scaled
from repopt_jax.core.structure import Structure
from repopt_jax.models import REPMLP_VARIANTS, RepMLPNet, RepMLPVariant
from repopt_jax.models.repmlp import Mixer, mixer_geometry
from repopt_jax.nn import Branched, Merged
from repopt_jax.nn.block import ChannelAffine, PreNorm, SharedNorm
from repopt_jax.surgery import find_layers
from repopt_jax.surgery.modules import named_modules

pytestmark = pytest.mark.once

# With 1000 classes, counted on the published code: (in training, with the dense layers merged)
PUBLISHED = {
    "T224": (38_293_608, 38_331_720),
    "T256": (58_687_848, 58_739_400),
    "B224": (68_242_712, 68_332_664),
    "B256": (96_447_512, 96_568_184),
    "D256": (86_887_648, 86_985_280),
    "L256": (117_641_560, 117_820_600),
}

TINY = RepMLPVariant("tiny", (4, 8, 8), (1, 2, 1), (6, 3, 3), (2, 4, 8), patch=2)
SHORT = RepMLPVariant("short", (4,), (1,), (2,), (2,), patch=2)


def network(variant=TINY, mode="repmlp", **options):
    """The shapes of a network, by default with the branches that it is trained with."""
    return made_ready(RepMLPNet, mode, variant, **{"num_classes": 5, **options})


@pytest.mark.parametrize("name", tiers.often(PUBLISHED, "T224"))
def test_published_numbers_of_parameters(name):
    model = network(REPMLP_VARIANTS[name], num_classes=1000)
    assert (count(model), deployed_count(model, only=(Branched,))) == PUBLISHED[name]
    assert name.endswith(str(REPMLP_VARIANTS[name].image_size))


def test_every_variant_is_counted():
    assert set(PUBLISHED) == set(REPMLP_VARIANTS) - {"digits"}


def test_a_plain_network_deploys_as_the_trained_one():
    assert deployed_count(network(mode="plain")) == deployed_count(network())
    # What is left of the norms before the mixers; the others are in kernels and biases.
    merged, fused = deployed_count(network(), only=(Branched,)), deployed_count(network())
    folded = {"stem and embeddings": 4 + 8 + 8, "up": 4 * (4 + 2 * 8 + 8), "down": 4 + 2 * 8 + 8}
    norms_before = 4 + 2 * 8 + 8 + 8  # of `up` and the head: into kernels that have, or get, a bias
    assert merged - fused == sum(folded.values()) + 2 * norms_before


def affine(path, channels):
    return {f"{path}/scale": (channels,), f"{path}/bias": (channels,)}


def test_paths_and_shapes_of_parameters():
    expected = {"head/conv/kernel": (8, 5), "head/conv/bias": (5,), **affine("head/pre", 8)}
    inputs, factor = 3, 2
    for stage, (width, units, side, sets) in enumerate(
        zip(TINY.widths, TINY.units, TINY.sides, TINY.sets, strict=True)
    ):
        expected |= {f"stages/{stage}/0/conv/kernel": (factor, factor, inputs, width)}
        expected |= affine(f"stages/{stage}/0/bn", width)
        for unit in range(1, units + 1):
            path = f"stages/{stage}/{unit}"
            kernels = {
                "mixer/gate/down": (1, 1, width, width // 4),
                "mixer/gate/up": (1, 1, width // 4, width),
                "up/conv": (1, 1, width, 4 * width),
                "down/conv": (1, 1, 4 * width, width),
            }
            expected |= {f"{path}/{name}/kernel": shape for name, shape in kernels.items()}
            expected |= {
                f"{path}/mixer/gate/down/bias": (width // 4,),
                f"{path}/mixer/gate/up/bias": (width,),
            }
            norms = {"norm": width, "up/pre": width, "up/bn": 4 * width, "down/bn": width}
            for name, channels in norms.items():
                expected |= affine(f"{path}/{name}", channels)
            branches = {
                f"{side}x{side}": (side, side, 1, sets * side**2),
                "local_1x1": (1, 1, 1, sets),
                "local_3x3": (3, 3, 1, sets),
            }
            for name, shape in branches.items():
                expected |= {f"{path}/mixer/fc/conv/weights/{name}": shape}
                expected |= affine(f"{path}/mixer/fc/conv/norms/{name}", sets)
        inputs, factor = width, 2
    assert parameter_shapes(network()) == expected


def test_the_mixers_are_what_is_re_parameterized():
    model = network(mode="plain")
    expected = [f"stages/{stage}/{unit}/mixer/fc" for stage, unit in ((0, 1), (1, 1), (1, 2), (2, 1))]
    assert [layer.name.removesuffix("/conv") for layer in find_layers(model).values()] == expected


def test_images_of_several_sizes():
    """Multiples of the variant's own size, with sides of their own."""
    for size in ((24, 24), (24, 72), (48, 24)):
        logits = nnx.eval_shape(lambda m, x: m(x), network(), jnp.zeros((2, *size, 3)))
        assert (logits.shape, logits.dtype) == ((2, 5), jnp.float32)


# -- the mixer


CHANNELS, SIDE, SETS, MAP = 8, 3, 4, (6, 9)


def mixer(mode="repmlp", seed=0, **options):
    """A mixer with several tiles a map, and two channels to a kernel."""

    def build(rngs):
        model = Mixer(CHANNELS, SIDE, SETS, **options, rngs=rngs)
        structures = {"repmlp": repmlp, "search": repopt_mlp}
        return to_structure(model, structures[mode], "fc/conv", rngs=rngs) if mode != "plain" else model

    return randomised(abstract(build), seed=seed)


def mixer_by_hand(model, x, *, without="", gate_of_tiles=False, sets_first=False):
    """Tile by tile, channel by channel, position by position; convolutions inside each tile."""
    layer, y = model.fc.conv, np.zeros(x.shape)
    for name, norm in layer.norms.items():
        if name == without:
            continue
        w, z = np.asarray(layer.weights[name][...]), np.zeros(x.shape)
        for i in range(0, x.shape[1], SIDE):
            for j in range(0, x.shape[2], SIDE):
                tile = x[:, i : i + SIDE, j : j + SIDE]
                for c in range(CHANNELS):
                    s = c * SETS // CHANNELS if sets_first else c % SETS
                    if name.startswith("local"):
                        of_tile = conv_by_hand(tile[..., c : c + 1], w[..., s : s + 1])[..., 0]
                    else:
                        kernel = w.reshape(SIDE, SIDE, SETS, SIDE, SIDE)[:, :, s]
                        of_tile = np.einsum("nij,ijpq->npq", tile[..., c], kernel)
                    z[:, i : i + SIDE, j : j + SIDE, c] = of_tile
        of_channel = [c * SETS // CHANNELS if sets_first else c % SETS for c in range(CHANNELS)]
        shared = {n: np.asarray(getattr(norm, n)[...])[of_channel] for n in ("scale", "bias", "mean", "var")}
        y = y + (z - shared["mean"]) / np.sqrt(shared["var"] + 1e-5) * shared["scale"] + shared["bias"]
    mean = x[:, :SIDE, :SIDE].mean((1, 2)) if gate_of_tiles else x.mean((1, 2))
    down, up = model.gate.down, model.gate.up
    hidden = np.maximum(mean @ np.asarray(down.kernel[0, 0]) + np.asarray(down.bias[...]), 0)
    gate = 1 / (1 + np.exp(-(hidden @ np.asarray(up.kernel[0, 0]) + np.asarray(up.bias[...]))))
    return y * gate[:, None, None]


def test_a_mixer_and_its_deployed_form_are_loops_over_tiles(x64):
    model, x = mixer(), random_input(2, *MAP, CHANNELS)
    expected = mixer_by_hand(model, x)
    fused = fuse(model)
    assert (type(fused.fc.conv), fused.fc.bn) == (nnx.Conv, None)
    assert fused.fc.conv.kernel.shape == (SIDE, SIDE, 1, SETS * SIDE**2)
    for y in (model(x), fused(x)):
        assert relative(y, expected) <= tolerances.MIXER


@pytest.mark.parametrize(
    "mistake",
    [
        *({"without": name} for name in ("3x3", "local_1x1", "local_3x3")),
        {"gate_of_tiles": True},
        {"sets_first": True},
    ],
    ids=str,
)
def test_mistakes_in_a_mixer_would_be_noticed(mistake, x64):
    """Negative control: a branch, the mean over the whole map, which channel has which kernel."""
    model, x = mixer(), random_input(2, *MAP, CHANNELS)
    x[:, SIDE:] += 1  # so that tiles differ in their means
    assert relative(mixer_by_hand(model, x, **mistake), model(x)) > tolerances.MIXER_WRONG


def test_the_norm_of_a_plain_mixer_is_that_of_maps(x64):
    """In training: statistics over images, tiles and positions, of all channels that have one kernel."""
    model, x = mixer("plain"), random_input(2, *MAP, CHANNELS)
    norm = model.fc.bn
    assert isinstance(norm, SharedNorm)
    assert fuse(model).fc.conv.bias.shape == (SETS * SIDE**2,)
    assert relative(fuse(model)(x), model(x)) <= tolerances.MIXER
    apart = np.moveaxis(x.reshape(2, *MAP, CHANNELS // SETS, SETS), 3, 1).reshape(-1, *MAP, SETS)
    outputs = np.asarray(model.fc.conv(apart))
    maps = outputs.reshape(*outputs.shape[:-1], SETS, SIDE**2)
    before = np.asarray(norm.mean[...])
    expected = norm_by_hand(np.swapaxes(maps, -1, -2), norm)
    assert relative(norm(outputs), np.swapaxes(expected, -1, -2).reshape(outputs.shape)) <= tolerances.MIXER
    model.train()
    model(x)
    moved = 0.9 * before + 0.1 * maps.mean((0, 1, 2, 4))
    assert relative(norm.mean[...], moved) <= tolerances.MIXER
    assert norm.mean.shape == (SETS,)


# -- the order of the tiles


def passing(sets, published_order):
    """A mixer of tiles of 2 x 2 whose dense layer passes everything and whose gate is 1/2."""
    model = Mixer(CHANNELS, 2, sets, published_order=published_order, rngs=nnx.Rngs(0))
    model.fc.conv.kernel.set_value(
        jnp.asarray(
            np.broadcast_to(np.eye(4).reshape(2, 2, 1, 1, 4), (2, 2, 1, sets, 4)).reshape(2, 2, 1, -1)
        )
    )
    model.fc.bn = nnx.data(None)
    nnx.update(model.gate, jax.tree.map(jnp.zeros_like, nnx.state(model.gate)))
    return model


def test_what_goes_through_unchanged_returns_to_its_place(x64):
    x = random_input(3, 4, 4, CHANNELS)
    for sets in (1, 4, CHANNELS):
        np.testing.assert_array_equal(2 * passing(sets, published_order=False)(x), x)


def test_the_published_order_takes_tiles_for_groups_of_channels(x64):
    """Of 2 x 2 tiles and two groups of channels a quarter stays; all of it where either is one."""
    x = random_input(3, 4, 4, CHANNELS)
    y = 2 * passing(4, published_order=True)(x)
    assert np.mean(np.asarray(y) == x) == 0.25
    # Row r of an image, counted tile by tile and within it group by group, goes where row r is of an image
    # that is counted group by group.
    rows = [(i, j, g) for i in (0, 2) for j in (0, 2) for g in (0, 4)]
    places = [(i, j, g) for g in (0, 4) for i in (0, 2) for j in (0, 2)]
    for (i, j, g), (a, b, c) in zip(rows, places):
        expected = x[:, i : i + 2, j : j + 2, g : g + 4]
        np.testing.assert_array_equal(y[:, a : a + 2, b : b + 2, c : c + 4], expected)
    np.testing.assert_array_equal(2 * passing(CHANNELS, published_order=True)(x), x)
    one_tile = x[:, :2, :2]
    np.testing.assert_array_equal(2 * passing(4, published_order=True)(one_tile), one_tile)


def test_the_order_is_an_option_of_the_network():
    model = network(published_order=True)
    assert all(m.published_order for _, m in named_modules(model) if isinstance(m, Mixer))
    with pytest.raises(AssertionError):
        assert all(m.published_order for _, m in named_modules(network()) if isinstance(m, Mixer))


# -- deploying


@pytest.fixture
def trained(x64):
    """A network with moved statistics, and images with several tiles a map."""
    x = random_input(3, 24, 48, 3)
    return settled(randomised(network()), x), x


@pytest.mark.parametrize("options", [{}, {"only": (Branched,)}], ids=["all", "branches"])
def test_a_deployed_network_computes_the_same(options, trained):
    model, x = trained
    logits = run(fuse(model, **options), x)
    assert relative(logits, run(model, x)) <= tolerances.DEPLOYED_MLP["float64"]
    norm = model.stages[1][1].mixer.fc.conv.norms["local_3x3"]  # what the deployed kernels do not know
    norm.mean[...] += jnp.sqrt(norm.var[...])
    assert relative(logits, run(model, x)) > tolerances.MIXER_WRONG


@pytest.mark.parametrize(
    ("variant", "size"), [(SHORT, 8), pytest.param(TINY, 24, marks=pytest.mark.long)], ids=["short", "tiny"]
)
def test_in_single_precision_too(variant, size):
    x = random_input(3, size, size, 3).astype(np.float32)
    model = settled(randomised(network(variant), dtype=jnp.float32), x)
    assert relative(run(fuse(model), x), run(model, x)) <= tolerances.DEPLOYED_MLP["float32"]


def test_what_is_left_of_the_batch_norms():
    """Those before the mixers, whose kernels are for several channels each, become factors and shifts."""

    def deployed(model):
        model.eval()
        return fuse(model)

    model = nnx.eval_shape(deployed, network())
    modules = dict(named_modules(model))
    assert not [path for path, m in modules.items() if isinstance(m, nnx.BatchNorm)]
    left = [path for path, m in modules.items() if isinstance(m, ChannelAffine)]
    assert left == [f"stages/{stage}/{unit}/norm" for stage, unit in ((0, 1), (1, 1), (1, 2), (2, 1))]
    assert model.head.pre is None
    merged = nnx.eval_shape(lambda m: (m.eval(), fuse(m, only=(Branched,)))[1], network())
    norms = [path for path, m in named_modules(merged) if isinstance(m, PreNorm)]
    assert len(norms) == 2 * 4 + 1


# -- merged before use, and in the optimizer


@pytest.mark.parametrize("constant", [False, True])
def test_without_norms_a_mixer_can_merge_before_it_runs(constant, x64):
    """Outputs and gradients; a scale for each output, of either sign."""
    structure = repopt_mlp(mixer_geometry(SETS, SIDE))
    structure = structure.with_constants() if constant else structure
    x = random_input(2, *MAP, SETS)
    layers = [randomised(abstract(kind, structure, param_dtype=jnp.float64)) for kind in (Merged, Branched)]

    @nnx.jit
    def outputs_and_gradients(layer, x):
        return layer(x), nnx.grad(lambda m: jnp.sum(jnp.sin(m(x))))(layer)

    (y, gradients), (expected, of_branches) = (outputs_and_gradients(layer, x) for layer in layers)
    assert relative(y, expected) <= tolerances.MIXER
    leaves = jax.tree.leaves(gradients)
    assert len(leaves) == (3 if constant else 6)
    for found, theirs in zip(leaves, jax.tree.leaves(of_branches), strict=True):
        assert relative(found, theirs) <= tolerances.MIXER
    assert structure.with_constants().branch_set().names == ("3x3", "local_1x1", "local_3x3")


def test_a_search_network_has_the_branches_of_the_structure():
    model = network(SHORT, "search")
    (layer,) = [m for _, m in named_modules(model) if isinstance(m, Merged)]
    expected = scaled(Kernel((2, 2)), Local((1, 1)), Local((3, 3)))
    assert layer.structure == Structure(mixer_geometry(2, 2), expected, norm=True)


def test_from_search_to_repopt(x64):
    """Scales of a search network in the plain one, by the paths of its kernels."""
    plain = RepMLPNet(SHORT, num_classes=3, rngs=nnx.Rngs(0))
    scales = extract_scales(prepare(plain, "search", rngs=nnx.Rngs(1)).model)
    assert {path: entry.branches.names for path, entry in scales.entries.items()} == {
        "stages/0/1/mixer/fc/conv/kernel": ("2x2", "local_1x1", "local_3x3")
    }
    prepared = prepare(plain, "repopt", scales=scales, rngs=nnx.Rngs(2))
    redrawn, kept = (m.stages[0][1].mixer.fc.conv.kernel[...] for m in (prepared.model, plain))
    assert redrawn.shape == kept.shape
    assert relative(redrawn, kept) > 0.1


def test_repopt_trains_the_plain_network_as_the_branches(x64):
    """The method on a dense layer over maps, where P(g) is no multiplier: the package's own check."""
    model = RepMLPNet(SHORT, num_classes=3, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    scales = jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape)), model.unit_scales())
    batches = [{"image": rng.normal(size=(4, 8, 8, 3)), "label": rng.integers(0, 3, 4)} for _ in range(3)]
    result = verify_equivalence(model, scales, batches, rngs=nnx.Rngs(1))
    assert result.equivalent, str(result)


# -- what is refused


def test_what_does_not_fit_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="`sets` is 3: it must divide the 8 channels"):
        Mixer(8, 2, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="`sets` is 3 in stage 1: it must divide the stage's 8 channels"):
        RepMLPVariant("odd", (4, 8), (1, 1), (4, 2), (2, 3))
    with pytest.raises(ValueError, match=r"2 `widths`, 1 `units`.* each needs one for every stage"):
        RepMLPVariant("odd", (4, 8), (1,), (4, 2), (2, 4))
    with pytest.raises(ValueError, match=r"map has 6 x 8 positions.* 3 x 3: give a map whose sides .* of 3"):
        nnx.eval_shape(lambda x: Mixer(8, 3, 4, rngs=nnx.Rngs(0))(x), jnp.zeros((1, 6, 8, 8)))
    with pytest.raises(ValueError, match=r"images of 24 x 32 pixels .* resize them to 24, or to multiples"):
        nnx.eval_shape(lambda m, x: m(x), network(), jnp.zeros((1, 24, 32, 3)))
    with pytest.raises(ValueError, match="`num_classes` is 0"):
        network(num_classes=0)


def test_the_structure_is_refused_for_a_layer_without_maps():
    build = functools.partial(prepare, mode="repmlp")
    model = nnx.Sequential(nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="needs maps of 9 outputs, one for each position of the window"):
        build(model, rngs=nnx.Rngs(0))


def test_bfloat16_networks_give_float32_logits():
    model = network(in_channels=1, dtype=jnp.bfloat16)
    logits = nnx.eval_shape(lambda m, x: m(x), model, jnp.zeros((2, 24, 24, 1)))
    assert (logits.shape, logits.dtype) == ((2, 5), jnp.float32)
    assert {p.dtype for p in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype(jnp.float32)}
    small = model.stages[0]
    y = nnx.eval_shape(lambda m, x: m(x), small[1], jnp.zeros((2, 12, 12, 4), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
