"""Deploying: the folded network computes what the trained one does, in float64 and with moved statistics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import abstract, random_input, randomised, relative

from repopt_jax import fuse
from repopt_jax.core import paths
from repopt_jax.core.branches import Average, BranchSet, Identity, Kernel, default_branches
from repopt_jax.models import KINDS, RepOptVGG, VGGVariant
from repopt_jax.nn import ConvNorm, CSLAConv, FusedBlock, NormedBranches, PlainBlock, RepVGGBlock
from repopt_jax.nn.blocks import batch_norm, conv
from repopt_jax.surgery.fuse import OutputDifference, fold_batch_norm, fuse_block, output_difference
from repopt_jax.surgery.modules import named_modules

EXACT = 1e-12  # of the largest output, float64; measured: 8e-16 at most
FORGOTTEN = 0.01  # of the largest output: what forgetting a part exceeds; measured: 0.035 at least
WEAK = 1e-3  # what half of one branch of several exceeds; measured: 8e-3 at least
EPS = 1e-5

NET = VGGVariant("net", (3, 1, 1, 1), (4, 4, 6, 6, 8), (1, 1, 2, 1, 2), groups=2)


def network(kind="target", variant=NET, **options):
    options = {"kind": kind, "num_classes": 5, **options}
    return randomised(abstract(RepOptVGG, variant, **options))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {}) for kind in KINDS),
        ("repvgg", {"post_se": True}),
        ("search", {"post_se": True, "form": "branches"}),
        ("repvgg", {"variant": dataclasses.replace(NET, name="pre_se", pre_se=2)}),
        ("target", {"variant": dataclasses.replace(NET, name="pre_se", pre_se=2)}),
    ],
)
def test_fused_networks_compute_the_same(kind, options, x64):
    """Every kind: grouped, strided and not, with and without identity; with squeeze-and-excitation after or
    before the ReLU."""
    model = network(kind, **options)
    deployed = fuse(model)
    difference = output_difference(model, deployed, random_input(3, 8, 8, 3))
    assert difference.max_rel <= EXACT
    assert difference.agreement == 1.0
    blocks = [block for stage in deployed.stages for block in stage]
    assert {type(block) for block in blocks} == {FusedBlock}
    assert all((block.se is not None) == bool(options.keys() & {"post_se", "variant"}) for block in blocks)
    assert all(block.se_first == ("variant" in options) for block in blocks)
    plain = {"stages/1/1/conv/kernel", "stages/1/1/conv/bias", "head/kernel", "head/bias"}
    names = set(paths.named_leaves(nnx.state(deployed))[0])
    assert plain <= names
    assert {name.split("/")[3] for name in names if name.startswith("stages")} <= {"conv", "se"}


def random_block(build, *args, **options):
    return randomised(abstract(build, *args, **options))


def fold_by_hand(kernel, bn, *, eps=EPS, mean=True):
    """(kernel, bias) of bn(conv(x)) as RepVGG's paper states it, in NumPy."""
    gamma, beta, mu, var = (np.asarray(v[...]) for v in (bn.scale, bn.bias, bn.mean, bn.var))
    s = gamma / np.sqrt(var + eps)
    return np.asarray(kernel) * s, beta - (mu * s if mean else 0)


