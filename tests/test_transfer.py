"""Scales without a search: those of another network, and the depth rule at a given decay."""

import authors
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from repopt_jax import (
    Scales,
    depth_scales,
    law_scales,
    load_scales,
    models,
    save_scales,
    train,
    transfer_scales,
)
from repopt_jax.core.branches import BranchSet, Identity, Kernel
from repopt_jax.core.published import default_branches
from repopt_jax.core.scales import LayerScales, ScalesMetadata
from repopt_jax.core.transfer import counted_depths, places
from repopt_jax.models import VGG_VARIANTS, VGGVariant
from repopt_jax.train.build import make_task
from repopt_jax.train.config import smoke

SOURCE = VGGVariant("source", (3, 5, 2, 1), (6, 6, 8, 8, 12))
# Layer means of the source and of what is taken from it, relative: channels are left out or doubled.
MEANS = 0.05


def branch_sets(variant):
    return {path: default_branches_of(spec) for path, spec in variant.layers(3).items()}


def default_branches_of(spec):
    g = spec.geometry
    repeats = g.inputs == g.outputs and set(g.strides) <= {1}
    branches = (Kernel((3, 3)), Kernel((1, 1)), *([Identity()] if repeats else []))
    return BranchSet(g.kernel, branches, g.groups)


def depths(variant):
    return {path: spec.depth for path, spec in variant.layers(3).items()}


def searched(variant, *, seed=0):
    """Scales as a search leaves them: a mean for each layer and branch, and a trait of each channel, the same
    along a stage, by which the branches differ."""
    rng = np.random.default_rng(seed)
    traits = {stage: rng.normal(size=(1, width)) for stage, width in enumerate(variant.widths)}
    entries = {}
    for path, bs in branch_sets(variant).items():
        stage, index = map(int, path.split("/")[1:3])
        sign = {"3x3": 1, "1x1": 0.5, "identity": -1}
        vectors = {
            name: (2 / (index + 1)) ** 0.5
            + 0.1 * sign[name] * traits[stage][0]
            + 0.01 * rng.normal(size=bs.out)
            for name in bs.names
        }
        entries[path] = LayerScales(bs, {n: jnp.asarray(v, jnp.float32) for n, v in vectors.items()})
    return Scales(entries, ScalesMetadata("source", "some images", "{}", 7))


def transferred(variant, source=None, **options):
    source = searched(SOURCE) if source is None else source
    return Scales.transfer(source, branch_sets(variant), depths(variant), **options)


def path(stage, index):
    return f"stages/{stage}/{index}/conv/kernel"


def widened(blocks, *widths):
    return VGGVariant("target", blocks, widths, SOURCE.strides)


def test_the_same_network_keeps_its_scales():
    source = searched(SOURCE)
    chex.assert_trees_all_equal(transferred(SOURCE, source).vectors, source.vectors)


@pytest.mark.parametrize("factor", [0.5, 1.5, 2.0])
def test_another_width(factor):
    """Every channel of the target is one of the source, the same in all layers of the stage and in all
    branches; layer means stay."""
    target = widened(SOURCE.blocks, *(int(w * factor) for w in SOURCE.widths))
    source, found = searched(SOURCE), transferred(target)
    assert found.branch_sets == branch_sets(target)
    for stage, count in enumerate((1, *SOURCE.blocks)):
        origins = []
        for index in range(count):
            theirs, ours = (s.vectors[path(stage, index)] for s in (source, found))
            for name, vector in ours.items():
                equal = np.asarray(vector)[:, None] == np.asarray(theirs[name])
                assert (equal.sum(axis=1) == 1).all()
                origins.append(equal.argmax(axis=1))
                np.testing.assert_allclose(vector.mean(), theirs[name].mean(), rtol=MEANS)
        assert all((origin == origins[0]).all() for origin in origins)
        assert (np.diff(origins[0]) >= 0).all()  # in the order of the source's channels
        used = np.bincount(origins[0], minlength=SOURCE.widths[stage])
        assert used.max() - used.min() <= 1


def test_channels_are_spread_by_their_trait():
    """Half as many channels: one of each pair of neighbours in rank, not whichever come first."""
    source = searched(SOURCE)
    found = transferred(widened(SOURCE.blocks, 3, 3, 4, 4, 6))
    for stage in range(1, 5):
        theirs = np.sort(np.asarray(source.vectors[path(stage, 0)]["3x3"]))
        ours = np.sort(np.asarray(found.vectors[path(stage, 0)]["3x3"]))
        pairs = np.asarray(theirs).reshape(-1, 2)
        assert ((ours >= pairs.min(axis=1) - 0.05) & (ours <= pairs.max(axis=1) + 0.05)).all()


