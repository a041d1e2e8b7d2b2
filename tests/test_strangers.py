"""Networks of public collections: found, searched, re-initialised, checked, given branches and fused."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiers
import tolerances
from flax import nnx
from networks import randomised
from strangers import STRANGERS, VAE, Stranger, call

from repopt_jax import (
    extract_scales,
    find_branches,
    find_structures,
    fuse,
    reinitialize,
    repopt_mask,
    to_search,
    to_structure,
    verify_equivalence,
)
from repopt_jax.core.published import repopt
from repopt_jax.nn import Merged
from repopt_jax.nn.geometry import convolve, geometry_of, plain_layer
from repopt_jax.surgery.fuse import output_difference
from repopt_jax.surgery.modules import named_modules


def loss_of(model, batch):
    return jnp.mean((call(model, batch["x"]) - batch["y"].mean()) ** 2)


def train(model, tx, batches):
    """A loop as anybody writes it; returns the losses."""
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        loss, grads = nnx.value_and_grad(loss_of)(model, batch)
        optimizer.update(model, grads)
        return loss

    return [float(step(model, optimizer, batch)) for batch in batches]


def the_whole_way(make, batches, structure, example):
    sgd = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(1e-3, 0.9, nesterov=True))
    search_model = to_search(make(), rngs=nnx.Rngs(0))
    losses = train(search_model, sgd, batches)
    scales = extract_scales(search_model)
    model = reinitialize(make(), scales, rngs=nnx.Rngs(1))
    tx = optax.chain(repopt_mask(scales), sgd)
    pair = {"optimizer": tx, "twin_optimizer": sgd, "loss": loss_of}
    check = verify_equivalence(model, scales, batches, **pair, rngs=nnx.Rngs(2))
    branched = to_structure(model, structure, example=example, rngs=nnx.Rngs(3))
    deployed = fuse(randomised(branched), example=example)
    return losses, scales, check, branched, deployed


# The others are `long`: these have depthwise, dense and recurrent layers among them, attention and noise.
@pytest.mark.parametrize("name", tiers.often(STRANGERS, "ConvNeXt", "ViT", "VAE", "GRU"))
def test_the_whole_way(name, x64):
    stranger = STRANGERS[name]
    batches, made = stranger.batches(), repopt if stranger.structure == "repopt" else stranger.structure
    x = batches[0]["x"]

    def example(model):
        return call(model, x)

    model = stranger.fresh()
    assert {path.removesuffix("/kernel") for path in find_branches(model)} == set(stranger.taken)
    losses, scales, check, branched, deployed = the_whole_way(
        lambda: stranger.fresh(jnp.float64), batches, made, example
    )
    assert np.isfinite(losses).all()
    assert scales.branch_sets == find_branches(model)
    assert check.max_difference <= tolerances.STRANGERS
    assert check.movement > 1e-5
    left = [path for path, m in named_modules(deployed) if isinstance(m, nnx.BatchNorm)]
    assert left == sorted(stranger.kept)
    branched.eval()
    options = {"rngs": nnx.Rngs(noise=3)} if stranger.build is VAE else {}
    difference = output_difference(branched, deployed, x, **options)
    assert difference.max_rel <= tolerances.STRANGERS
    # Negative control: a network with other statistics is another function.
    assert output_difference(randomised(branched, 1), deployed, x, **options).max_rel > 1e-3


def test_the_whole_way_takes_twelve_lines():
    source = inspect.getsource(the_whole_way).splitlines()[1:-1]  # without its head and its return
    assert len(source) <= 12


def test_by_default_every_layer_is_in_the_table():
    table = find_structures(STRANGERS["ViT"].fresh())
    text = str(table)
    assert "encoder/layers/0/attn/query/kernel: dense + identity" in text
    assert "patch/kernel: the structure would have its own kernel only" in text
    assert "pos_embed: it belongs to ViT, which is no convolution or dense layer of Flax" in text
    kernels = {p for p, choice in table.items() if choice.structure is not None}
    assert kernels == set(find_branches(STRANGERS["ViT"].fresh()))
    convnext = find_structures(STRANGERS["ConvNeXt"].fresh(), "repvgg")
    assert [p for p, c in convnext.items() if c.structure] == ["block1/dwconv/kernel", "block2/dwconv/kernel"]
    assert not any(choice.undefined for choice in convnext.values())


def test_single_branches_when_they_are_asked_for():
    model = STRANGERS["ConvNeXt"].fresh()
    asked = find_branches(model, r"stem/.*|downsample/.*|head")
    assert {path: bs.names for path, bs in asked.items()} == {
        "downsample/layers/1/kernel": ("2x2",),
        "head/kernel": ("dense",),
        "stem/layers/0/kernel": ("4x4",),
    }
    search = to_search(model, r"stem/.*|block1/dwconv", rngs=nnx.Rngs(0))
    assert [p for p, m in named_modules(search) if isinstance(m, Merged)] == [
        "block1/dwconv",
        "stem/layers/0",
    ]


@pytest.mark.parametrize("side", [15, 16])
@pytest.mark.parametrize("structure", ["repvgg", "acnet", "dbb", "mobileone"])
def test_strided_layers_padded_by_name(structure, side, x64):
    """Branches run one by one sample what the merged kernel does, on even and odd sides."""
    model = nnx.Sequential(
        nnx.Conv(3, 4, (3, 3), strides=2, param_dtype=jnp.float64, rngs=nnx.Rngs(0)),
        nnx.Conv(4, 4, (5, 5), strides=3, param_dtype=jnp.float64, rngs=nnx.Rngs(1)),
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, side, side, 3)))
    branched = randomised(to_structure(model, structure, trained=False, rngs=nnx.Rngs(0)))
    branched.eval()
    deployed = fuse(branched)
    assert [layer.padding for layer in deployed.layers] == ["SAME", "SAME"]
    assert deployed(x).shape == model(x).shape
    assert output_difference(branched, deployed, x).max_rel <= tolerances.STRANGERS
    # Negative control: the pads that PyTorch has, in place of those that "SAME" has on this input.
    for layer in deployed.layers:
        layer.padding = ((layer.kernel_size[0] // 2,) * 2,) * 2
    wrong = output_difference(branched, deployed, x[:, :16, :16]).max_rel if side == 16 else 1.0
    assert wrong > 1e-2


def test_transposed_convolutions_take_in_their_norms(x64):
    model = randomised(STRANGERS["U-Net"].fresh(jnp.float64))
    model.eval()
    x = STRANGERS["U-Net"].batches(1)[0]["x"]
    deployed = fuse(model, example=(x,))
    assert isinstance(deployed.up, nnx.ConvTranspose)
    assert not [m for _, m in named_modules(deployed) if isinstance(m, nnx.BatchNorm)]
    assert output_difference(model, deployed, x).max_rel <= tolerances.STRANGERS


class Turned(nnx.Module):
    """Transposed convolutions at stride 1, which are convolutions, between a strided one and a classifier."""

    def __init__(self, *, rngs):
        def norm():
            return nnx.BatchNorm(4, use_fast_variance=False, rngs=rngs)

        layer = functools.partial(nnx.ConvTranspose, 4, 4, rngs=rngs)
        self.up = nnx.ConvTranspose(3, 4, (3, 3), strides=(2, 2), rngs=rngs)
        self.same, self.valid = layer((3, 3)), layer((3, 3), padding="VALID")
        self.even, self.pairs = layer((4, 3)), layer((3, 3), padding=((2, 1), (0, 1)), use_bias=False)
        self.apart, self.round = layer((3, 3), kernel_dilation=2), layer((3, 3), padding="CIRCULAR")
        self.fc = nnx.Linear(4, 2, rngs=rngs)
        self.norms = nnx.List([norm() for _ in range(7)])

    def __call__(self, x):
        layers = (self.up, self.same, self.valid, self.even, self.pairs, self.apart, self.round)
        for layer, norm in zip(layers, self.norms, strict=True):
            x = nnx.relu(norm(layer(x)))
        return self.fc(x.mean((1, 2)))


TURNED = Stranger(Turned, (3, 4, 3), ("same", "valid", "pairs", "apart", "round"))


def test_transposed_convolutions_at_stride_1_are_convolutions(x64):
    batches = TURNED.batches()
    example = (batches[0]["x"],)
    model = TURNED.fresh(jnp.float64)
    assert [path.removesuffix("/kernel") for path in find_branches(model)] == sorted(TURNED.taken)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    found = find_branches(lambda params, x: nnx.merge(graph, params, rest, copy=True)(x), params, *example)
    assert found == find_branches(model)
    _, scales, check, branched, deployed = the_whole_way(
        lambda: TURNED.fresh(jnp.float64), batches, "repvgg", example
    )
    assert scales.branch_sets == find_branches(model)
    assert check.max_difference <= tolerances.STRANGERS
    assert check.movement > 1e-5
    assert not [m for _, m in named_modules(deployed) if isinstance(m, nnx.BatchNorm)]
    for name in TURNED.taken:
        assert isinstance(getattr(deployed, name), nnx.Conv)
    assert isinstance(deployed.up, nnx.ConvTranspose)
    branched.eval()
    assert output_difference(branched, deployed, *example).max_rel <= tolerances.STRANGERS
    # Negative control: a network with other statistics is another function.
    assert output_difference(randomised(branched, 1), deployed, *example).max_rel > 1e-3


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("padding", ["SAME", "VALID", 1, "CIRCULAR"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_the_geometry_of_a_transposed_convolution(size, padding, dilation, x64):
    layer = nnx.ConvTranspose(
        2, 3, (size,), padding=padding, kernel_dilation=dilation, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    x = np.random.default_rng(0).normal(size=(2, 11, 2))
    if padding == "CIRCULAR" and size % 2 == 0 and dilation == 1:
        with pytest.raises(ValueError, match="of an even window shifts it the other way"):
            geometry_of(layer)
        return
    y = convolve(x, layer.kernel[...], geometry_of(layer)) + layer.bias[...].reshape(1, 1, -1)
    np.testing.assert_allclose(y, layer(x), rtol=0, atol=1e-13)
    plain = plain_layer(geometry_of(layer), layer.kernel[...], layer.bias[...])
    np.testing.assert_allclose(plain(x), layer(x), rtol=0, atol=1e-13)


def test_transposed_convolutions_that_are_none():
    options = (
        ({"strides": 2}, "some taps of the kernel only, so that a 1x1 branch in the centre would reach some"),
        ({"transpose_kernel": True}, "outputs on another axis and its taps reversed"),
        ({"mask": jnp.ones((3, 2, 3))}, "an nnx.ConvTranspose with `mask` can be neither"),
        ({"padding": "CAUSAL"}, "padding 'CAUSAL' is none that nnx.ConvTranspose can run"),
    )
    for given, reason in options:
        model = nnx.Sequential(nnx.ConvTranspose(2, 3, (3,), **given, rngs=nnx.Rngs(0)))
        with pytest.raises(ValueError, match=reason):
            find_branches(model)
        assert reason in find_structures(model)["layers/0/kernel"].reason


class Shared(nnx.Module):
    """What names do not tell: norms of one's own order, an output that is read twice, a norm used twice."""

    def __init__(self, *, rngs):
        self.a, self.b, self.c, self.d = (nnx.Conv(4, 4, (3, 3), rngs=rngs) for _ in range(4))
        self.norms = nnx.List([nnx.BatchNorm(4, use_fast_variance=False, rngs=rngs) for _ in range(3)])

    def __call__(self, x):
        first, twice, both = self.norms
        x = nnx.relu(first(self.a(x)))
        y = self.b(x)
        x = twice(y) + y
        return both(self.c(x)) + both(self.d(x))


