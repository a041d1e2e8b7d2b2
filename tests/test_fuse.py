"""Deploying: the folded network computes what the trained one does, in float64 and with moved statistics."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import abstract, conv_by_hand, norm_by_hand, random_input, randomised, relative

from repopt_jax import Geometry, fuse, prepare, to_structure
from repopt_jax.core import paths
from repopt_jax.core.published import dbb, repopt, repvgg
from repopt_jax.models import VGGVariant, vgg
from repopt_jax.nn import Block, Branched, ChannelAffine, Merged, PreNorm
from repopt_jax.nn.block import batch_norm, block, conv
from repopt_jax.surgery.fuse import (
    FoldedNorm,
    OutputDifference,
    fold_batch_norm,
    fold_input_norm,
    fuse_block,
    output_difference,
)
from repopt_jax.surgery.modules import named_modules

EXACT = 1e-12  # of the largest output, float64; measured: 8e-16 at most
FORGOTTEN = 0.01  # of the largest output: what forgetting a part exceeds; measured: 0.035 at least

NET = VGGVariant("net", (3, 1, 1, 1), (4, 4, 6, 6, 8), (1, 1, 2, 1, 2), groups=2)
PRE_SE = dataclasses.replace(NET, name="pre_se", pre_se=2)


def network(mode="plain", variant=NET, **options):
    def build(rngs):
        model = vgg(variant, num_classes=5, **options, rngs=rngs)
        return prepare(model, mode, rngs=rngs).model

    return randomised(abstract(build))


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        # Each mode and each place of squeeze-and-excitation in one case; of DBB the layers are in
        # `test_structure`.
        *(
            pytest.param(mode, {}, marks=[pytest.mark.long] if mode in ("search", "repvgg", "dbb") else [])
            for mode in ("plain", "search", "repvgg", "acnet", "dbb", "qarepvgg2")
        ),
        pytest.param("repvgg", {"post_se": True}, marks=pytest.mark.long),
        ("search", {"post_se": True}),
        ("repvgg", {"variant": PRE_SE}),
        pytest.param("plain", {"variant": PRE_SE}, marks=pytest.mark.long),
    ],
)
def test_fused_networks_compute_the_same(mode, options, x64):
    """However trained: grouped, strided and not, with and without identity; with squeeze-and-excitation after
    or before the ReLU."""
    model = network(mode, **options)
    deployed = fuse(model)
    difference = output_difference(model, deployed, random_input(3, 8, 8, 3))
    assert difference.max_rel <= EXACT
    assert difference.agreement == 1.0
    blocks = [b for stage in deployed.stages for b in stage]
    assert {(type(b.conv), b.bn) for b in blocks} == {(nnx.Conv, None)}
    assert all((b.se is not None) == bool(options) for b in blocks)
    assert all(b.se_first == ("variant" in options) for b in blocks)
    plain = {"stages/1/1/conv/kernel", "stages/1/1/conv/bias", "head/kernel", "head/bias"}
    names = set(paths.named_leaves(nnx.state(deployed))[0])
    assert plain <= names
    assert {name.split("/")[3] for name in names if name.startswith("stages")} <= {"conv", "se"}


def random_block(build, *args, **options):
    return randomised(abstract(build, *args, **options))


@pytest.mark.parametrize(("size", "groups", "left"), [(1, 1, False), (1, 2, False), (3, 2, True)])
def test_a_norm_of_the_input_is_folded_where_nothing_is_padded(size, groups, left, x64):
    """With zeros around a map that the norm has shifted, it stays as a factor and a shift."""

    def build(rngs):
        layer = block(4, 6, size, groups=groups, rngs=rngs)
        return layer.replaced(layer.conv, layer.bn, pre=batch_norm(4, kind=PreNorm, rngs=rngs))

    model = random_block(build)
    fused, x = fuse(model), random_input(2, 5, 6, 4)
    expected = conv_by_hand(norm_by_hand(x, model.pre), model.conv.kernel[...], groups=groups)
    expected = np.maximum(norm_by_hand(expected, model.bn), 0)
    assert relative(model(x), expected) <= EXACT
    assert relative(fused(x), expected) <= EXACT
    assert isinstance(fused.pre, ChannelAffine) == left
    # Negative control: folded all the same, the padding would be wrong.
    folded = model.replaced(fold_input_norm(fold_batch_norm(model.conv, model.bn), model.pre), None, pre=None)
    assert (relative(folded(x), expected) > FORGOTTEN) == left


def fold_by_hand(kernel, bn, *, eps=1e-5, mean=True):
    """(kernel, bias) of bn(conv(x)) as RepVGG's paper states it, in NumPy."""
    gamma, beta, mu, var = (np.asarray(v[...]) for v in (bn.scale, bn.bias, bn.mean, bn.var))
    s = gamma / np.sqrt(var + eps)
    return np.asarray(kernel) * s, beta - (mu * s if mean else 0)


