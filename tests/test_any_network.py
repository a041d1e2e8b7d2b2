"""Networks that know nothing of this package: searched, trained, checked and deployed as they are."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiers
from any_networks import NETWORKS, BasicBlock, drawn, random_scales, squared_error
from flax import nnx
from networks import abstract, randomised, relative, values

from repopt_jax import Geometry, fuse
from repopt_jax.core import paths
from repopt_jax.core.branches import Average, BranchSet, Identity, Kernel
from repopt_jax.core.published import STRUCTURES
from repopt_jax.core.scales import Scales, load_scales, save_scales
from repopt_jax.models import VGGVariant, vgg
from repopt_jax.nn import Branched, Merged
from repopt_jax.optim.sgd import repopt_mask
from repopt_jax.surgery.choose import find_structures
from repopt_jax.surgery.fuse import FoldedNorm
from repopt_jax.surgery.layers import find_branches, find_layers
from repopt_jax.surgery.modules import aliases, named_modules, replace_modules
from repopt_jax.surgery.prepare import Mode, prepare
from repopt_jax.surgery.reinitialize import merge_weights, reinitialize, sample_weights
from repopt_jax.surgery.search import csla_twin, depth_scales, extract_scales, law_scales, to_search
from repopt_jax.surgery.structures import to_repvgg, to_structure
from repopt_jax.verify.equivalence import verify_equivalence

EQUIVALENT = 1e-10  # relative, float64, 3 steps; measured: 2e-14 at most
WRONG = 1e-4  # what a missing multiplier or decay before it exceeds; measured: 2e-3 at least
EXACT = 1e-10  # of the largest output, float64: deployed networks; measured: 1e-14 at most


run = nnx.jit(lambda model, x: model(x))

# The others are `long` where the whole network is trained: these have layers of every kind among them, shared
# and stacked ones, of one and of three axes, depthwise, strided, dilated and circular.
SMALL = ("shared head", "scanned stack", "1-D", "3-D", "MLP")


# -- what is found


@pytest.mark.parametrize("name", NETWORKS)
def test_every_convolution_and_dense_layer_is_found_under_its_path_in_the_state(name):
    case = NETWORKS[name]
    model = case.abstract()
    layers = find_layers(model)
    assert len(layers) == case.layers
    leaves = values(jax.tree.map(lambda v: np.zeros(v.shape), nnx.state(model)))
    assert {path: layer.kernel for path, layer in layers.items()} == {p: leaves[p].shape for p in layers}
    for path, layer in layers.items():
        assert layer.path == path
        assert layer.has_bias == (f"{layer.name}/bias" in leaves)


def test_layers_are_described_by_what_they_sample():
    layers = find_layers(NETWORKS["1-D"].abstract())
    stem, wide = layers["stem/kernel"], layers["wide/kernel"]
    assert stem.geometry == Geometry((5,), 2, 4, strides=2, pad_mode="wrap")
    assert wide.geometry == Geometry((3,), 4, 4, dilation=2, padding=((2, 2),))
    assert (stem.has_bias, wide.has_bias) == (True, False)
    assert layers["depthwise/kernel"].geometry.groups == 4
    assert layers["head/kernel"].geometry == Geometry((), 4, 3)
    scanned = find_layers(NETWORKS["scanned stack"].abstract())
    assert (scanned["blocks/conv/kernel"].stack, scanned["blocks/mix/kernel"].stack) == ((3,), (3,))
    assert scanned["blocks/conv/kernel"].kernel == (3, 3, 4, 4)
    sets = find_branches(NETWORKS["ResNet-18"].abstract())
    assert sets["stages/1/0/conv1/kernel"].names == ("3x3", "1x1")  # strided
    assert sets["stages/1/1/conv1/kernel"].names == ("3x3", "1x1", "identity")
    assert sets["stages/1/1/conv1/kernel"].groups == 2
    assert not any("downsample" in path or "fc" in path for path in sets)  # one branch only
    asked = find_branches(NETWORKS["ResNet-18"].abstract(), r".*/downsample/.*")
    assert asked["stages/1/0/downsample/layers/0/kernel"].names == ("1x1",)
    assert find_branches(NETWORKS["1-D"].abstract())["depthwise/kernel"].names == ("3", "1")


def test_select_by_path_predicate_and_type():
    model = NETWORKS["U-Net"].abstract()
    by_path = list(find_layers(model, r"(enter|leave)/.*"))
    assert by_path == [
        f"{block}/{conv}/kernel" for block in ("enter", "leave") for conv in ("conv1", "conv2")
    ]
    assert list(find_layers(model, lambda path, m: path == "down" and m.strides == 2)) == ["down/kernel"]
    mlp = NETWORKS["MLP"].abstract()
    assert list(find_layers(mlp, (nnx.Linear, nnx.Conv))) == [f"layers/{i}/kernel" for i in range(4)]


class ManyPlaces(nnx.Module):
    """Layers under several names, in lists and dicts of more than ten, before and after one another."""

    def __init__(self, *, rngs):
        layers = [nnx.Linear(2, 2, rngs=rngs) for _ in range(13)]
        self.zeta = layers[0]
        self.Early = nnx.Dict({"b": layers[0], "a": layers[10], "10": layers[3], "9": layers[3]})
        self.layers = nnx.List(layers)
        self.also = nnx.List([nnx.List([layers[11], layers[2]]), nnx.Dict(x=layers[5])])
        self.a10 = self.a9 = layers[7]


def child(module, part):
    return module[int(part)] if isinstance(module, nnx.List) else getattr(module, part)


def test_a_shared_layer_has_one_path_everywhere():
    model = nnx.eval_shape(lambda: ManyPlaces(rngs=nnx.Rngs(0)))
    kernels = {p for p, _ in paths.named_leaves(nnx.state(model))[0].items() if p.endswith("kernel")}
    assert len(kernels) == 13
    assert set(find_layers(model)) == kernels
    visited = set()
    replace_modules(
        model, lambda path, m: visited.add(f"{path}/kernel") if isinstance(m, nnx.Linear) else None
    )
    assert visited == kernels
    others = aliases(model)
    assert {f"{own}/kernel" for own in others.values()} <= kernels
    assert set(others).isdisjoint(path for path, _ in named_modules(model))
    modules = dict(named_modules(model))
    for other, own in others.items():
        assert functools.reduce(child, other.split("/"), model) is modules[own]
    assert others["layers/10"] == "Early/a"
    assert others["a9"] == "a10"


# -- the equivalence


@pytest.mark.parametrize("name", tiers.often(NETWORKS, *SMALL))
def test_the_equivalence_holds(name):
    case = NETWORKS[name]
    model = case.fresh()
    result = verify_equivalence(
        model, random_scales(find_branches(model)), case.batches(), loss=squared_error, rngs=nnx.Rngs(1)
    )
    assert result.max_difference <= EQUIVALENT
    assert result.movement > 1e-3
    assert set(find_branches(model)) <= set(result.differences)


@pytest.mark.parametrize(
    ("name", "early"),
    tiers.often([("MLP", True), ("MLP", False), ("scanned stack", False)], ("MLP", True), ("MLP", False)),
)
def test_a_wrong_optimizer_is_another_training(name, early):
    """Negative control of the above: decay before the multiplier, or no multiplier."""
    case = NETWORKS[name]
    model = case.fresh()
    scales = random_scales(find_branches(model))
    decay, sgd = optax.add_decayed_weights(0.05), optax.sgd(0.05)
    result = verify_equivalence(
        model,
        scales,
        case.batches(2),
        optimizer=optax.chain(decay, repopt_mask(scales), sgd) if early else optax.chain(decay, sgd),
        twin_optimizer=optax.chain(decay, sgd),
        loss=squared_error,
        rngs=nnx.Rngs(1),
    )
    assert result.max_difference > WRONG
    assert ("decay comes before" if early else "repopt_mask(scales) is missing") in result.reasons[0]


CUSTOM = {
    "conv1": [Kernel((5, 5)), Kernel((3, 3), (2, 2)), Kernel((1, 5)), Kernel((5, 1)), Identity()],
    "conv2": [Kernel((3, 3)), Kernel((1, 3)), Kernel((3, 1))],
    "conv3": [Kernel((3, 3)), Average(), Identity()],
}


class Custom(nnx.Module):
    def __init__(self, *, rngs):
        self.conv1 = nnx.Conv(4, 4, (5, 5), rngs=rngs)
        self.conv2 = nnx.Conv(4, 4, (3, 3), strides=2, padding=1, rngs=rngs)
        self.conv3 = nnx.Conv(4, 4, (3, 3), padding="CIRCULAR", feature_group_count=2, rngs=rngs)

    def __call__(self, x):
        return self.conv3(jnp.tanh(self.conv2(jnp.tanh(self.conv1(x))))).mean((1, 2))


def test_branch_sets_of_one_s_own():
    model = drawn(nnx.eval_shape(lambda: Custom(rngs=nnx.Rngs(0))))
    sets = find_branches(model, branches=CUSTOM)
    assert {path: bs.branches for path, bs in sets.items()} == {
        f"{name}/kernel": tuple(branches) for name, branches in CUSTOM.items()
    }
    by_function = find_branches(model, branches=lambda layer: CUSTOM.get(layer.name))
    ready_made = find_branches(model, branches=lambda layer: sets[layer.path])
    assert by_function == ready_made == sets
    some = find_branches(model, r"conv[12]", branches={r"conv2": CUSTOM["conv2"]})
    assert some["conv1/kernel"].names == ("5x5", "1x1", "identity")
    assert some["conv2/kernel"] == sets["conv2/kernel"]
    every = find_branches(model, r"conv[23]", [Kernel((3, 3)), Kernel((1, 3))])
    assert {bs.names for bs in every.values()} == {("3x3", "1x3")}
    rng = np.random.default_rng(0)
    batches = [{"x": rng.normal(size=(3, 8, 8, 4)), "y": rng.normal(size=(3, 4))} for _ in range(3)]
    result = verify_equivalence(model, random_scales(sets), batches, loss=squared_error, rngs=nnx.Rngs(1))
    assert result.max_difference <= EQUIVALENT
    assert result.movement > 1e-3
    search = to_search(model, branches=CUSTOM, trained=False, rngs=nnx.Rngs(0))
    assert extract_scales(search).branch_sets == sets


# -- the search


@pytest.mark.parametrize("name", tiers.often(NETWORKS, "U-Net", *SMALL))
def test_a_search_network_of_any_network(name, tmp_path):
    case = NETWORKS[name]
    model = case.fresh()
    before, types = values(model), [type(m) for _, m in named_modules(model)]
    search = to_search(model, trained=False, rngs=nnx.Rngs(3))
    assert [type(m) for _, m in named_modules(model)] == types
    chex.assert_trees_all_equal(values(model), before)
    sets = find_branches(model)
    layers = {f"{p}/kernel": m for p, m in named_modules(search) if isinstance(m, Merged)}
    assert set(layers) == set(sets)
    after = values(search)
    for path, value in after.items():
        layer, *_ = re.split("/weights/|/scales/", path)
        assert path in before or f"{layer}/kernel" in sets
        if path in before:
            np.testing.assert_array_equal(value, before[path])
    batch = case.batches(1)[0]
    output = run(search, batch["x"])
    assert output.shape == batch["y"].shape
    assert np.isfinite(output).all()

    scales = extract_scales(search)
    assert scales.branch_sets == sets
    chex.assert_trees_all_equal(scales.vectors, depth_scales(model).vectors)
    save_scales(tmp_path / "scales", scales)
    loaded = load_scales(tmp_path / "scales", find_branches(model))
    chex.assert_trees_all_equal(loaded.vectors, scales.vectors)


@pytest.mark.parametrize("name", ["shared head", "scanned stack", "1-D"])
def test_a_network_re_initialised(name):
    case = NETWORKS[name]
    model = case.fresh()
    scales = random_scales(find_branches(model))
    fresh = reinitialize(model, scales, rngs=nnx.Rngs(5))
    kernels = merge_weights(scales, sample_weights(scales, nnx.Rngs(5).params()))
    before = values(model)
    for path, value in values(fresh).items():
        np.testing.assert_array_equal(value, kernels.get(path, before[path]))
    assert np.isfinite(run(fresh, case.batches(1)[0]["x"])).all()


def test_a_stack_is_drawn_layer_by_layer():
    model = NETWORKS["scanned stack"].fresh()
    search = to_search(model, scales="ones", rngs=nnx.Rngs(0))
    kernel = np.asarray(search.blocks.conv.merged_kernel())
    assert kernel.shape == model.blocks.conv.kernel.shape
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert relative(kernel[i], kernel[j]) > 0.1


differentiate = nnx.jit(nnx.value_and_grad(squared_error))


def train(model, tx, batch, steps=6):
    """A training loop as anybody writes it; returns the losses."""
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    update = nnx.jit(lambda optimizer, model, gradients: optimizer.update(model, gradients))
    losses = []
    for _ in range(steps):
        loss, gradients = differentiate(model, batch)
        update(optimizer, model, gradients)
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("name", tiers.often(NETWORKS, *SMALL))
def test_it_trains_with_one_line_changed(name):
    case = NETWORKS[name]
    (batch,) = case.batches(1)
    ends = []
    for masked in (False, True):
        model = case.fresh()
        tx = optax.sgd(0.02, 0.9)
        if masked:
            tx = optax.chain(repopt_mask(depth_scales(model)), tx)
        losses = train(model, tx, batch)
        assert np.isfinite(losses).all()
        assert losses[-1] < 0.9 * losses[0]
        ends.append(values(nnx.state(model, nnx.Param)))
    plain, masked = ends
    moved_otherwise = [path for path in plain if relative(plain[path], masked[path]) > WRONG]
    assert set(find_branches(case.abstract())) <= set(moved_otherwise)


# -- scales go by path


class Grown(nnx.Module):
    """With a layer more, in another order, of what `names` say."""

    def __init__(self, *names, rngs):
        self.parts = nnx.Dict({name: nnx.Linear(4, 4, rngs=rngs) for name in names})


def test_added_and_reordered_layers_keep_their_scales_and_draws():
    small = drawn(nnx.eval_shape(lambda: Grown("a", "c", rngs=nnx.Rngs(0))))
    grown = drawn(nnx.eval_shape(lambda: Grown("c", "b", "a", rngs=nnx.Rngs(0))), seed=1)
    scales = random_scales(find_branches(small))
    kept, other = (values(reinitialize(m, scales, trained=False, rngs=nnx.Rngs(2))) for m in (small, grown))
    searches = [to_search(m, scales="ones", trained=False, rngs=nnx.Rngs(2)) for m in (small, grown)]
    started, other_started = (values(search) for search in searches)
    for name in ("a", "c"):
        path = f"parts/{name}/kernel"
        np.testing.assert_array_equal(kept[path], other[path])
        weights = f"parts/{name}/weights/dense"
        np.testing.assert_array_equal(started[weights], other_started[weights])
    np.testing.assert_array_equal(other["parts/b/kernel"], np.asarray(grown.parts.b.kernel[...]))


def test_a_search_that_starts_from_given_scales():
    model = NETWORKS["MLP"].fresh()
    given = random_scales(find_branches(model, r"layers/[12]"))
    search = to_search(model, r"layers/[12]", scales=given, trained=False, rngs=nnx.Rngs(0))
    chex.assert_trees_all_equal(extract_scales(search).vectors, given.vectors)
    ones = extract_scales(to_search(model, scales="ones", trained=False, rngs=nnx.Rngs(0)))
    assert all((v == 1).all() for v in jax.tree.leaves(ones))


def test_the_depth_rule_counts_equal_layers_in_a_row():
    def value(scales, path):
        return np.asarray(scales.vectors[path][next(iter(scales.vectors[path]))][..., 0])

    resnet = depth_scales(NETWORKS["ResNet-18"].abstract(), r"(conv1|stages/.*/conv.)")
    depths = [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]
    assert len(depths) == len(resnet.entries)
    for path, l in zip(resnet.entries, depths):  # noqa: E741
        assert value(resnet, path) == pytest.approx(np.sqrt(2 / l) if l else 1.0), path
    scanned = depth_scales(NETWORKS["scanned stack"].abstract(), r"blocks/.*")
    np.testing.assert_allclose(value(scanned, "blocks/conv/kernel"), [1, np.sqrt(2), 1], rtol=1e-6)
    np.testing.assert_allclose(value(scanned, "blocks/mix/kernel"), np.sqrt([2 / 3, 2 / 4, 2 / 5]), rtol=1e-6)
    mlp = depth_scales(NETWORKS["MLP"].abstract(), r"layers/.*")
    assert [float(value(mlp, f"layers/{i}/kernel")) for i in range(4)] == pytest.approx([1, np.sqrt(2), 1, 1])


def test_the_depth_rule_counts_in_the_order_of_the_calls_of_an_example():
    class Named(nnx.Module):
        """Four equal layers, whose names are in another order than their calls."""

        def __init__(self, *, rngs):
            for name in ("first", "second", "third", "fourth"):
                setattr(self, name, nnx.Conv(4, 4, (3, 3), rngs=rngs))
            self.extra = nnx.Conv(4, 4, (3, 3), rngs=rngs)

        def __call__(self, x, *, extra=False):
            for name in ("first", "second", "third", "fourth", "second"):
                x = getattr(self, name)(x)
            return self.extra(x) if extra else x

    def values(scales):
        return [float(scales.vectors[f"{name}/kernel"]["3x3"][0]) for name in called]

    def expected(*depths):
        return pytest.approx([np.sqrt(2 / l) if l else 1.0 for l in depths])  # noqa: E741

    model = nnx.eval_shape(lambda: Named(rngs=nnx.Rngs(0)))
    image, called = (
        jax.ShapeDtypeStruct((1, 8, 8, 4), "float32"),
        ("first", "second", "third", "fourth", "extra"),
    )
    assert values(depth_scales(model)) == expected(1, 3, 4, 2, 0)  # the order of the alphabet
    every = depth_scales(model, example=lambda m: m(jnp.zeros((1, 8, 8, 4)), extra=True))
    assert values(every) == expected(0, 1, 2, 3, 4)
    called, others = called[:-1], r"(?!extra).*"
    scales = depth_scales(model, others, example=(image,))
    assert values(scales) == expected(0, 1, 2, 3)
    assert list(scales.entries) == sorted(scales.entries)
    assert values(law_scales(model, 1.0, others, example=(image,))) == expected(0, 1, 2, 3)
    with pytest.raises(ValueError, match=r"does not call extra/kernel in the `example`.*depth_rule"):
        depth_scales(model, example=(image,))
    with pytest.raises(TypeError, match="`example` is a int"):
        depth_scales(model, example=3)


# -- deploying


PAIRS = {
    "ResNet-18": {r"(.*/)?conv(\d)": r"\1bn\2", r"(.*/)downsample/layers/0": r"\1downsample/layers/1"},
    "U-Net": {r"(.*/)conv(\d)": r"\1bn\2"},
    "shared head": {r"(.*head.*)/conv": r"\1/bn"},
    "scanned stack": {r"blocks/conv": "blocks/bn"},
    "1-D": {r"stem": "bn"},
    "3-D": {r"conv": "bn"},
}


def settled(model):
    """With moved statistics, in evaluation mode, float64; variances as small as eps would let maps grow
    without bound."""
    rng = np.random.default_rng(0)
    randomised(model)
    for _, norm in named_modules(model):
        if isinstance(norm, nnx.BatchNorm):
            norm.var.set_value(jnp.asarray(rng.uniform(0.5, 2.0, norm.var.shape)))
    return model


@pytest.mark.parametrize("name", tiers.often(PAIRS, "U-Net", *(name for name in SMALL if name in PAIRS)))
def test_batch_norms_fold_into_the_layers_before_them(name, x64):
    case = NETWORKS[name]
    model = settled(case.abstract())
    x = case.batches(1, dtype=np.float64)[0]["x"]
    deployed = fuse(model, pairs=PAIRS[name])
    kinds = {type(m) for _, m in named_modules(deployed)}
    assert nnx.BatchNorm not in kinds
    assert FoldedNorm in kinds
    expected = run(model, x)
    assert relative(run(deployed, x), expected) <= EXACT
    assert not any(isinstance(m, FoldedNorm) for _, m in named_modules(model))


@pytest.mark.parametrize("name", ["scanned stack", "1-D"])
def test_a_search_network_of_one_s_own_is_deployed(name, x64):
    case = NETWORKS[name]
    model = settled(nnx.eval_shape(lambda: to_search(case.build(rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))))
    x = case.batches(1, dtype=np.float64)[0]["x"]
    deployed = fuse(model, pairs=PAIRS[name])
    assert {type(m) for _, m in named_modules(deployed)}.isdisjoint({nnx.BatchNorm, Merged})
    assert relative(run(deployed, x), run(model, x)) <= EXACT
    with pytest.raises(TypeError, match=r"bn cannot be folded: .* name the layers before them in `pairs`"):
        fuse(model)
    branches_alone = fuse(model, only=(Merged,))
    assert relative(run(branches_alone, x), run(model, x)) <= EXACT


# What has nothing to gain or makes the logits.
LEFT_ALONE = {
    "1-D": {"head/kernel"},
    "3-D": {"head/kernel"},
    "MLP": {"layers/0/kernel", "layers/3/kernel"},
    "ResNet-18": {"fc/kernel", *(f"stages/{i}/0/downsample/layers/0/kernel" for i in (1, 2))},
}


@pytest.mark.parametrize(
    ("name", "structure"),
    [
        *(("1-D", "repvgg"), ("3-D", "dbb"), ("MLP", "repvgg")),
        pytest.param("ResNet-18", "acnet", marks=pytest.mark.long),
    ],
)
def test_a_structure_of_any_network(name, structure, x64):
    """With norms in the branches, and the network's own after them."""
    case = NETWORKS[name]
    plain = case.abstract()
    model = settled(nnx.eval_shape(lambda m: to_structure(m, structure, rngs=nnx.Rngs(1)), plain))
    normed = {f"{p}/kernel": m for p, m in named_modules(model) if isinstance(m, Branched)}
    layers = find_layers(plain)
    taken = {path: choice for path, choice in find_structures(plain, structure).items() if choice.structure}
    assert set(layers) - set(taken) == LEFT_ALONE[name]
    layers = {path: layers[path] for path in taken}
    described = {path: STRUCTURES[structure](layer.geometry) for path, layer in layers.items()}
    assert {path: m.structure for path, m in normed.items()} == described
    assert {p: m.bias is not None for p, m in normed.items()} == {p: v.has_bias for p, v in layers.items()}
    deployed = fuse(model, pairs=PAIRS.get(name))
    assert {type(m) for _, m in named_modules(deployed)}.isdisjoint({nnx.BatchNorm, Branched})
    x = case.batches(1, dtype=np.float64)[0]["x"]
    expected = run(model, x)
    assert relative(run(deployed, x), expected) <= EXACT
    for layer in normed.values():  # negative control: a fresh batch norm would hide what is forgotten
        list(layer.norms.values())[-1].mean[...] += 0.5
    assert relative(run(model, x), expected) > WRONG


