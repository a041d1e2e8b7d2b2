"""Surgery of layers: the search's scales, draws, the CSLA twin, structures in the place of convolutions."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from any_networks import drawn, random_scales
from flax import nnx
from networks import abstract, relative, values

from repopt_jax import (
    BranchSet,
    Identity,
    Kernel,
    Scales,
    default_branches,
    depth_scales,
    extract_scales,
    find_layers,
    load_scales,
    reinitialize,
    save_scales,
    to_repvgg,
    to_search,
    to_structure,
)
from repopt_jax.core import published
from repopt_jax.core.paths import map_named, named_leaves
from repopt_jax.core.scales import LayerScales, ScalesMetadata
from repopt_jax.models import MOBILEONE_VARIANTS, VGGVariant, mobileone, vgg
from repopt_jax.models.vgg import block_specs
from repopt_jax.nn import Block, Branched, Merged
from repopt_jax.nn.block import batch_norm, block, conv
from repopt_jax.nn.geometry import convolve, explicit_padding, geometry_of, pads_with_zeros
from repopt_jax.surgery.modules import is_training, named_modules
from repopt_jax.surgery.reinitialize import merge_weights, sample_weights, with_kernels
from repopt_jax.surgery.search import csla_twin

EXACT = 1e-12  # of the largest output, float64; measured: 6e-16 at most
WRONG = 0.1  # what another draw or a wrong twin exceeds; measured: 0.63 at least

NET = VGGVariant("net", (2, 1, 1, 1), (4, 4, 4, 4, 4), (1, 1, 2, 1, 1), groups=2)
run = nnx.jit(lambda model, x: model(x))


def network():
    return vgg(NET, num_classes=3, in_channels=4, rngs=nnx.Rngs(0))


def filled(build, dtype=jnp.float32):
    """The module that `build` makes, built abstractly: drawing and compiling for each shape would take most
    of these tests' time."""
    return drawn(nnx.eval_shape(build), dtype=dtype)


@pytest.fixture(scope="module")
def target():
    return filled(network)


class TestExtract:
    def test_the_layers_values_under_the_plain_networks_paths(self):
        model = filled(lambda: to_search(network(), rngs=nnx.Rngs(0)))
        scales = extract_scales(model, metadata=ScalesMetadata("net", step=5))
        assert scales.metadata == ScalesMetadata("net", step=5)
        assert set(scales.entries) == {f"{s.path}/conv/kernel" for s in block_specs(NET)}
        assert scales.branch_sets == model.branch_sets()
        for path, vectors in scales.vectors.items():
            stage, index = path.split("/")[1:3]
            layer = model.stages[int(stage)][int(index)].conv
            for name, vector in vectors.items():
                variable = layer.weights[name] if name == "identity" else layer.scales[name]
                np.testing.assert_array_equal(vector, variable[...])

    def test_a_model_without_a_search_layer(self, target):
        with pytest.raises(ValueError, match="has no layer with scales: give the model of the hyper-search"):
            extract_scales(target)

    def test_structures_that_scales_do_not_describe(self):
        layers = [nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0)) for _ in range(2)]
        model = to_structure(nnx.Sequential(*layers), "orepa", rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"layers/0: the chains .*; layers/1: the chains .*: no scales"):
            extract_scales(model)