def repvgg_by_hand(layer, groups, *, identity=True, **options):
    """Kernel and bias of RepVGG's branches, entry by entry."""
    weights, norms = layer.weights, layer.norms
    channels = weights["3x3"].shape[-1]
    kernel, bias = fold_by_hand(weights["3x3"][...], norms["3x3"], **options)
    small, small_bias = fold_by_hand(weights["1x1"][...], norms["1x1"], **options)
    kernel = kernel.copy()
    kernel[1, 1] += small[0, 0]
    bias = bias + small_bias
    if identity and "identity" in norms:
        diagonal = np.zeros((channels // groups, channels))
        for c in range(channels):
            diagonal[c % (channels // groups), c] = 1
        diagonal, identity_bias = fold_by_hand(diagonal, norms["identity"], **options)
        kernel[1, 1] += diagonal
        bias = bias + identity_bias
    return kernel, bias


@pytest.mark.parametrize(
    ("outputs", "stride", "groups"), [(4, 1, 1), (4, 1, 2), (4, 1, 4), (6, 1, 2), (4, 2, 1)]
)
def test_a_repvgg_layer_folds_as_by_hand(outputs, stride, groups, x64):
    layer = random_block(Branched, repvgg(Geometry((3, 3), 4, outputs, groups, strides=stride)))
    assert ("identity" in layer.norms) == (stride == 1 and outputs == 4)  # of a depthwise layer too
    fused = fuse(layer)
    kernel, bias = repvgg_by_hand(layer, groups)
    assert relative(fused.kernel[...], kernel) <= EXACT
    assert relative(fused.bias[...], bias) <= EXACT
    x = random_input(2, 5, 6, 4)
    assert relative(fused(x), layer(x)) <= EXACT
    assert relative(conv_by_hand(x, kernel, stride=stride, groups=groups, bias=bias), fused(x)) <= EXACT


def test_forgetting_a_part_of_the_fold_is_noticed(x64):
    """Negative control: each mistake that statistics of a fresh batch norm would hide, or nearly."""
    layer = random_block(Branched, repvgg(Geometry((3, 3), 4, 4, 2)))
    x = random_input(2, 5, 6, 4)
    expected = layer(x)

    def difference(**mistake):
        kernel, bias = repvgg_by_hand(layer, 2, **mistake)
        return relative(conv_by_hand(x, kernel, groups=2, bias=bias), expected)

    assert difference() <= EXACT
    assert difference(eps=0) > FORGOTTEN
    assert difference(mean=False) > FORGOTTEN
    assert difference(identity=False) > FORGOTTEN


def test_a_layer_that_was_cast_folds_in_the_precision_of_its_arrays(x64):
    """An average by a ninth in float32, in which the layer was made, is wrong by 1e-9."""
    layer = random_block(Branched, dbb(Geometry((3, 3), 4, 4)))
    assert layer.param_dtype == jnp.float32
    x = random_input(2, 5, 6, 4)
    assert relative(fuse(layer)(x), layer(x)) <= EXACT


def test_flax_keeps_statistics_in_float32(x64):
    """Of a network in float64 too, whose fold must not be computed in the precision of its statistics."""
    options = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
    layer = nnx.Conv(2, 4, (3, 3), **options)
    model = Block(layer, nnx.BatchNorm(4, use_running_average=True, **options))
    branched = Branched(repvgg(Geometry((3, 3), 4, 4)), **options)
    branched.eval()
    x = jnp.asarray(random_input(2, 5, 6, 4))
    for module, images in ((model, x[..., :2]), (branched, x)):
        for norm in [m for _, m in named_modules(module) if isinstance(m, nnx.BatchNorm)]:
            assert norm.var.dtype == jnp.float32
            norm.var[...] = jnp.linspace(0.1, 0.7, 4, dtype=jnp.float32)
        assert relative(fuse(module)(images), module(images)) <= EXACT


def test_a_convolution_with_a_bias_and_a_batch_norm_without_affine(x64):
    def build(rngs):
        return Block(
            conv(3, 4, 5, stride=2, bias=True, rngs=rngs),
            nnx.BatchNorm(4, epsilon=1e-2, use_scale=False, use_bias=False, rngs=rngs),
        )

    block = random_block(build)
    fused = fuse_block(block)
    x = random_input(2, 7, 8, 3)
    assert relative(fused(x), block(x)) <= EXACT
    s = 1 / np.sqrt(np.asarray(block.bn.var[...]) + 1e-2)
    expected = (np.asarray(block.conv.bias[...]) - np.asarray(block.bn.mean[...])) * s
    assert relative(fused.conv.bias[...], expected) <= EXACT


def test_only_some_blocks_are_folded(x64):
    """Branches alone, the batch norms staying: what the authors of RepGhost deploy."""

    def build(rngs):
        first = to_structure(block(4, 6, 3, stride=2, groups=2, rngs=rngs), "repvgg", rngs=rngs)
        last = to_structure(block(5, 5, 3, rngs=rngs), "qarepvgg", rngs=rngs)
        return nnx.Sequential(first, block(6, 5, 1, rngs=rngs), last)

    model, x = random_block(build), random_input(2, 5, 6, 4)
    fused = fuse(model, only=(Branched,))
    assert [type(b.conv) for b in fused.layers] == [nnx.Conv] * 3
    assert [b.bn is None for b in fused.layers] == [True, False, False]
    assert relative(fused(x), model(x)) <= EXACT
    with pytest.raises(TypeError, match="`only` names Sequential, for which no deployed form is registered"):
        fuse(model, only=(Branched, nnx.Sequential))


@pytest.mark.parametrize("mode", ["plain", "repvgg"])
def test_the_original_is_untouched(mode, x64):
    model = network(mode)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
    deployed = fuse(model)
    for variable in jax.tree.leaves(nnx.state(deployed), is_leaf=lambda v: isinstance(v, nnx.Variable)):
        variable[...] = jnp.zeros_like(variable[...])
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model)), before)
    assert isinstance(model.stages[0][0].conv, Branched if mode == "repvgg" else nnx.Conv)


def test_a_model_in_training_mode_is_refused_with_its_layers():
    model = abstract(vgg, NET, num_classes=5)
    with pytest.raises(
        ValueError, match=r"training mode \(batch norms stages/0/0/bn, .* and 4 more use"
    ) as error:
        fuse(model)
    assert "call `model.eval()` first" in str(error.value)
    model.eval()
    model.stages[2][0].bn.use_running_average = False
    with pytest.raises(ValueError, match=r"\(batch norms stages/2/0/bn use batch statistics\)"):
        fuse(model)


class Normed(nnx.Module):
    """Norms right before layers that pad nothing, and where they cannot be folded into what follows."""

    def __init__(self, *, rngs):
        def norm(channels):
            return nnx.BatchNorm(channels, use_fast_variance=False, rngs=rngs)

        self.stem = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norms = nnx.List([norm(n) for n in (4, 6, 6, 6, 6, 6, 6)])
        self.valid = nnx.Conv(4, 6, (3, 3), padding="VALID", feature_group_count=2, rngs=rngs)
        self.after = norm(6)  # of `valid`, which has a norm on either side
        self.point = nnx.Conv(6, 6, (1, 1), strides=2, use_bias=False, rngs=rngs)
        self.wrapped = nnx.Conv(6, 6, (3, 3), padding="CIRCULAR", rngs=rngs)
        self.padded = nnx.Conv(6, 6, (3, 3), rngs=rngs)
        self.active, self.both, self.head = (nnx.Linear(6, 6, rngs=rngs) for _ in range(3))
        self.merged = Merged(repopt(Geometry((), 6, 6)), rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        x = nnx.relu(self.after(self.valid(self.norms[0](x))))
        x = nnx.relu(self.wrapped(self.norms[1](nnx.relu(self.point(self.norms[2](x))))))
        x = nnx.relu(self.padded(self.norms[3](x)))  # kept: zeros around what is shifted
        x = self.active(nnx.relu(self.norms[4](x)))  # kept: an activation in between
        y = self.norms[5](nnx.relu(x.mean((1, 2))))  # kept: read twice
        x = self.norms[6](nnx.relu(self.both(y) + y))
        return self.head(nnx.relu(self.merged(x)))


def test_norms_before_layers_are_found_by_the_flow_of_data(x64):
    model = random_block(lambda rngs: Normed(rngs=rngs))
    x = random_input(2, 7, 8, 3)
    example = (jax.ShapeDtypeStruct(x.shape, x.dtype),)
    fused = fuse(model, example=example)
    left = [path for path, m in named_modules(fused) if isinstance(m, nnx.BatchNorm)]
    assert left == ["norms/3", "norms/4", "norms/5"]
    assert relative(fused(x), model(x)) <= EXACT
    assert (fused.wrapped.padding, fused.point.strides, type(fused.merged)) == ("CIRCULAR", 2, nnx.Linear)
    # Negative control: the padded layer cannot take its norm in.
    (layer, norm), x = (model.padded, model.norms[3]), random_input(2, 7, 8, 6)
    assert relative(fold_input_norm(layer, norm)(x), layer(norm(x))) > FORGOTTEN


class Twice(nnx.Module):
    """A norm that two layers read, a layer that reads two norms, and a norm that a layer before takes in."""

    def __init__(self, *, rngs):
        self.norms = nnx.List([nnx.BatchNorm(4, use_fast_variance=False, rngs=rngs) for _ in range(4)])
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(4)])

    def __call__(self, x):
        (shared, one, other, between), (a, b, twice, first) = self.norms, self.layers
        x = shared(x)
        x = nnx.relu(a(x)) + nnx.relu(b(x))
        x = twice(one(nnx.relu(x))) + twice(other(nnx.tanh(x)))
        return a(between(first(nnx.relu(x))))