class Levels(nnx.Module):
    """A convolution that all levels share with a batch norm for each: they cannot be folded."""

    def __init__(self, *, rngs):
        self.block = BasicBlock(2, 4, rngs=rngs)
        self.same = self.block
        conv = nnx.Conv(4, 4, (1, 1), rngs=rngs)
        self.convs = nnx.List([conv, conv])
        self.norms = nnx.List([nnx.BatchNorm(4, use_running_average=True, rngs=rngs) for _ in range(2)])
        self.wide = nnx.Linear(4, 6, rngs=rngs)


def in_evaluation(build):
    model = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
    model.eval()
    return model


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({r"conv9": "bn"}, r"the rules 'conv9' match none of the layers block/conv1, .*, wide"),
        ({r"wide": "nowhere"}, r"wide: there is no batch norm at nowhere"),
        ({r"wide": "norms/0"}, r"wide: it has \(6,\) channels, and the batch norm at norms/0 \(4,\)"),
        (
            {r"convs/(\d)": r"norms/\1"},
            r"convs/0: layer or batch norm is used in several places \(convs/0 -> norms/0, convs/1 -> ",
        ),
        (
            {r"block/conv1": "block/bn1"},
            r"\(block/conv1 -> block/bn1, same/conv1 -> None; .* always come together",
        ),
        (
            {r"(block|same)/conv\d": r"\1/bn1"},
            r"^`pairs` cannot be folded: block/conv1, block/conv2 cannot all take in block/bn1$",
        ),
        ({r"wide": "norms/0", r"x": "y"}, r"'x' match none .*; wide: it has"),
    ],
)
def test_pairs_that_cannot_be_folded(pairs, message):
    with pytest.raises(ValueError, match=message):
        fuse(in_evaluation(Levels), pairs=pairs)