def test_norms_are_found_by_the_flow_of_data(x64):
    model = randomised(nnx.eval_shape(lambda: Shared(rngs=nnx.Rngs(0))))
    model.eval()
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 4))
    deployed = fuse(model, example=(jax.ShapeDtypeStruct(x.shape, x.dtype),))
    assert [path for path, m in named_modules(deployed) if isinstance(m, nnx.BatchNorm)] == [
        "norms/1",
        "norms/2",
    ]
    assert output_difference(model, deployed, x).max_rel <= tolerances.STRANGERS
    with pytest.raises(TypeError, match="give an `example` of the inputs"):
        fuse(model)
    with pytest.raises(TypeError, match="`example` is a ndarray: it must be a tuple"):
        fuse(model, example=x)


def test_abstract_models():
    """Only shapes go in, and only shapes come out."""
    concrete = STRANGERS["ViT"].fresh()
    model = nnx.eval_shape(lambda: STRANGERS["ViT"].build(rngs=nnx.Rngs(0)))

    def shapes(one):
        return jax.tree.map(lambda v: (v.shape, str(v.dtype)), nnx.state(one, nnx.Param))

    scales = extract_scales(to_search(concrete, rngs=nnx.Rngs(0)))
    search = to_search(model, rngs=nnx.Rngs(0))
    assert shapes(search) == shapes(to_search(concrete, rngs=nnx.Rngs(0)))
    assert all(
        isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(search, nnx.Param))
    )
    assert shapes(reinitialize(model, scales, rngs=nnx.Rngs(0))) == shapes(model)
    vgg = nnx.eval_shape(lambda: STRANGERS["VGG-19"].build(rngs=nnx.Rngs(0)))
    branched = to_structure(vgg, "repvgg", rngs=nnx.Rngs(0))
    assert shapes(branched) == shapes(to_structure(STRANGERS["VGG-19"].fresh(), "repvgg", rngs=nnx.Rngs(0)))