def one_training_step(model):
    """Only the forward pass moves the statistics; the update makes it the real thing."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        merged = nnx.merge(graph, params, rest, copy=True)
        y = merged(jax.random.normal(jax.random.key(3), (4, 8, 8, 4)))
        return jnp.mean(y**2), nnx.split(merged, nnx.Param, ...)[2]

    gradients, rest = jax.jit(jax.grad(loss, has_aux=True))(params)
    params = optax.apply_updates(params, jax.tree.map(lambda g: -0.1 * g, gradients))
    return nnx.merge(graph, params, rest, copy=True)


class TestReinitialize:
    def test_kernels_are_the_sum_of_their_parts_and_the_rest_stays(self, target):
        before = values(target)
        scales = random_scales(target.branch_sets())
        new = reinitialize(target, scales, rngs=nnx.Rngs(7))
        weights = sample_weights(scales, nnx.Rngs(7).params())
        after = values(new)
        assert after.keys() == before.keys()
        for path, value in after.items():
            if path in scales.entries:
                w = {name: np.asarray(x) for name, x in weights[path].items()}
                s = {name: np.asarray(x) for name, x in scales.entries[path].vectors.items()}
                expected = s["3x3"] * w["3x3"]
                expected[1, 1] += s["1x1"] * w["1x1"][0, 0]
                if "identity" in w:
                    inputs, outputs = expected.shape[2:]
                    for o in range(outputs):
                        expected[1, 1, o % inputs, o] += s["identity"][o]
                np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6)  # one rounding to float32
                assert relative(value, before[path]) > WRONG
            else:
                np.testing.assert_array_equal(value, before[path])
        chex.assert_trees_all_equal(values(target), before)

    def test_a_trained_model_is_refused(self, target):
        trained = one_training_step(target)
        scales = depth_scales(target)
        message = r"has been trained \(batch statistics stages/0/0/bn/mean, .* and \d+ more have moved\)"
        with pytest.raises(ValueError, match=message) as error:
            reinitialize(trained, scales, rngs=nnx.Rngs(0))
        assert "allow_trained=True" in str(error.value)
        trained_values = values(trained)
        new = values(reinitialize(trained, scales, rngs=nnx.Rngs(0), allow_trained=True))
        fresh = values(reinitialize(target, scales, rngs=nnx.Rngs(0)))
        for path, value in new.items():
            np.testing.assert_array_equal(value, (fresh if path in scales.entries else trained_values)[path])

    def test_every_path_that_does_not_fit_is_listed(self, target):
        sets = dict(target.branch_sets())
        del sets["stages/4/0/conv/kernel"]
        sets["stages/5/0/conv/kernel"] = sets["stages/1/0/conv/kernel"]
        sets["stages/0/0/conv/kernel"] = default_branches((3, 3, 1, 4))  # 4 input channels there
        with pytest.raises(ValueError, match="do not fit the model") as error:
            reinitialize(target, random_scales(sets), rngs=nnx.Rngs(0))
        message = str(error.value)
        assert "1 missing layers: stages/4/0/conv/kernel (3, 3, 4, 4)" in message
        assert "1 extra layers: stages/5/0/conv/kernel (3, 3, 4, 4)" in message
        assert "stages/0/0/conv/kernel (expected (3, 3, 4, 4), found (3, 3, 1, 4))" in message

    def test_values_that_are_not_numbers(self, target):
        scales = depth_scales(target)
        scales.entries["stages/0/0/conv/kernel"].vectors["1x1"] = jnp.full(4, jnp.nan)
        with pytest.raises(ValueError, match="NaN or infinite values: stages/0/0/conv/kernel/1x1"):
            reinitialize(target, scales, rngs=nnx.Rngs(0))

    def test_plain_dicts_in_their_own_dtype(self):
        params = {
            "a": {"kernel": jnp.ones((3, 2, 2), jnp.bfloat16), "bias": jnp.ones(2)},
            "b": {"kernel": jnp.ones(2)},
        }
        scales = random_scales({"a/kernel": default_branches((3, 2, 2))})
        new = reinitialize(params, scales, rngs=nnx.Rngs(0))
        expected = merge_weights(scales, sample_weights(scales, nnx.Rngs(0).params()))["a/kernel"]
        np.testing.assert_array_equal(new["a"]["kernel"], expected.astype(jnp.bfloat16))
        assert new["a"]["kernel"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(new["a"]["bias"], params["a"]["bias"])
        np.testing.assert_array_equal(params["a"]["kernel"], np.ones((3, 2, 2)))

    def test_scales_may_cover_a_part_of_a_tree_and_must_be_in_it(self):
        params = {"a": {"kernel": jnp.ones((2, 2))}}
        scales = random_scales(dict.fromkeys(("a/kernel", "x/kernel", "y"), default_branches((2, 2))))
        with pytest.raises(ValueError, match=r"2 extra layers: x/kernel \(2, 2\), y \(2, 2\)$"):
            reinitialize(params, scales, rngs=nnx.Rngs(0))

    def test_kernels_stay_where_they_are_with_scales_of_a_file(self, target, tmp_path):
        """On two devices: scales that were read bind nothing to one of them, and new kernels are sharded as
        those were whose place they take."""
        save_scales(tmp_path / "scales", random_scales(target.branch_sets()))
        scales = load_scales(tmp_path / "scales", target)
        mesh = jax.make_mesh(
            (2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
        )
        path = "stages/1/0/conv/kernel"
        along = jax.NamedSharding(mesh, jax.P(None, None, None, "fsdp"))
        graph, state = nnx.split(target)
        state = jax.device_put(state, jax.NamedSharding(mesh, jax.P()))
        state = map_named(lambda name, leaf: jax.device_put(leaf, along) if name == path else leaf, state)
        model = nnx.merge(graph, state, copy=True)
        expected = reinitialize(target, scales, rngs=nnx.Rngs(0), allow_trained=True)
        for keep in (None, "split"):
            fresh = reinitialize(model, scales, rngs=nnx.Rngs(0), allow_trained=keep is None, keep=keep)
            for name, leaf in named_leaves(nnx.state(fresh))[0].items():
                assert leaf.sharding == (along if name == path else jax.NamedSharding(mesh, jax.P())), name
            if keep is None:
                chex.assert_trees_all_equal(values(fresh), values(expected))
        search = to_search(model, scales=scales, rngs=nnx.Rngs(0), allow_trained=True)
        assert jax.tree.leaves(nnx.jit(lambda m: m.stages[1][0].conv.merged_kernel())(search))


class TestDraws:
    def test_they_do_not_depend_on_other_layers_and_differ_between_layers_and_seeds(self):
        sets = {name: default_branches((3, 2, 2)) for name in ("a/kernel", "b/kernel", "c/kernel")}
        key = jax.random.key(0)
        all_three = sample_weights(random_scales(sets), key)
        one = sample_weights(random_scales({"b/kernel": sets["b/kernel"]}), key)
        np.testing.assert_array_equal(all_three["b/kernel"]["3"], one["b/kernel"]["3"])
        np.testing.assert_array_equal(all_three["b/kernel"]["1"], one["b/kernel"]["1"])
        other = sample_weights(random_scales(sets), jax.random.key(1))
        for different in (all_three["a/kernel"], other["b/kernel"]):
            assert not np.any(np.asarray(different["3"]) == np.asarray(one["b/kernel"]["3"]))

    def test_the_identity_s_weight_is_the_searched_value(self):
        scales = random_scales({"k": default_branches((3, 4, 4))})
        np.testing.assert_array_equal(
            sample_weights(scales, jax.random.key(0))["k"]["identity"], scales.vectors["k"]["identity"]
        )

    def test_merged_kernels_have_the_spread_that_the_formula_gives(self):
        """A branch drawn from uniform(-1/sqrt(n), 1/sqrt(n)), n its inputs, has variance 1 / (3 n)."""
        inputs, outputs = 64, 128
        branches = BranchSet((3, 3, inputs, outputs), (Kernel((3, 3)), Kernel((1, 1))))
        s, t = 0.7, -2.0
        vectors = {"3x3": jnp.full(outputs, s), "1x1": jnp.full(outputs, t)}
        scales = Scales({"k": LayerScales(branches, vectors)})
        kernel = np.asarray(merge_weights(scales, sample_weights(scales, jax.random.key(0)))["k"])
        outer = s / np.sqrt(3 * 9 * inputs)
        centre = np.sqrt(outer**2 + t**2 / (3 * inputs))
        # 8192 draws at the centre: a standard error of the deviation below 0.8 %
        assert kernel[1, 1].std() == pytest.approx(centre, rel=0.03)
        assert kernel[0].std() == pytest.approx(outer, rel=0.03)
        assert np.abs(kernel[0]).max() <= s / np.sqrt(9 * inputs)
        assert abs(kernel[1, 1].mean()) < 4 * centre / np.sqrt(inputs * outputs)


class Layers(nnx.Module):
    """Convolutions as users write them: one shared, biases, padding by name and number, one and no spatial
    axis."""

    def __init__(self, *, rngs: nnx.Rngs):
        f64 = {"param_dtype": jnp.float64, "rngs": rngs}
        self.stem = nnx.Conv(3, 4, (3, 3), strides=2, padding=1, **f64)
        self.shared = nnx.Conv(4, 4, (3, 3), padding="SAME", feature_group_count=2, use_bias=False, **f64)
        self.again = self.shared
        self.wide = nnx.Conv(4, 4, (5, 5), padding="VALID", kernel_dilation=1, **f64)
        self.dilated = nnx.Conv(4, 4, (3, 3), padding=((2, 2), (2, 2)), kernel_dilation=(2, 2), **f64)
        self.line = nnx.Conv(4, 6, (3,), padding=[(1, 1)], **f64)
        self.dense = nnx.Linear(6, 6, **f64)
        self.head = nnx.Linear(6, 2, **f64)

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        x = nnx.relu(self.again(nnx.relu(self.shared(x))))
        x = nnx.relu(self.dilated(nnx.relu(self.wide(x))))
        x = nnx.relu(self.line(x.mean(1)))
        return self.head(nnx.relu(self.dense(x.mean(1))))


LAYER_SETS = {
    "stem/kernel": default_branches((3, 3, 3, 4), stride=2),
    "again/kernel": default_branches((3, 3, 2, 4), groups=2),
    "wide/kernel": BranchSet(
        (5, 5, 4, 4), (Kernel((5, 5)), Kernel((3, 3), (2, 2)), Kernel((1, 5)), Identity())
    ),
    "dilated/kernel": default_branches((3, 3, 4, 4)),
    "line/kernel": default_branches((3, 4, 6)),
    "dense/kernel": default_branches((6, 6)),
}


@pytest.fixture(scope="module")
def twins():
    """A float64 network with merged kernels, their scales and branch tensors, an input and its output."""
    with jax.enable_x64(True):
        model = filled(lambda: Layers(rngs=nnx.Rngs(0)), jnp.float64)
        scales, rng = random_scales(LAYER_SETS, dtype=jnp.float64), np.random.default_rng(1)
        weights = {
            path: {name: jnp.asarray(rng.normal(size=shape) / 3) for name, shape in bs.shapes().items()}
            for path, bs in LAYER_SETS.items()
        }
        model = with_kernels(model, jax.jit(merge_weights)(scales, weights))
        x = jnp.asarray(rng.normal(size=(2, 14, 12, 3)))
        return model, scales, weights, x, run(model, x)


class TestTwin:
    @pytest.mark.parametrize("trainable", [False, True])
    def test_computes_what_the_plain_network_with_merged_kernels_does(self, trainable, x64, twins):
        model, scales, weights, x, expected = twins
        twin = csla_twin(model, scales, weights, trainable_scales=trainable)
        assert expected.dtype == jnp.float64
        assert relative(run(twin, x), expected) <= EXACT
        layers = [layer for _, layer in named_modules(twin) if isinstance(layer, Merged)]
        assert len(layers) == len(LAYER_SETS)
        assert isinstance(twin.head, nnx.Linear)
        assert isinstance(model.stem, nnx.Conv)  # the given model keeps its layers
        assert twin.again is twin.shared  # and a shared layer stays shared
        assert isinstance(twin.shared, Merged)
        params = nnx.state(twin, nnx.Param)
        assert ("scales" in params["stem"]) == trainable
        assert {"weights", "bias"} <= set(params["stem"])

    def test_other_draws_are_another_function(self, x64, twins):
        """Negative control of the above."""
        model, scales, weights, x, expected = twins
        flipped = jax.tree.map(jnp.negative, scales)
        assert relative(run(csla_twin(model, flipped, weights), x), expected) > WRONG
        rolled = {p: {n: jnp.roll(w, 1, -1) for n, w in d.items()} for p, d in weights.items()}
        assert relative(run(csla_twin(model, scales, rolled), x), expected) > WRONG

    def test_weights_of_other_branches_are_listed(self, twins):
        model, scales, weights, *_ = twins
        wrong = weights | {"x/kernel": {"1x1": jnp.zeros(1)}, "dense/kernel": {}}
        wrong["line/kernel"] = weights["line/kernel"] | {"1": jnp.zeros((4, 6))}
        with pytest.raises(ValueError, match="`weights` do not fit the scales: ") as error:
            csla_twin(model, scales, wrong)
        for part in (
            "2 missing branch tensors: dense/kernel/dense (6, 6), dense/kernel/identity (6,)",
            "1 extra branch tensors: x/kernel/1x1 (1,)",
            "1 misshapen branch tensors: line/kernel/1 (expected (1, 4, 6), found (4, 6))",
        ):
            assert part in str(error.value)

    def test_what_cannot_become_a_twin(self, x64, twins):
        model = nnx.clone(twins[0])
        model.other = nnx.Dict(kernel=nnx.Param(jnp.ones((2, 2))))
        with pytest.raises(ValueError, match="1 extra layers: nowhere/kernel"):
            csla_twin(model, random_scales({"nowhere/kernel": LAYER_SETS["stem/kernel"]}), {})
        with pytest.raises(TypeError, match=r"only kernels of nnx.Conv, .*nnx.Linear, .*, not other/kernel"):
            csla_twin(model, random_scales({"other/kernel": default_branches((2, 2))}), {})


class Units(nnx.Module):
    """Blocks, one used twice, and a convolution that is also used without its block."""

    def __init__(self, *, rngs):
        self.unit = block(4, 4, 3, rngs=rngs)
        self.again = self.unit
        self.half = block(4, 4, 3, stride=2, rngs=rngs)
        self.bare = self.half.conv
        self.biased = Block(conv(4, 4, 3, bias=True, rngs=rngs), batch_norm(4, rngs=rngs), activation="none")


@pytest.fixture(scope="module")
def units():
    return filled(lambda: Units(rngs=nnx.Rngs(0)))


class TestStructures:
    def test_a_block_s_batch_norm_gives_way_unless_the_structure_has_one(self, units):
        new = to_repvgg(units, rngs=nnx.Rngs(0))
        assert (type(new.unit.conv), new.unit.bn) == (Branched, None)
        assert new.again is new.unit
        assert set(new.unit.conv.norms) == {"3x3", "1x1", "identity"}
        # The convolution that is also used by itself keeps the block's batch norm for the block alone.
        assert (type(new.half.conv), type(new.half.bn)) == (Branched, nnx.BatchNorm)
        assert new.bare is new.half.conv
        chex.assert_trees_all_equal(values(new.half.bn), values(units.half.bn))
        np.testing.assert_array_equal(new.biased.conv.bias[...], units.biased.conv.bias[...])
        assert new.biased.activation == "none"
        assert isinstance(units.unit.conv, nnx.Conv)
        assert np.isfinite(new.unit(jnp.ones((1, 5, 5, 4)))).all()
        outer = to_structure(units, "qarepvgg", r"again/conv", rngs=nnx.Rngs(0))
        assert (type(outer.unit.conv), type(outer.unit.bn)) == (Branched, nnx.BatchNorm)
        without = to_structure(units, published.repopt, r"again/conv", rngs=nnx.Rngs(0))
        assert (type(without.unit.conv), type(without.unit.bn)) == (Merged, nnx.BatchNorm)

    def test_draws_go_by_path_and_select_leaves_the_others(self, units):
        some = to_repvgg(units, r"unit/conv|again/conv", {r"again/conv": [Kernel((3, 3))]}, rngs=nnx.Rngs(0))
        every = to_repvgg(units, branches=[Kernel((3, 3))], rngs=nnx.Rngs(0))
        other = to_repvgg(units, branches=[Kernel((3, 3))], rngs=nnx.Rngs(1))
        first, second, third = (m.unit.conv.weights["3x3"][...] for m in (some, every, other))
        np.testing.assert_array_equal(first, second)
        assert relative(third, second) > WRONG
        assert relative(every.biased.conv.weights["3x3"][...], second) > WRONG
        assert type(some.half.conv) is nnx.Conv

    def test_branches_for_the_logits_alone(self):
        model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        with pytest.raises(
            ValueError, match=r"the model itself, is the dense layer that makes the logits: .*select"
        ):
            to_repvgg(model, branches=[Kernel(())], rngs=nnx.Rngs(0))

    def test_a_structure_by_rules(self, units):
        wide = functools.partial(published.dbb, middle=8)
        new = to_structure(units, {r"bare": "acnet", r".*": wide}, rngs=nnx.Rngs(0))
        assert set(new.half.conv.norms) == {"3x3", "3x1", "1x3"}
        assert new.unit.conv.weights["1x1_3x3_0"].shape == (1, 1, 4, 8)

    def test_a_network_s_own_description_of_a_name_counts(self):
        """`models.Network.descriptions`: MobileOne's copies; not where a description itself is given."""
        model = abstract(mobileone, MOBILEONE_VARIANTS["digits"], num_classes=2)
        for described, copies in (("mobileone", {"3x3_0", "3x3_1"}), (published.mobileone, {"3x3_0"})):
            new = nnx.eval_shape(lambda m, d=described: to_structure(m, d, rngs=nnx.Rngs(0)), model)
            assert {name for name in new.stages[1][0].conv.norms if name.startswith("3x3")} == copies

    def test_what_has_no_such_structure_is_listed(self, units):
        with pytest.raises(
            ValueError, match=r"no structure 'vgg' \(did you mean 'repvgg'\?\): it must be one of repvgg, mob"
        ):
            to_structure(units, "vgg", rngs=nnx.Rngs(0))
        rules = {r"bare|biased/.*": "unireplknet"}
        with pytest.raises(ValueError, match=r"^no layer of `model` becomes .*again/conv: no rule"):
            to_structure(units, rules, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"not defined for all selected .*again/conv: no rule") as error:
            to_structure(units, rules, ".*", rngs=nnx.Rngs(0))
        assert "biased/conv: the window is (3, 3): all sides must be the same, one" in str(error.value)
        with pytest.raises(ValueError, match=r"rules 'unit', '5x5' of `structure` match none of .* bare"):
            to_structure(units, {"unit": "acnet", "5x5": "dbb", r".*": "dbb"}, rngs=nnx.Rngs(0))