def test_a_norm_and_a_layer_that_do_not_always_come_together(x64):
    model = random_block(lambda rngs: Twice(rngs=rngs))
    x = random_input(5, 4)
    fused = fuse(model, example=(x,))
    left = [path for path, m in named_modules(fused) if isinstance(m, nnx.BatchNorm)]
    assert left == ["norms/0", "norms/1", "norms/2"]
    assert relative(fused(x), model(x)) <= EXACT
    chosen = fuse(model, example=lambda model: model.layers[1](model.norms[3](x)))  # here no layer is before
    assert type(chosen.norms[3]) is FoldedNorm


def test_a_layer_whose_input_is_given_by_name_takes_in_its_norm(x64):
    model = random_block(lambda rngs: nnx.Dict(conv=conv(4, 4, 3, rngs=rngs), bn=batch_norm(4, rngs=rngs)))
    x = random_input(2, 5, 5, 4)

    def run(model):
        return model["bn"](model["conv"](inputs=x))

    fused = fuse(model, example=run)
    assert type(fused["bn"]) is FoldedNorm
    assert relative(run(fused), run(model)) <= EXACT


class Residual(nnx.Module):
    """A block that the package does not know."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv = conv(4, 4, 3, rngs=rngs)
        self.bn = nnx.BatchNorm(4, use_fast_variance=False, rngs=rngs)

    def __call__(self, x):
        return x + nnx.relu(self.bn(self.conv(x)))


class FusedResidual(nnx.Module):
    def __init__(self, conv):
        self.conv = conv

    def __call__(self, x):
        return x + nnx.relu(self.conv(x))


class Mixed(nnx.Module):
    """Known and unknown blocks, and one block used twice."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.first = to_structure(block(4, 4, 3, rngs=rngs), "repvgg", rngs=rngs)
        self.blocks = nnx.List([Residual(rngs=rngs), self.first])

    def __call__(self, x):
        x = self.first(x)
        for one in self.blocks:
            x = one(x)
        return x