def test_a_block_that_is_used_twice_folds_where_all_its_uses_do(x64):
    model = settled(NETWORKS["shared head"].abstract())
    deployed = fuse(model, pairs=PAIRS["shared head"])
    assert deployed.heads[0] is deployed.heads[1] is deployed.z_head
    assert isinstance(deployed.z_head.bn, FoldedNorm)
    with pytest.raises(ValueError, match=r"heads/0/conv -> heads/0/bn, .* z_head/conv -> None"):
        fuse(model, pairs={r"(heads/\d)/conv": r"\1/bn"})


# -- mistakes, one sentence each


class Odd(nnx.Module):
    """Layers that no branches can replace, and some that they can."""

    def __init__(self, *, rngs):
        self.good = nnx.Conv(2, 2, (3, 3), rngs=rngs)
        self.same = nnx.Conv(2, 2, (3, 3), strides=2, rngs=rngs)
        self.causal = nnx.Conv(2, 2, (3,), padding="CAUSAL", rngs=rngs)
        self.masked = nnx.Conv(2, 2, (3, 3), mask=jnp.ones((3, 3, 2, 2)), rngs=rngs)
        self.own = Own(2, 2, rngs=rngs)
        self.dot = nnx.Linear(2, 2, dot_general=lambda *args, **options: 0, rngs=rngs)
        self.tied = nnx.Linear(2, 2, rngs=rngs)
        self.tied_too = nnx.Linear(2, 2, rngs=rngs)
        self.tied_too.kernel = self.tied.kernel
        self.biased = nnx.Linear(2, 2, rngs=rngs)
        self.biased_too = nnx.Linear(2, 2, rngs=rngs)
        self.biased_too.bias = self.biased.bias
        self.wrapped = nnx.WeightNorm(nnx.Linear(2, 2, rngs=rngs), rngs=rngs)
        keys = jax.random.split(rngs.params(), 3)
        make = nnx.vmap(lambda key: nnx.Linear(2, 4, rngs=nnx.Rngs(key)), in_axes=0, out_axes=1)
        self.sideways = make(keys)
        self.up = nnx.ConvTranspose(2, 2, (2, 2), strides=2, rngs=rngs)
        self.turned = nnx.ConvTranspose(2, 2, (3, 3), transpose_kernel=True, rngs=rngs)
        self.einsum = nnx.Einsum("ab,cb->ac", (2, 2), rngs=rngs)
        self.summed = nnx.Einsum("...i,io->...o", (2, 2), einsum_op=lambda *_, **options: 0, rngs=rngs)
        self.cast = nnx.Conv(2, 2, (3, 3), promote_dtype=own_dtypes, rngs=rngs)
        self.cast_up = nnx.ConvTranspose(2, 2, (3, 3), promote_dtype=own_dtypes, rngs=rngs)
        self.cast_axes = nnx.LinearGeneral(2, 2, promote_dtype=own_dtypes, rngs=rngs)
        self.bn = nnx.BatchNorm(2, rngs=rngs)