class TestPadding:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"padding": "VALID", "strides": 2}, ((0, 0), (0, 0))),
            ({"padding": "SAME"}, ((1, 1), (2, 2))),
            ({"padding": "SAME", "kernel_dilation": (3, 1)}, ((3, 3), (2, 2))),
            ({"padding": "SAME", "strides": (1, 1)}, ((1, 1), (2, 2))),
            ({"padding": 2}, ((2, 2), (2, 2))),
            ({"padding": (1, 0)}, ((1, 1), (0, 0))),
            ({"padding": [(0, 1), (2, 3)]}, ((0, 1), (2, 3))),
            ({"padding": "CIRCULAR", "strides": 2}, ((1, 1), (2, 2))),
            ({"padding": "REFLECT", "kernel_dilation": 2}, ((2, 2), (4, 4))),
        ],
    )
    def test_as_pairs(self, options, expected):
        layer = nnx.eval_shape(lambda: nnx.Conv(1, 1, (3, 5), **options, rngs=nnx.Rngs(0)))
        assert explicit_padding(layer) == expected

    def test_same_on_an_even_kernel_is_flax_s(self):
        layer = nnx.eval_shape(lambda: nnx.Conv(1, 1, (4,), padding="SAME", rngs=nnx.Rngs(0)))
        assert explicit_padding(layer) == ((1, 2),)

    @pytest.mark.parametrize(("side", "dilation", "pairs"), [(3, 1, (2, 0)), (4, 1, (3, 0)), (5, 2, (8, 0))])
    def test_what_shifts_the_window_is_refused_with_pairs_that_compute_the_same(self, side, dilation, pairs):
        def layer(padding):
            return nnx.Conv(3, 4, (side,), padding=padding, kernel_dilation=dilation, rngs=nnx.Rngs(0))

        causal = layer("CAUSAL")
        scales = random_scales({"layers/0/kernel": default_branches((side, 3, 4))})
        with pytest.raises(ValueError, match=r"padding 'CAUSAL' .* give the layer explicit pairs") as error:
            csla_twin(nnx.Sequential(causal), scales, {})
        assert str(error.value).endswith(f": padding=({pairs},)")
        x = np.random.default_rng(0).normal(size=(2, 9, 3)).astype(np.float32)
        np.testing.assert_array_equal(layer((pairs,))(x), causal(x))
        assert np.abs(layer("SAME")(x) - causal(x)).max() > 0.1
        find_layers(nnx.Sequential(layer((pairs,))))

    @pytest.mark.parametrize("kind", [nnx.Conv, nnx.ConvTranspose])
    @pytest.mark.parametrize("padding", ["SAME", "SAME_LOWER", "same", "Same_Lower", "VALID", "valid"])
    @pytest.mark.parametrize("window", [(3,), (4, 5)])
    def test_names_in_any_case_are_the_pairs_that_compute_the_same(self, kind, padding, window):
        """An even window has one more zero on one side; on which depends on the name, and for a transposed
        convolution on how it is written."""
        layer = kind(2, 3, window, padding=padding, rngs=nnx.Rngs(0))
        x = np.random.default_rng(0).normal(size=(2, *(7, 6)[: len(window)], 2)).astype(np.float32)
        geometry = geometry_of(layer)
        y = convolve(jnp.asarray(x), layer.kernel[...], geometry)
        np.testing.assert_allclose(y, layer(x), atol=1e-5)
        if kind is nnx.Conv:
            assert pads_with_zeros(layer) == (padding.upper() != "VALID")
            assert geometry.padding == explicit_padding(layer)

    def test_what_is_no_name_and_what_depends_on_the_size(self):
        def layer(padding, strides=1):
            return nnx.eval_shape(
                lambda: nnx.Conv(2, 2, (3, 3), strides=strides, padding=padding, rngs=nnx.Rngs(0))
            )

        with pytest.raises(ValueError, match=r"padding 'circular' is none that nnx.Conv can run: it knows"):
            find_layers(nnx.Sequential(layer("circular")))
        with pytest.raises(ValueError, match="'SAME_LOWER' with strides 2 depends on the input's size: give"):
            find_layers(nnx.Sequential(layer("SAME_LOWER", 2)))
        assert geometry_of(layer("same", 2)) == geometry_of(layer("SAME", 2))
        assert geometry_of(layer("valid", 2)) == geometry_of(layer("VALID", 2))
        assert pads_with_zeros(layer("SAME_LOWER", 2))
        assert pads_with_zeros(layer("same", 2))

    def test_no_pairs_are_advised_where_flax_runs_no_layer(self):
        layer = nnx.Conv(3, 4, (3, 3), padding="CAUSAL", rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="only implemented for 1D"):
            layer(np.zeros((1, 5, 5, 3), np.float32))
        with pytest.raises(ValueError, match=r"runs it along one spatial axis only$"):
            find_layers(nnx.Sequential(layer))


class Rated(nnx.Module):
    """With attributes that may mean something else elsewhere."""

    def __init__(self, **attributes):
        for name, value in attributes.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("module", "training"),
    [
        (lambda: Rated(), False),
        *((functools.partial(Rated, rate=rate), False) for rate in ((1, 2), "linear", None, 3)),
        (lambda: Rated(rate=nnx.Param(jnp.ones(2))), False),
        (lambda: Rated(rate=(1, 2), deterministic=True), False),
        (lambda: Rated(dropout_rate=None, deterministic=True), False),
        (lambda: Rated(dropout_rate=None, deterministic=False), True),
        (lambda: Rated(deterministic=False), True),
        (lambda: nnx.Dropout(0.5, rngs=nnx.Rngs(0)), True),
        (lambda: nnx.Dropout(0.0, rngs=nnx.Rngs(0)), False),
        (lambda: nnx.Dropout(0.5, deterministic=True), False),
        (lambda: nnx.BatchNorm(3, rngs=nnx.Rngs(0)), True),
        (lambda: nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0)), False),
    ],
)
def test_what_is_in_training_mode(module, training):
    assert is_training(module()) == training
