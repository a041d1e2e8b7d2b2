"""The same outputs as PyTorch, from every form of every network, and its state dict back to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from flax import nnx

from repopt_jax import fuse
from repopt_jax import nn as our_nn
from repopt_jax.interop.names import recognise
from repopt_jax.interop.torch_forward import torch_logits
from repopt_jax.interop.weights import from_torch, to_torch
from repopt_jax.surgery.modules import named_modules

torch = pytest.importorskip("torch")

import torch_networks as reference  # noqa: E402
from torch_forms import FORMS, abstract, arrays, compiled, images, relative, run_ours, run_torch, tensors  # noqa: E402


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
# gate.
@pytest.mark.parametrize(
    "name", ["repopt search", "repvgg se", "timm mobileone", "mobileone deployed", "repghost", "repmlp"]
)
def test_logits_float32(name):
    same_numbers(FORMS[name], "float32", tolerances.LOGITS_FLOAT32)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
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