def test_permuted_channels_are_the_same_network():
    """The source's channels in another order, along each stage: the target's trajectories are the same."""
    source, rng = searched(SOURCE), np.random.default_rng(1)
    orders = [rng.permutation(width) for width in SOURCE.widths]
    permuted = Scales(
        {
            p: LayerScales(e.branches, {n: v[orders[int(p.split("/")[1])]] for n, v in e.vectors.items()})
            for p, e in source.entries.items()
        }
    )
    target = widened((2, 4, 3, 1), 4, 9, 5, 8, 18)
    first, second = (transferred(target, scales) for scales in (source, permuted))
    for stage, count in enumerate((1, *target.blocks)):
        rows = [
            np.stack([np.asarray(v) for i in range(count) for v in found.vectors[path(stage, i)].values()])
            for found in (first, second)
        ]
        assert not (rows[0] == rows[1]).all() or stage in (0,)
        ordered = [r[:, np.lexsort(r)] for r in rows]
        np.testing.assert_array_equal(*ordered)


def test_deeper_and_shallower():
    """By the same i in the same stage; beyond its end by i in the longest stage, and there by its last
    layer, channels by rank."""
    target = widened((2, 7, 4, 3), 6, 6, 8, 8, 8)
    source, found = searched(SOURCE), transferred(target)
    for index in range(2):  # of three
        chex.assert_trees_all_equal(found.vectors[path(1, index)], source.vectors[path(1, index)])
    for index in range(7):  # of five; it is the longest itself
        expected = source.vectors[path(2, min(index, 4))]
        chex.assert_trees_all_equal(found.vectors[path(2, index)], expected)
    for stage, index in ((3, 2), (3, 3), (4, 1), (4, 2)):
        for name, vector in found.vectors[path(stage, index)].items():
            np.testing.assert_array_equal(np.sort(vector), np.sort(source.vectors[path(2, index)][name]))
    # A channel that is strong in its own stage is strong in the layers from the other one.
    own, other = (np.asarray(found.vectors[path(3, i)]["3x3"]) for i in (1, 2))
    assert np.corrcoef(own, other)[0, 1] > 0.9


def test_stages_that_the_source_lacks():
    """They take its longest stage."""
    sets = branch_sets(SOURCE) | {path(5, i): default_branches((3, 3, 12, 12)) for i in range(3)}
    sets |= {path(5, 0): default_branches((3, 3, 12, 12), stride=2)}
    counts = depths(SOURCE) | {path(5, i): i for i in range(3)}
    source = searched(SOURCE)
    found = Scales.transfer(source, sets, counts)
    for index in range(3):
        values = np.unique(np.asarray(source.vectors[path(2, index)]["1x1"]))
        np.testing.assert_array_equal(np.unique(found.vectors[path(5, index)]["1x1"]), values)


def test_a_branch_that_the_layer_lacks_comes_from_the_nearest_that_has_it():
    """The stem of the target has the identity; the source's has not, nor has any layer of that stage."""
    sets = branch_sets(SOURCE) | {
        path(0, 0): default_branches((3, 3, 6, 6)),
        path(1, 0): default_branches((3, 3, 6, 6)),
    }
    source = searched(SOURCE)
    found = Scales.transfer(source, sets, depths(SOURCE), source_depths=depths(SOURCE)).vectors
    chex.assert_trees_all_equal(found[path(1, 0)]["identity"], source.vectors[path(1, 1)]["identity"])
    values = source.vectors[path(2, 1)]["identity"]
    assert np.isin(np.asarray(found[path(0, 0)]["identity"]), np.asarray(values)).all()


def test_a_stack():
    """Layers in one array, as for `nnx.scan`, one after the other along the stage."""
    sets = {"opener/kernel": default_branches((3, 3, 4, 6), stride=2)}
    sets |= {"rest/kernel": default_branches((2, 2, 3, 3, 6, 6), stacked=2)}
    counts = {"opener/kernel": 0, "rest/kernel": np.arange(1, 5).reshape(2, 2)}
    source = Scales(
        {p.replace("stages/2", "stages/0"): e for p, e in searched(SOURCE).entries.items() if "stages/2" in p}
    )
    found = Scales.transfer(source, sets, counts)
    means = found.vectors["rest/kernel"]["3x3"].mean(axis=-1).ravel()
    expected = [source.vectors[path(0, i)]["3x3"].mean() for i in range(1, 5)]
    np.testing.assert_allclose(means, np.array(expected), rtol=MEANS)
    back = Scales.transfer(found, source.branch_sets, {path(0, i): i for i in range(5)})
    np.testing.assert_allclose(
        back.vectors[path(0, 3)]["3x3"].mean(), found.vectors["rest/kernel"]["3x3"][1, 0].mean(), rtol=MEANS
    )