def repvgg_by_hand(block, groups, *, identity=True, **options):
    """Kernel and bias of a RepVGG block, branch by branch, entry by entry."""
    channels = block.conv_3x3.kernel.shape[-1]
    kernel, bias = fold_by_hand(block.conv_3x3.kernel[...], block.bn_3x3, **options)
    small, small_bias = fold_by_hand(block.conv_1x1.kernel[...], block.bn_1x1, **options)
    kernel = kernel.copy()
    kernel[1, 1] += small[0, 0]
    bias = bias + small_bias
    if identity and block.bn_identity is not None:
        diagonal = np.zeros((channels // groups, channels))
        for c in range(channels):
            diagonal[c % (channels // groups), c] = 1
        diagonal, identity_bias = fold_by_hand(diagonal, block.bn_identity, **options)
        kernel[1, 1] += diagonal
        bias = bias + identity_bias
    return kernel, bias


@pytest.mark.parametrize(
    ("outputs", "stride", "groups"), [(4, 1, 1), (4, 1, 2), (4, 1, 4), (6, 1, 2), (4, 2, 1)]
)
def test_a_repvgg_block_folds_as_by_hand(outputs, stride, groups, x64):
    block = random_block(RepVGGBlock, 4, outputs, stride=stride, groups=groups)
    assert (block.bn_identity is not None) == (stride == 1 and outputs == 4)  # of a depthwise block too
    fused = fuse_block(block)
    kernel, bias = repvgg_by_hand(block, groups)
    assert relative(fused.conv.kernel[...], kernel) <= EXACT
    assert relative(fused.conv.bias[...], bias) <= EXACT
    x = random_input(2, 5, 6, 4)
    assert relative(fused(x), block(x)) <= EXACT


def test_forgetting_a_part_of_the_fold_is_noticed(x64):
    """Negative control: each mistake that statistics of a fresh batch norm would hide, or nearly."""
    block = random_block(RepVGGBlock, 4, 4, groups=2)
    x = random_input(2, 5, 6, 4)
    expected = block(x)
    fused = fuse_block(block)

    def difference(**mistake):
        fused.conv.kernel[...], fused.conv.bias[...] = map(jnp.asarray, repvgg_by_hand(block, 2, **mistake))
        return relative(fused(x), expected)

    assert difference() <= EXACT
    assert difference(eps=0) > FORGOTTEN
    assert difference(mean=False) > FORGOTTEN
    assert difference(identity=False) > FORGOTTEN


def test_a_convolution_with_a_bias_and_a_batch_norm_without_affine(x64):
    def build(rngs):
        return PlainBlock(
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


class Parts(nnx.Module):
    """A convolution with its batch norm, and a block of another class."""

    def __init__(self, *, rngs):
        self.linear = ConvNorm(conv(4, 6, 3, stride=2, groups=2, rngs=rngs), batch_norm(6, rngs=rngs))
        self.block = PlainBlock(conv(6, 5, 1, rngs=rngs), batch_norm(5, rngs=rngs))

    def __call__(self, x):
        return self.block(self.linear(x))


def test_a_convolution_and_its_batch_norm_become_a_convolution_in_their_place(x64):
    """Without a ReLU, and if so asked nothing else changes."""
    model = random_block(Parts)
    x = random_input(2, 5, 6, 4)
    for only in ((), (ConvNorm,)):
        fused = fuse(model, only=only)
        assert type(fused.linear) is nnx.Conv
        assert type(fused.block) is (PlainBlock if only else FusedBlock)
        assert relative(fused.linear(x), model.linear(x)) <= EXACT
        assert relative(fused(x), model(x)) <= EXACT
    kernel, bias = fold_by_hand(model.linear.conv.kernel[...], model.linear.bn)
    assert relative(fused.linear.kernel[...], kernel) <= EXACT
    assert relative(fused.linear.bias[...], bias) <= EXACT
    with pytest.raises(TypeError, match="`only` names Parts, for which no deployed form is registered"):
        fuse(model, only=(ConvNorm, Parts))


@pytest.mark.parametrize("kind", ["target", "repvgg"])
def test_the_original_is_untouched(kind, x64):
    model = network(kind)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
    deployed = fuse(model)
    for variable in jax.tree.leaves(nnx.state(deployed), is_leaf=lambda v: isinstance(v, nnx.Variable)):
        variable[...] = jnp.zeros_like(variable[...])
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model)), before)
    assert isinstance(model.stages[0][0], RepVGGBlock if kind == "repvgg" else PlainBlock)


def test_a_model_in_training_mode_is_refused_with_its_layers():
    model = nnx.eval_shape(lambda: RepOptVGG(NET, num_classes=5, rngs=nnx.Rngs(0)))
    with pytest.raises(
        ValueError, match=r"training mode \(batch norms stages/0/0/bn, .* and 4 more use"
    ) as error:
        fuse(model)
    assert "call `model.eval()` first" in str(error.value)
    model.eval()
    model.stages[2][0].bn.use_running_average = False
    with pytest.raises(ValueError, match=r"\(batch norms stages/2/0/bn use batch statistics\)"):
        fuse(model)


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
        self.first = RepVGGBlock(4, 4, rngs=rngs)
        self.blocks = nnx.List([Residual(rngs=rngs), self.first])

    def __call__(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
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


def conv_by_taps(x, kernel, *, strides, pads, mode, dilation, groups):
    """A 2-D convolution, tap by tap, in NumPy."""
    rows, columns, inputs, outputs = kernel.shape
    x = np.pad(x, ((0, 0), *pads, (0, 0)), mode)
    height = (x.shape[1] - (rows - 1) * dilation[0] - 1) // strides[0] + 1
    width = (x.shape[2] - (columns - 1) * dilation[1] - 1) // strides[1] + 1
    y = np.zeros((len(x), height, width, outputs))
    for i, j, o in np.ndindex(rows, columns, outputs):
        top, left, first = i * dilation[0], j * dilation[1], o // (outputs // groups) * inputs
        window = x[
            :, top : top + height * strides[0] : strides[0], left : left + width * strides[1] : strides[1]
        ]
        y[..., o] += window[..., first : first + inputs] @ kernel[i, j, :, o]
    return y


NORMED = {
    "strided": ((3, 3, 4, 6), {"strides": 2, "padding": ((1, 1), (1, 1))}, (Kernel((1, 3)), Average())),
    "grouped": (
        (3, 5, 2, 4),
        {"padding": ((1, 1), (2, 2)), "dilation": (1, 2)},
        (Kernel((1, 1)), Identity()),
    ),
    "circular": ((3, 3, 4, 4), {"padding": ((1, 1), (1, 1)), "pad_mode": "wrap"}, (Identity(), Average())),
    "mirrored": ((5, 3, 4, 4), {"padding": ((2, 2), (1, 1)), "pad_mode": "reflect"}, (Kernel((3, 1)),)),
}


@pytest.mark.parametrize("name", NORMED)
def test_branches_with_a_batch_norm_each_become_one_convolution(name, x64):
    kernel, geometry, branches = NORMED[name]
    groups = 4 // kernel[2]
    branches = BranchSet(kernel, (Kernel(kernel[:2]), *branches), groups)

    def build(rngs):
        return NormedBranches(branches, **geometry, bias=jnp.ones(kernel[-1]), rngs=rngs)

    layer = random_block(build)
    fused = fuse(layer)
    assert type(fused) is nnx.Conv
    x = random_input(2, 8, 9, 4)
    assert relative(fused(x), layer(x)) <= EXACT
    by_hand = conv_by_taps(
        x,
        np.asarray(fused.kernel[...]),
        strides=layer.strides,
        pads=layer.padding,
        mode=layer.pad_mode,
        dilation=layer.dilation,
        groups=groups,
    )
    assert relative(by_hand + np.asarray(fused.bias[...]), fused(x)) <= EXACT
    layer.norms[branches.names[-1]].var[...] *= 4
    assert relative(layer(x), fused(x)) > WEAK


def test_search_layers_become_plain_ones_where_they_stand(x64):
    def build(rngs):
        dense = CSLAConv(default_branches((4, 4)), bias=jnp.ones(4), rngs=rngs)
        stacked = CSLAConv(default_branches((3, 4, 4)), padding=((1, 1),), stack=(2,), rngs=rngs)
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
    odd = CSLAConv(default_branches((3, 4, 4)), padding=((2, 0),), pad_mode="wrap", rngs=nnx.Rngs(0))
    with pytest.raises(
        TypeError, match=r"padding \(\(2, 0\),\) in mode 'wrap' has no plain form: nnx.Conv pads"
    ):
        fuse(nnx.Sequential(odd))


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


def test_output_difference_looks_at_every_batch():
    images = np.array([[0.0, 1.0], [4.0, 1.0], [3.0, 2.0], [1.0, -8.0], [5.0, 5.5]], np.float32)
    expected = OutputDifference(max_abs=1.0, max_rel=1 / 8, agreement=1.0, count=5)
    assert output_difference(Shift(0.0), Shift(1.0), images, batch_size=2) == expected
    nearly = output_difference(Shift(0.0), Shift(1.5), images, batch_size=3)
    assert dataclasses.astuple(nearly) == (1.5, 1.5 / 8, 0.8, 5)