def test_a_block_of_one_s_own_is_refused_until_registered(x64):
    model = random_block(Mixed)
    with pytest.raises(TypeError, match=r"blocks/0/bn cannot be folded: .* register one for the class"):
        fuse(model)
    with pytest.raises(TypeError, match="no deployed form is registered for Residual"):
        fuse_block(model.blocks[0])

    @fuse_block.register
    def _(block: Residual) -> FusedResidual:
        return FusedResidual(fold_batch_norm(block.conv, block.bn))

    deployed = fuse(model)
    x = random_input(2, 5, 5, 4)
    assert relative(deployed(x), model(x)) <= EXACT
    assert isinstance(deployed.blocks[0], FusedResidual)
    assert deployed.blocks[1] is deployed.first
    assert not [m for _, m in named_modules(deployed) if isinstance(m, nnx.BatchNorm)]


def test_search_layers_become_plain_ones_where_they_stand(x64):
    def build(rngs):
        dense = Merged(repopt(Geometry((), 4, 4)), bias=jnp.ones(4), rngs=rngs)
        stacked = Merged(repopt(Geometry((3,), 4, 4)), stack=(2,), rngs=rngs)
        return nnx.Dict(dense=dense, stacked=stacked)

    model = random_block(build)
    fused = fuse(model)
    assert (type(fused["dense"]), type(fused["stacked"])) == (nnx.Linear, nnx.Conv)
    x = random_input(3, 4)
    assert relative(fused["dense"](x), model["dense"](x)) <= EXACT
    assert fused["stacked"].kernel.shape == (2, 3, 4, 4)
    assert fused["stacked"].bias is None
    x = random_input(2, 3, 5, 4)
    run = nnx.vmap(lambda layer, x: layer(x))
    assert relative(run(fused["stacked"], x), run(model["stacked"], x)) <= EXACT
    odd = Merged(repopt(Geometry((3,), 4, 4, padding=((2, 0),), pad_mode="wrap")), rngs=nnx.Rngs(0))
    with pytest.raises(
        TypeError, match=r"padding \(\(2, 0\),\) in mode 'wrap' has no plain form: nnx.Conv pads"
    ):
        fuse(nnx.Sequential(odd))