def test_stages_are_found_as_branches_tell_them():
    counted = counted_depths(branch_sets(SOURCE))
    assert {p: int(index) for p, index in counted.items()} == depths(SOURCE)
    found = places(branch_sets(SOURCE), depths(SOURCE))
    assert [(p.stage, p.index) for p in found] == [
        (stage, index) for stage, count in enumerate((1, *SOURCE.blocks)) for index in range(count)
    ]


def test_layers_are_ordered_by_the_numbers_in_their_paths():
    """`jax.tree.map` sorts paths as text, and 10 before 2; the scales of B1 after it are the same."""
    long = VGGVariant("long", (2, 12, 1, 1), (4, 4, 4, 4, 4))
    source = searched(long)
    mapped = jax.tree.map(lambda v: v, source)
    target = VGGVariant("wide", (2, 12, 1, 1), (8, 8, 8, 8, 8))
    for p, vectors in transferred(target, source).vectors.items():
        chex.assert_trees_all_equal(transferred(target, mapped).vectors[p], vectors)


def test_metadata_say_where_they_come_from():
    metadata = transferred(SOURCE).metadata
    assert (metadata.dataset, metadata.step) == ("some images", 7)
    assert metadata.config == "transferred from source"


def test_errors():
    sets = {"a/kernel": default_branches((5, 5, 4, 4)), "b/kernel": default_branches((5, 5, 4, 4))}
    counts = {"a/kernel": 0, "b/kernel": 1}
    with pytest.raises(
        ValueError, match=r"no layer with these branches: 5x5 of a/kernel, b/kernel.*3x3, 1x1"
    ):
        Scales.transfer(searched(SOURCE), sets, counts)
    with pytest.raises(ValueError, match="`branch_sets` and `depths` must have the same paths"):
        Scales.transfer(searched(SOURCE), sets, {"a/kernel": 0})
    with pytest.raises(ValueError, match="`branch_sets` and `source_depths` must have the same paths"):
        Scales.transfer(searched(SOURCE), sets, counts, source_depths={"a/kernel": 0})
    with pytest.raises(ValueError, match="has no layers"):
        Scales.transfer(Scales({}), sets, counts)
    bad = searched(SOURCE)
    vectors = bad.entries[path(0, 0)].vectors
    vectors["3x3"] = vectors["3x3"].at[0].set(jnp.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        transferred(SOURCE, bad)


class TestLaw:
    def test_only_the_identity_has_decayed(self):
        depth = Scales.depth_rule(branch_sets(SOURCE), depths(SOURCE))
        found = Scales.from_law(branch_sets(SOURCE), depths(SOURCE), 0.936)
        for p, vectors in found.vectors.items():
            for name, vector in vectors.items():
                factor = np.float32(0.3922) if name == "identity" else 1
                np.testing.assert_allclose(vector, depth.vectors[p][name] * factor, rtol=1e-4)
        still = Scales.from_law(branch_sets(SOURCE), depths(SOURCE), 0)
        chex.assert_trees_all_equal(still.vectors, depth.vectors)

    @pytest.mark.parametrize("Lambda", [-1, float("nan"), float("inf")])
    def test_what_no_decay_can_be(self, Lambda):
        with pytest.raises(ValueError, match="`Lambda` is"):
            Scales.from_law(branch_sets(SOURCE), depths(SOURCE), Lambda)


class TestModels:
    def test_of_a_network(self):
        model = models.create("vgg-digits", num_classes=10, in_channels=1, rngs=nnx.Rngs(0))
        source = searched(SOURCE)
        found = transfer_scales(model, source)
        assert found.branch_sets == model.branch_sets()
        assert found.metadata.architecture == model.architecture
        law = law_scales(model, 1.0)
        np.testing.assert_allclose(
            law.vectors[path(1, 1)]["identity"],
            np.full(model.branch_sets()[path(1, 1)].out, np.exp(-1)),
            rtol=1e-6,
        )
        chex.assert_trees_all_equal(law_scales(model, 0).vectors, depth_scales(model).vectors)

    @pytest.mark.parametrize("scales", ["law:0.5", "transfer:{}"])
    def test_of_a_config(self, scales, tmp_path):
        save_scales(tmp_path / "scales", searched(SOURCE))
        config = train.Config(
            scales=scales.format(tmp_path / "scales"), model=train.ModelConfig(mode="repopt")
        )
        train.validate(config)
        task = make_task(config)
        info = task.open_data(config.data)[0].info
        found = task.resolve_scales(config.scales, info)
        assert found.metadata.config == config.scales
        assert found.metadata.architecture == task.architecture()
        model = task.new_model(info, seed=0)
        expected = law_scales(model, 0.5) if "law" in scales else transfer_scales(model, searched(SOURCE))
        chex.assert_trees_all_equal(found.vectors, expected.vectors)
        save_scales(tmp_path / "made", found)
        assert load_scales(tmp_path / "made", model).metadata == found.metadata
        assert smoke(config).scales == ("law:0.5" if "law" in scales else "depth")

    def test_of_configs_that_cannot_be(self, tmp_path):
        for scales, problem in (
            ("law:", "must have a finite number, at least 0, after 'law:'"),
            ("law:-1", "must have a finite number"),
            ("law:nan", "must have a finite number"),
            ("transfer:", "names no directory after 'transfer:'"),
            (f"transfer:{tmp_path}/nowhere", "names no directory after 'transfer:'"),
            ("transfer:gs://bucket/scales", "is a URL"),
            ("nowhere", "is neither ones nor depth nor law:NUMBER nor a directory"),
        ):
            config = train.Config(scales=scales, model=train.ModelConfig(mode="repopt"))
            with pytest.raises(ValueError, match=problem):
                train.validate(config)
        mean = {"scales_mean": True, "model": train.ModelConfig(mode="repopt")}
        with pytest.raises(ValueError, match="`scales_mean` with `scales`='law:1'"):
            train.validate(train.Config(scales="law:1", **mean))
        train.validate(train.Config(scales=f"transfer:{tmp_path}", **mean))


class TestAuthorsFiles:
    """B1's file predicts the layer means of B2's, blocks that repeat, where the files are."""

    def test_b1_as_itself(self):
        source = authors.scales_of("B1")
        variant = VGG_VARIANTS["B1"]
        found = Scales.transfer(source, branch_sets(variant), depths(variant))
        chex.assert_trees_all_equal(found.vectors, source.vectors)
        stages = [p.stage for p in places(source.branch_sets, counted_depths(source.branch_sets))]
        assert np.bincount(stages).tolist() == [1, 4, 6, 16, 1]

    @pytest.mark.parametrize(("name", "least"), [("A0", 0.995), ("B2", 0.995), ("L1", 0.995)])
    def test_layer_means_and_trajectories_keep_their_shape(self, name, least):
        """Of other widths: the means of the layers that both have are those of B1."""
        source, variant = authors.scales_of("B1"), VGG_VARIANTS[name]
        found = Scales.transfer(source, branch_sets(variant), depths(variant))
        pairs = [
            (float(source.vectors[p][n].mean()), float(v.mean()))
            for p, vectors in found.vectors.items()
            if p in source.entries
            for n, v in vectors.items()
        ]
        assert r_squared(*np.array(pairs).T) > least
        u = [np.asarray(found.vectors[path(3, i)]["identity"]) for i in (8, 9)]
        assert np.corrcoef(*u)[0, 1] > 0.8  # in the file .86 to .94

    @pytest.mark.parametrize(("branch", "least"), [("3x3", 0.99), ("1x1", 0.98)])
    def test_b1_predicts_b2(self, branch, least):
        source, real = authors.scales_of("B1"), authors.scales_of("B2")
        variant = VGG_VARIANTS["B2"]
        found = Scales.transfer(source, branch_sets(variant), depths(variant))
        repeats = [p for p, bs in real.branch_sets.items() if "identity" in bs.names]
        true, predicted = (
            np.array([float(s.vectors[p][branch].mean()) for p in repeats]) for s in (real, found)
        )
        assert r_squared(true, predicted) > least


def r_squared(true, predicted):
    return 1 - np.square(predicted - true).sum() / np.square(true - true.mean()).sum()


@pytest.mark.parametrize(
    "make", [depth_scales, lambda f, x: law_scales(f, 1.0, x), lambda f, x: transfer_scales(f, Scales({}), x)]
)
def test_a_function_has_no_order_of_layers(make):
    """`find_branches` takes one; these say what to do, and do not print the parameters that follow it."""
    with pytest.raises(TypeError, match=r"`model` is of type function.*Scales\.depth_rule") as error:
        make(lambda params, x: x @ params["kernel"], {"kernel": np.zeros((99, 99))})
    assert "array" not in str(error.value)