def own_dtypes(arrays, *, dtype=None, inexact=True):
    return arrays


class Own(nnx.Linear):
    def __call__(self, inputs, out_sharding=None):
        return -super().__call__(inputs)


REASONS = {
    "causal (Conv)": "padding 'CAUSAL' shifts the window",
    "masked (Conv)": "`mask` or `input_dilation`",
    "own (Own)": "its class has a __call__ of its own",
    "dot (Linear)": "it computes with a `dot_general` of its own",
    "tied (Linear)": "its kernel alone, not the layer, is shared with tied_too",
    "tied_too (Linear)": "its kernel alone, not the layer, is shared with tied",
    "biased (Linear)": "its bias alone, not the layer, is shared with biased_too",
    "biased_too (Linear)": "its bias alone, not the layer, is shared with biased",
    "wrapped/layer_instance (Linear)": "wrapped (WeightNorm) normalises its kernel before each use",
    "turned (ConvTranspose)": "its taps reversed (`transpose_kernel`)",
    "summed (Einsum)": "it computes with an `einsum_op` of its own",
    "cast (Conv)": "it changes its operands by a `promote_dtype` of its own",
    "cast_up (ConvTranspose)": "it changes its operands by a `promote_dtype` of its own",
    "cast_axes (LinearGeneral)": "it changes its operands by a `promote_dtype` of its own",
    "sideways (Linear)": "layers must be stacked along the first axis",
}