def test_a_stack_folds_with_its_stacked_batch_norms(x64):
    """Of layers made and run by `nnx.vmap`, with norms in the branches and one after the sum."""

    def build(rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def make(rngs):
            return to_structure(block(4, 4, 3, rngs=rngs), "qarepvgg", rngs=rngs)

        return make(rngs)

    model = randomised(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    fused = fuse(model)
    assert fused.conv.kernel.shape == (2, 3, 3, 4, 4)
    x = random_input(2, 1, 5, 6, 4)
    run = nnx.vmap(lambda layer, x: layer(x))
    assert relative(run(fused, x), run(model, x)) <= EXACT


def test_the_precision_and_class_of_a_folded_layer_stay():
    def build(rngs):
        layer = nnx.Conv(2, 2, (3,), precision="highest", padding="SAME", strides=2, rngs=rngs)
        return nnx.Dict(conv=layer, bn=nnx.BatchNorm(2, rngs=rngs))

    model = randomised(abstract(build), dtype=jnp.float32)
    fused = fuse(model, pairs={"conv": "bn"})
    assert (fused["conv"].precision, fused["conv"].padding) == ("highest", "SAME")
    x = random_input(2, 6, 2).astype(np.float32)
    assert (
        relative(fused["bn"](fused["conv"](x), None, use_running_average=True), model["bn"](model["conv"](x)))
        < 1e-5
    )


class Shift(nnx.Module):
    def __init__(self, value):
        self.value = nnx.Param(jnp.array([[0, value]]))

    def __call__(self, x):
        return x + self.value[...]


def test_output_difference_of_no_image():
    with pytest.raises(ValueError, match=r"`images` are of shape \(0, 2\): give one image at least"):
        output_difference(np.sin, np.sin, np.ones((0, 2)))
    with pytest.raises(ValueError, match="`batch_size` is 0: it must be at least 1"):
        output_difference(np.sin, np.sin, np.ones((3, 2)), batch_size=0)


def test_output_difference_looks_at_every_batch():
    images = np.array([[0.0, 1.0], [4.0, 1.0], [3.0, 2.0], [1.0, -8.0], [5.0, 5.5]], np.float32)
    expected = OutputDifference(max_abs=1.0, max_rel=1 / 8, agreement=1.0, count=5)
    assert output_difference(Shift(0.0), Shift(1.0), images, batch_size=2) == expected
    nearly = output_difference(Shift(0.0), Shift(1.5), images, batch_size=3)
    assert dataclasses.astuple(nearly) == (1.5, 1.5 / 8, 0.8, 5)
