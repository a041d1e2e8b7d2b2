"""The same outputs as PyTorch, from every form of every network, and its state dict back to the bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from flax import nnx

from repopt_jax import fuse
from repopt_jax import nn as our_nn
from repopt_jax.interop.names import BIASED, Layout, Scheme, recognise
from repopt_jax.interop.torch_forward import torch_logits
from repopt_jax.interop.weights import from_torch, to_torch
from repopt_jax.surgery.modules import named_modules

torch = pytest.importorskip("torch")

import tiers  # noqa: E402
import torch_networks as reference  # noqa: E402
from torch_forms import FORMS, abstract, arrays, compiled, images, relative, run_ours, run_torch, tensors  # noqa: E402

pytestmark = pytest.mark.once


def same_numbers(form, dtype, tolerance):
    network = reference.randomise(form.network().to(getattr(torch, dtype)))
    state, x = arrays(network), images(dtype, size=form.size)
    model = from_torch(state, abstract(form, dtype))
    theirs, ours = run_torch(network, x), run_ours(model, x)
    assert ours.dtype == dtype
    assert relative(ours, theirs) <= tolerance
    # The state dict, run without the class that it came from, gives the same.
    alone = torch_logits(state, x, scheme=form.scheme, strides=form.strides)
    assert relative(alone, theirs) <= tolerance
    # And back: every key, every bit.
    assert recognise(state).scheme.name == form.scheme
    back = to_torch(model, form.scheme)
    fresh = form.network().to(getattr(torch, dtype))
    assert fresh.load_state_dict(tensors(back), strict=True)
    assert all(np.array_equal(back[key], value) for key, value in state.items())


# One with each kind of layer: with scales, with batch norms in the branches, folded; depthwise, with either
# gate. All of them are in float64 too, and here it is the rounding that is looked at: with scales and folded.
@pytest.mark.parametrize(
    "name",
    tiers.often(
        ("repopt search", "repvgg se", "timm mobileone", "mobileone deployed", "repghost", "repmlp"),
        *("repopt search", "mobileone deployed"),
    ),
)
def test_logits_float32(name):
    same_numbers(FORMS[name], "float32", tolerances.LOGITS_FLOAT32)


# Layers and names that are those of other forms.
SELDOM = (
    *("repopt target", "repopt csla", "repopt ghost csla", "repopt ghost rep", "timm mobileone deployed"),
    "repmlp plain",
)


@pytest.mark.parametrize(
    "form", tiers.seldom([pytest.param(form, id=name) for name, form in FORMS.items()], *SELDOM)
)
def test_logits_float64(form, x64):
    same_numbers(form, "float64", tolerances.LOGITS_FLOAT64)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("repvgg", {}),
        ("mobileone", {}),
        ("repghost", {"only": (our_nn.Branched,)}),
        ("repmlp", {"only": (our_nn.Branched,)}),
    ],
)
def test_our_deployed_network_in_pytorch(name, options, x64):
    """Trained there, deployed here, run there: all in one circle."""
    trained, deployed = FORMS[name], FORMS[f"{name} deployed"]
    network = reference.randomise(trained.network().double())
    model = from_torch(arrays(network), abstract(trained, "float64"))
    plain = deployed.network().double()
    graph, state = nnx.split(model)
    fused = compiled(lambda state: nnx.state(fuse(nnx.merge(graph, state), **options)))
    model = abstract(deployed, "float64")
    nnx.update(model, fused(state))
    plain.load_state_dict(tensors(to_torch(model, deployed.scheme)), strict=True)
    x = images("float64", size=trained.size)
    assert relative(run_torch(plain.eval(), x), run_torch(network, x)) <= tolerances.LOGITS_FLOAT64


def swap_taps(kernel):
    """Height and width the wrong way round."""
    return jnp.swapaxes(kernel, 0, 1) if kernel.ndim == 4 else kernel


def swap_channels(kernel):
    """Inputs and outputs of square kernels the wrong way round."""
    square = kernel.ndim == 4 and kernel.shape[-1] == kernel.shape[-2]
    return jnp.swapaxes(kernel, -1, -2) if square else kernel


def pad_same(model):
    for _, m in named_modules(model):
        if isinstance(m, nnx.Conv):
            m.padding = "SAME"


def swap_statistics(model):
    for _, m in named_modules(model):
        if isinstance(m, nnx.BatchNorm):
            m.mean[...], m.var[...] = m.var[...], jnp.abs(m.mean[...])


def on_kernels(function):
    return lambda model: nnx.update(model, jax.tree.map(function, nnx.state(model, nnx.Param)))


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("repvgg", on_kernels(swap_taps)),
        ("repvgg", on_kernels(swap_channels)),
        ("repvgg", swap_statistics),
        ("repopt target", pad_same),
    ],
    ids=["taps", "channels", "statistics", "padding"],
)
def test_a_wrong_conversion_is_noticed(name, spoil, x64):
    form = FORMS[name]
    network = reference.randomise(form.network().double())
    model = from_torch(arrays(network), abstract(form, "float64"))
    x = images("float64")
    expected = run_torch(network, x)
    spoil(model)
    assert relative(run_ours(model, x), expected) > tolerances.LOGITS_WRONG


class Foreign(nnx.Module):
    """Layers of which all arrays are squares, so that no shape shows an order of axes."""

    def __init__(self, rngs):
        conv = functools.partial(nnx.Conv, param_dtype=jnp.float64, rngs=rngs)
        up = functools.partial(nnx.ConvTranspose, strides=(2, 2), param_dtype=jnp.float64, rngs=rngs)
        self.conv = conv(4, 4, (3, 3), padding=1)
        self.up = up(4, 4, (2, 2))
        self.back = up(4, 4, (2, 2), transpose_kernel=True)
        self.words = nnx.Embed(4, 4, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x, word):
        return self.back(self.up(self.conv(x))) + self.words(word)[None, None, None]


def test_transposed_convolutions_and_embeddings_have_their_own_order():
    layers = torch.nn.ModuleDict(
        {
            "conv": torch.nn.Conv2d(4, 4, 3, padding=1),
            "up": torch.nn.ConvTranspose2d(4, 4, 2, stride=2),
            "back": torch.nn.ConvTranspose2d(4, 4, 2, stride=2),
            "words": torch.nn.Embedding(4, 4),
        }
    ).double()
    rows = [(name, name, BIASED) for name in ("conv", "up", "back")]
    rows += [("words", "words", {"embedding": "weight"})]
    scheme = Scheme("mine", "my own code", (Layout(rows=tuple(rows)),))
    state = layers.state_dict()
    with jax.enable_x64(True):
        abstract = nnx.eval_shape(lambda: Foreign(nnx.Rngs(0)))
        model = from_torch(state, abstract, scheme)
        x = np.random.default_rng(0).normal(size=(2, 3, 3, 4))
        found = np.asarray(model(jnp.asarray(x), jnp.asarray(2)))
        back = to_torch(model, scheme)
    with torch.no_grad():
        image = torch.from_numpy(x.transpose(0, 3, 1, 2))
        wanted = layers["back"](layers["up"](layers["conv"](image))).permute(0, 2, 3, 1)
        wanted = (wanted + layers["words"](torch.tensor(2))).numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
    assert all(np.array_equal(back[key], value.numpy()) for key, value in state.items())
    # The negative control: read as an ordinary kernel, it fits as well.
    assert np.abs(state["up.weight"].numpy() - state["up.weight"].numpy().swapaxes(0, 1)).max() > 0.1


def test_pytorchs_own_tensors_are_taken():
    form = FORMS["repvgg"]
    network = reference.randomise(form.network())
    abstract_model = abstract(form, "float32")
    # As `state_dict` gives them, and trained parameters, which require gradients.
    given = {**network.state_dict(), **dict(network.named_parameters())}
    found = to_torch(from_torch(given, abstract_model), form.scheme)
    assert all(np.array_equal(found[key], value) for key, value in arrays(network).items())
    halves = {key: value.bfloat16() if value.is_floating_point() else value for key, value in given.items()}
    found = to_torch(from_torch(halves, abstract_model), form.scheme)
    assert all(
        np.array_equal(found[key], value.detach().float().numpy())
        for key, value in halves.items()
        if value.is_floating_point()
    )