def test_layers_that_cannot_be_made_of_branches_are_listed_with_the_reasons():
    model = nnx.eval_shape(lambda: Odd(rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="layers that cannot be made of branches: ") as error:
        find_layers(model, r"(?!up$|einsum$).*")
    found = str(error.value).removeprefix("layers that cannot be made of branches: ")
    parts = dict(part.split(": ", 1) for part in found.split("; ") if "): " in part)
    assert parts.keys() == REASONS.keys()
    for layer, reason in REASONS.items():
        assert reason in parts[layer]
    assert list(find_layers(model, r"good")) == ["good/kernel"]
    assert list(find_layers(model)) == ["good/kernel", "same/kernel"]  # by default those that can be
    for select in (r"up|einsum", (nnx.ConvTranspose, nnx.Einsum), lambda path, m: path in ("up", "einsum")):
        with pytest.raises(
            ValueError,
            match=r"einsum \(Einsum\): its equation 'ab,cb->ac' is no dense .*; up \(Conv.*strides 2",
        ):
            find_layers(model, select)
    with pytest.raises(ValueError, match=r"bn \(BatchNorm\): only nnx.Conv, .* can be made of"):
        find_layers(model, nnx.BatchNorm)
    scales = random_scales({"causal/kernel": BranchSet((3, 2, 2), (Kernel((3,)),))})
    with pytest.raises(ValueError, match=r"causal .Conv.: padding 'CAUSAL'"):
        verify_equivalence(model, scales, [], rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"causal .Conv.: padding 'CAUSAL'"):
        csla_twin(model, scales, {})


def test_selections_that_mean_nothing():
    model = NETWORKS["1-D"].abstract()
    there = r"its layers are depthwise, head, stem, wide"
    with pytest.raises(ValueError, match=rf"no layer that `select` = 'x' chooses: {there}"):
        find_layers(model, "x")
    with pytest.raises(ValueError, match=r"no layer: it has no nnx.Conv or nnx.Linear"):
        find_layers(nnx.Sequential(nnx.relu))
    for select in (3, ("conv", "x")):
        with pytest.raises(TypeError, match=r"`select` is .*: it must be a regular expression, a function"):
            find_layers(model, select)
    for call in (
        lambda: find_layers(model, "("),
        lambda: find_branches(model, branches={"(": None}),
        lambda: fuse(nnx.Sequential(nnx.relu), pairs={"(": "bn"}),
    ):
        with pytest.raises(ValueError, match=r"holds '\(', which is no regular expression"):
            call()
    for wrong in (Identity(), ["3x3"]):
        with pytest.raises(ValueError, match=r"stem: .* is neither a sequence of branches nor a `BranchSet`"):
            find_branches(model, branches={"stem": wrong})
    with pytest.raises(
        TypeError, match=r"`branches` is Identity.*: it must be a sequence of branches, a func"
    ):
        find_branches(model, branches=Identity())
    with pytest.raises(
        ValueError, match=r"the rules 'tail', 'y' of `branches` match none of the layers depth"
    ):
        find_branches(model, branches={r"stem": None, r"tail": None, r"y": [Identity()]})
    with pytest.raises(ValueError, match=r"^`branches` do not fit: (?!stem|wide)") as error:
        find_branches(model, branches={r"head|stem": [Identity()], r"wide": [Kernel((3,))]})
    assert "head: branch identity does not fit a kernel of shape (4, 3)" in str(error.value)
    assert "; stem: branch identity does not fit a kernel of shape (5, 2, 4)" in str(error.value)
    wrong = find_branches(model)["wide/kernel"]
    with pytest.raises(ValueError, match=r"stem: the branch set is of another layer: .* kernel \(expected"):
        find_branches(model, branches=lambda layer: wrong if layer.name == "stem" else None)
    with pytest.raises(ValueError, match="`scales` is 'deep': it must be 'depth', 'ones' or a `Scales`"):
        to_search(model, scales="deep", rngs=nnx.Rngs(0))


def test_scales_that_lack_a_layer(tmp_path):
    model = NETWORKS["MLP"].fresh()
    some = random_scales(find_branches(model, r"layers/[01]"))
    missing = r"2 missing layers: layers/2/kernel \(8, 8\), layers/3/kernel \(8, 3\)$"
    with pytest.raises(ValueError, match=missing):
        to_search(model, r"layers/.*", scales=some, rngs=nnx.Rngs(0))
    save_scales(tmp_path / "scales", some)
    with pytest.raises(ValueError, match=missing):
        load_scales(tmp_path / "scales", find_branches(model, r"layers/.*"))
    with pytest.raises(ValueError, match=missing):
        prepare(model, "repopt", scales=some, select=r"layers/.*", rngs=nnx.Rngs(0))


def test_a_shared_layer_by_another_name_or_twice():
    model = NETWORKS["shared head"].fresh()
    own, other = "heads/0/conv/kernel", "heads/1/conv/kernel"
    entry = random_scales(find_branches(model)).entries[own]
    message = f"^{other} is the same layer as {own}: give it once, as {own}$"
    for scales in (Scales({other: entry}), Scales({own: entry, other: entry})):
        for use in (
            lambda s: reinitialize(model, s, rngs=nnx.Rngs(0)),
            lambda s: verify_equivalence(model, s, [], rngs=nnx.Rngs(0)),
            lambda s: csla_twin(model, s, {}),
            lambda s: to_search(model, scales=s, rngs=nnx.Rngs(0)),
        ):
            with pytest.raises(ValueError, match=message):
                use(scales)
    with pytest.raises(ValueError, match=r"^z_head/conv is the same layer as heads/0/conv: give it once"):
        find_layers(model, r"z_head/conv")
    with pytest.raises(ValueError, match=r"^heads/1/conv is the same layer as heads/0/conv: give it once"):
        find_branches(model, branches={r"heads/0/conv": None, r"heads/1/conv": [Kernel((3, 3))]})


def test_what_has_no_repvgg_form():
    model = NETWORKS["scanned stack"].fresh()
    stacked = "it is a stacked layer, whose branches would need batch norms made by the same nnx.vmap"
    with pytest.raises(ValueError, match=rf"blocks/conv: {stacked}.*; blocks/mix: {stacked}"):
        to_repvgg(model, ".*", rngs=nnx.Rngs(0))
    some = to_repvgg(model, rngs=nnx.Rngs(0))
    assert [p for p, m in named_modules(some) if isinstance(m, Branched)] == ["stem"]
    assert isinstance(to_repvgg(model, "stem|head", rngs=nnx.Rngs(0)).stem, Branched)


# -- modes


def test_a_mode_by_its_name():
    assert [Mode.parse(mode) for mode in Mode] == list(Mode)
    assert list(Mode) == ["plain", "search", "repopt", "online", *STRUCTURES]
    assert [mode for mode in Mode if mode.is_structure] == list(STRUCTURES)
    for text, near in (("hyper-search", "search"), ("RepVgg", "repvgg"), ("repot", "repopt")):
        with pytest.raises(
            ValueError, match=rf"no mode '{text}' \(did you mean '{near}'\?\): it must be one of"
        ):
            Mode.parse(text)
    with pytest.raises(
        ValueError,
        match=r"^there is no mode 'x': it must be one of plain, search, repopt, online, repvgg",
    ):
        Mode.parse("x")


def test_every_mode_makes_the_network_that_is_trained():
    model = NETWORKS["MLP"].fresh()
    select = r"layers/[12]"
    scales = random_scales(find_branches(model, select))
    rngs = nnx.Rngs(0)
    make = functools.partial(prepare, trained=False)
    plain = make(model, Mode.PLAIN, rngs=rngs)
    assert plain.model is not model
    chex.assert_trees_all_equal(values(plain.model), values(model))
    search = make(model, "search", select=select, rngs=rngs)
    assert [type(layer) for layer in search.model.layers] == [nnx.Linear, Merged, Merged, nnx.Linear]
    given = make(model, "search", scales=scales, select=select, rngs=nnx.Rngs(3))
    chex.assert_trees_all_equal(extract_scales(given.model).vectors, scales.vectors)
    online = make(model, "online", scales=scales, select=select, rngs=nnx.Rngs(3))
    chex.assert_trees_all_equal(values(online.model), values(given.model))
    repopt = make(model, "repopt", scales=scales, rngs=nnx.Rngs(4))
    expected = reinitialize(model, scales, trained=False, rngs=nnx.Rngs(4))
    chex.assert_trees_all_equal(values(repopt.model), values(expected))
    repvgg = make(model, "repvgg", select=select, branches=[Kernel(())], rngs=rngs)
    assert [type(layer) for layer in repvgg.model.layers[1:3]] == [Branched] * 2
    acnet = make(model, "acnet", select=select, rngs=rngs)
    assert [type(layer) for layer in acnet.model.layers[1:3]] == [Branched] * 2
    assert repopt.scales is scales
    assert (
        plain.scales
        is search.scales
        is given.scales
        is online.scales
        is repvgg.scales
        is acnet.scales
        is None
    )


def test_mode_mistakes():
    model = NETWORKS["MLP"].abstract()
    scales = random_scales(find_branches(model))
    for mode in ("plain", "repvgg", "dbb"):
        with pytest.raises(
            ValueError, match=rf"^mode {mode} has no use for `scales`: leave them out, or train"
        ):
            prepare(model, mode, scales=scales, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^mode plain has no use for an `example`: leave it out"):
        prepare(model, "plain", example=(jnp.ones((1, 4)),), rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"^mode repopt needs `scales`: give those of a search, or `depth_scal"
    ):
        prepare(model, "repopt", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^mode acnet defines the branches of its layers: leave"):
        prepare(model, "acnet", branches=[Kernel(())], rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"\(did you mean 'search'\?\)"):
        prepare(model, "hyper-search", rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="`mode` is of type NoneType: it must be the name of a mode"):
        prepare(model, None, rngs=nnx.Rngs(0))


class Normed(nnx.Module):
    def __init__(self, *, rngs):
        self.conv = nnx.Conv(2, 2, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(2, rngs=rngs)
        self.mine = nnx.BatchStat(jnp.full(2, 7.0))  # says nothing of training

    def __call__(self, x):
        return self.bn(self.conv(x))


def test_a_trained_model_is_re_initialised_only_if_told():
    model = Normed(rngs=nnx.Rngs(0))
    scales = depth_scales(model)
    prepare(model, "repopt", scales=scales, rngs=nnx.Rngs(1))
    model(jnp.ones((2, 4, 4, 2)))
    with pytest.raises(ValueError, match=r"has been trained .batch statistics bn/mean, bn/var have moved"):
        prepare(model, "repopt", scales=scales, rngs=nnx.Rngs(1))
    prepare(model, "repopt", scales=scales, allow_trained=True, rngs=nnx.Rngs(1))


# -- a layer made of branches is used as the plain one was


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("layer", ["conv", "dense"])
def test_any_number_of_batch_axes(layer, batch, x64):
    rngs = nnx.Rngs(0)
    if layer == "conv":
        plain = nnx.Conv(2, 2, (3, 3), padding=1, param_dtype=jnp.float64, rngs=rngs)
    else:
        plain = nnx.Linear(3, 3, param_dtype=jnp.float64, rngs=rngs)
    model = nnx.Sequential(plain)
    shape = (*batch, 5, 6, 2) if layer == "conv" else (*batch, 3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape))
    search, repvgg = to_search(model, rngs=nnx.Rngs(1)), to_repvgg(model, "layers/0", rngs=nnx.Rngs(2))
    repvgg.eval()
    for new in (search, repvgg):
        made = new.layers[0]
        merged = nnx.clone(model)
        merged.layers[0].kernel.set_value(made.kernel_and_bias()[0])
        chex.assert_trees_all_close(new(x), merged(x), rtol=1e-12, atol=1e-14)
        for name in ("in_features", "out_features") + (("kernel_size",) if layer == "conv" else ()):
            assert getattr(made, name) == getattr(plain, name)


def test_half_precision_stays_half_precision():
    model = nnx.Linear(4, 4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    search = to_search(nnx.Sequential(model), rngs=nnx.Rngs(1))
    x = jnp.ones((2, 4), jnp.bfloat16)
    assert search(x).dtype == model(x).dtype == jnp.bfloat16
    scales = extract_scales(search)  # squared later, and float32 in a file
    assert {v.dtype for v in jax.tree.leaves(scales)} == {jnp.dtype(jnp.float32)}


WIDER = {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32}


@pytest.mark.parametrize(
    "build",
    [
        functools.partial(nnx.Conv, 4, 4, (3, 3)),
        functools.partial(nnx.ConvTranspose, 4, 4, (3, 3)),
        functools.partial(nnx.Linear, 4, 4),
        functools.partial(nnx.LinearGeneral, 4, (2, 2)),
        functools.partial(nnx.Einsum, "...i,io->...o", (4, 4)),
    ],
)
def test_a_wider_dtype_of_the_products_is_kept(build):
    """Operands in bfloat16, products and output in float32, in every form of the layer."""
    model = nnx.Sequential(drawn(nnx.eval_shape(lambda: build(**WIDER, rngs=nnx.Rngs(0)))))
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 4))
    expected = model(x)
    search = to_search(model, r"layers/0", keep="split", rngs=nnx.Rngs(1))
    forms = {"search": search, "fused": fuse(search)}
    if build.func is nnx.Conv:
        forms["branched"] = to_structure(model, "dbb", allow_trained=True, rngs=nnx.Rngs(1))
        forms["branched"].eval()
        forms["merged branches"] = fuse(forms["branched"])
    for name, form in forms.items():
        y = form(x)
        assert y.dtype == expected.dtype == jnp.float32, name
        assert np.any(y != y.astype(jnp.bfloat16)), name
        if "branche" not in name:  # those are drawn, here it is the same kernel
            np.testing.assert_allclose(y, expected, atol=0.02 * np.abs(expected).max())


def test_arrays_of_a_copy_are_its_own():
    """A step that is given one model's arrays to reuse must leave the other's alone."""
    model = Normed(rngs=nnx.Rngs(0))
    scales = depth_scales(model)
    copies = [
        to_search(model, rngs=nnx.Rngs(1)),
        to_repvgg(model, rngs=nnx.Rngs(1)),
        reinitialize(model, scales, rngs=nnx.Rngs(1)),
    ]
    for made in copies:
        state = nnx.state(made)
        consume = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
        jax.block_until_ready(consume(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(nnx.state(model)))


def test_numbers_in_names_are_read_as_numbers():
    layers = {f"conv{i}": nnx.Linear(2, 2, rngs=nnx.Rngs(i)) for i in (1, 2, 10)}
    assert list(find_layers(nnx.Dict(layers))) == ["conv1/kernel", "conv2/kernel", "conv10/kernel"]


# -- networks that declare their branches


def test_a_network_that_declares_its_branches_is_searched_at_those():
    net = VGGVariant("net", (1, 1, 1, 1), (4, 4, 4, 4, 4), (1, 1, 1, 1, 1))
    model = abstract(vgg, net, num_classes=2, post_se=True)
    assert find_branches(model) == model.branch_sets()
    search = nnx.eval_shape(lambda m: to_search(m, rngs=nnx.Rngs(0)), model)
    found = {f"{p}/kernel": m.branch_set() for p, m in named_modules(search) if isinstance(m, Merged)}
    assert found == model.branch_sets()
    assert list(find_layers(model, r"head")) == ["head/kernel"]
    # Of other layers or branches, if told.
    model = drawn(abstract(vgg, net, num_classes=2))
    select, branches = r"stages/1/.*conv", [Kernel((3, 3)), Kernel((1, 3))]
    scales = depth_scales(model, select, branches)
    with pytest.raises(ValueError, match="do not fit the model: 4 missing layers"):
        reinitialize(model, scales, rngs=nnx.Rngs(1))
    prepare(model, "repopt", scales=scales, select=select, branches=branches, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="do not fit the model"):
        prepare(model, "repopt", scales=scales, select=select, rngs=nnx.Rngs(1))