def test_output_difference_of_any_callables():
    x = np.ones((3, 2), np.float32)
    found = output_difference(lambda x, k: k * x, lambda x, k: k * x + 1e-3, x, batch_size=2, k=2.0)
    assert found.max_abs == pytest.approx(1e-3, rel=1e-3)
    assert found.count == 3


class Adapted(nnx.Module):
    """Attention's projections as an einsum, and a dense layer with an adapter."""

    def __init__(self, *, rngs):
        self.split = nnx.Einsum("...i,ihd->...hd", (6, 3, 2), (3, 2), rngs=rngs)
        self.join = nnx.LinearGeneral((3, 2), 6, axis=(-2, -1), rngs=rngs)
        self.odd = nnx.LinearGeneral((3, 6), 6, axis=(1, 2), rngs=rngs)
        self.lora = nnx.LoRA(6, 2, 6, base_module=nnx.Linear(6, 6, rngs=rngs), rngs=rngs)

    def __call__(self, x):
        return self.lora(self.join(nnx.tanh(self.split(x)))).mean(1)


def test_dense_layers_of_several_axes():
    model = Adapted(rngs=nnx.Rngs(0))
    table = {path: choice.reason for path, choice in find_structures(model).items()}
    assert table["split/kernel"] == table["join/kernel"] == ""
    assert "other axes of its input than the last" in table["odd/kernel"]
    assert "lora (LoRA) keeps its kernel" in table["lora/base_module/kernel"]
    sets = find_branches(model)
    assert {path: bs.layout for path, bs in sets.items()} == {"join/kernel": "iio", "split/kernel": "ioo"}
    search = to_search(model, scales="ones", trained=False, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    deployed = fuse(search)
    assert isinstance(deployed.split, nnx.LinearGeneral)
    assert output_difference(search, deployed, x).max_rel < 1e-6
    assert search.split(x[:0]).shape == (0, 5, 3, 2)
    assert find_branches(deployed) == sets
    with pytest.raises(ValueError, match=r"odd \(LinearGeneral\): it takes other axes"):
        find_branches(model, "odd")
    with pytest.raises(ValueError, match=r"no batch norms|several axes"):
        to_structure(model, "repvgg", "split", trained=False, rngs=nnx.Rngs(0))
