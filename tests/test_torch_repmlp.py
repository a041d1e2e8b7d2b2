"""RepMLPNet against PyTorch: training mode, gradients, the published order of the tiles, converted files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from flax import nnx

from repopt_jax import models
from repopt_jax.core.paths import named_leaves
from repopt_jax.interop import convert, load_converted
from repopt_jax.interop.names import torch_names
from repopt_jax.interop.weights import from_torch
from repopt_jax.models import registry

torch = pytest.importorskip("torch")

import torch_networks as reference  # noqa: E402
from torch_forms import (  # noqa: E402
    FORMS,
    MLP,
    abstract,
    arrays,
    compiled,
    images,
    mlp_form,
    relative,
    run_ours,
    run_torch,
)

# The published order, there and here.
SCRAMBLED = mlp_form("repmlp", "train", published_order=True)


def pair(form):
    """The network in PyTorch, ours with its numbers, and images with several tiles a map."""
    network = reference.randomise(form.network().double())
    return network, from_torch(arrays(network), abstract(form, "float64")), images("float64", size=form.size)


@pytest.mark.parametrize(
    "form",
    [FORMS["repmlp"], FORMS["repmlp plain"], pytest.param(SCRAMBLED, marks=pytest.mark.long)],
    ids=["branches", "plain", "published order"],
)
def test_logits_and_every_gradient_in_training_mode(form, x64):
    """With statistics of the batch, those of all tiles of all images."""
    network, model, x = pair(form)
    weights = np.random.default_rng(2).normal(size=(len(x), 5))
    network.train()
    of_torch = torch.from_numpy(x.transpose(0, 3, 1, 2)).requires_grad_()
    logits = network(of_torch)
    (torch.sin(logits) * torch.from_numpy(weights)).sum().backward()

    model.train()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @compiled
    def ours(params, rest, x):
        def loss(params, x):
            y = nnx.merge(graph, params, rest, copy=True)(x)
            return jnp.sum(jnp.sin(y) * weights), y

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    (gradients, of_x), y = ours(params, rest, jnp.asarray(x))
    assert relative(np.asarray(y), logits.detach().numpy()) <= tolerances.LOGITS_FLOAT64
    theirs = of_torch.grad.numpy().transpose(0, 2, 3, 1)
    assert relative(np.asarray(of_x), theirs) <= tolerances.LOGITS_FLOAT64
    names = torch_names(model, "repmlp")
    found = {names[path].key: names[path].to_torch(g) for path, g in named_leaves(gradients)[0].items()}
    expected = {key: p.grad.numpy() for key, p in network.named_parameters()}
    assert set(found) == set(expected)
    # Relative to the largest of all: a convolution's shift has no gradient before a batch norm.
    largest = max(np.abs(g).max() for g in expected.values())
    for key, g in expected.items():
        assert np.abs(found[key] - g).max() <= tolerances.LOGITS_FLOAT64 * largest, key


def test_the_published_order_is_that_of_the_published_code(x64):
    network, model, x = pair(SCRAMBLED)
    theirs = run_torch(network, x)
    assert relative(run_ours(model, x), theirs) <= tolerances.LOGITS_FLOAT64
    # Negative control: our order is another one, though both know the same arrays.
    ours = from_torch(arrays(network), abstract(FORMS["repmlp"], "float64"))
    assert relative(run_ours(ours, x), theirs) > tolerances.LOGITS_WRONG


@pytest.mark.parametrize("name", ["repmlp", pytest.param("repmlp deployed", marks=pytest.mark.long)])
def test_a_file_is_converted_there_and_back(name, tmp_path, monkeypatch):
    """By the command's own function, whose check takes images of the network's own size."""
    entry = models.Entry("repmlpnet-tiny", models.RepMLPNet, MLP, "repmlp")
    monkeypatch.setitem(registry.NETWORKS, entry.name, entry)
    network = reference.randomise(FORMS[name].network())
    torch.save({"state_dict": network.state_dict()}, tmp_path / "theirs.pth")
    checked = convert.convert_file(tmp_path / "theirs.pth", tmp_path / "ours", "repmlpnet-tiny")
    assert checked.size == MLP.image_size
    assert "images of 24 x 24" in checked.lines[1]
    model = load_converted(tmp_path / "ours")
    convert.export_weights(tmp_path / "back.pth", model)
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    for key, value in network.state_dict().items():
        assert torch.equal(back[key], value), key
