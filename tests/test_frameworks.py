"""Both halves of the method on the parameters of every framework: one network, one result.

The network is a 3x3 convolution, a non-linearity and a mean. Trained with `repopt_mask`, its kernel moves by
the same numbers whoever holds it; so do its branches and scales in a search through `search_tree`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tolerances
from flax import nnx

from repopt_jax import (
    Geometry,
    Scales,
    default_branches,
    extract_scales,
    find_parametrizations,
    gradient_multipliers,
    reinitialize,
    reparameterize,
    repopt_mask,
    search_tree,
)
from repopt_jax.core import paths
from repopt_jax.core.scales import LayerScales
from repopt_jax.nn.geometry import convolve
from repopt_jax.surgery import csla_twin
from repopt_jax.surgery.reinitialize import merge_weights, sample_weights

STEPS = 5
PADS = ((1, 1), (1, 1))
LAYER = Geometry((3, 3), 4, 4)
NAMES = ("3x3", "1x1", "identity")


class Task(NamedTuple):
    """Parameters as a framework holds them, their loss, and the path of the kernel."""

    params: Any
    loss: Callable[[Any], jax.Array]
    path: str
    layout: str = "...io"


class Data(NamedTuple):
    """Images (8, 6, 6, 4), targets (8, 4), the kernel (3, 3, 4, 4)."""

    x: jax.Array
    y: jax.Array
    kernel: jax.Array

    def loss(self, z):
        """Of (8, 6, 6, 4)."""
        return jnp.mean((jnp.tanh(z).mean((1, 2)) - self.y) ** 2)


def plain_dicts(data):
    def loss(params):
        z = convolve(data.x, params["conv"]["kernel"], LAYER)
        return data.loss(z + params["conv"]["bias"].reshape(1, 1, 1, 4))

    return Task({"conv": {"kernel": data.kernel, "bias": jnp.zeros(4)}}, loss, "conv/kernel")


class NNXNet(nnx.Module):
    def __init__(self, kernel):
        self.conv = nnx.Conv(4, 4, (3, 3), padding=PADS, rngs=nnx.Rngs(0))
        self.conv.kernel[...] = kernel

    def __call__(self, x):
        return self.conv(x)


def nnx_state(data):
    graph, params = nnx.split(NNXNet(data.kernel))
    return Task(params, lambda p: data.loss(nnx.merge(graph, p, copy=True)(data.x)), "conv/kernel")


def nnx_pure_dict(data):
    task = nnx_state(data)
    return task._replace(params=nnx.to_pure_dict(task.params))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(4, (3, 3), padding=PADS)(x)


def linen(data):
    params: Any = LinenNet().init(jax.random.key(0), data.x)["params"]
    params = params | {"Conv_0": params["Conv_0"] | {"kernel": data.kernel}}
    return Task(params, lambda p: data.loss(LinenNet().apply({"params": p}, data.x)), "Conv_0/kernel")


def equinox(data):
    """Equinox kernels are (out, in/groups, *spatial), which the branch set says; the parts that are no arrays
    stay aside."""
    conv = eqx.nn.Conv2d(4, 4, 3, padding=1, key=jax.random.key(0))
    kernel = jnp.moveaxis(data.kernel, (-1, -2), (0, 1))
    conv = eqx.tree_at(lambda c: (c.weight, c.bias), conv, (kernel, jnp.zeros((4, 1, 1))))
    params, static = eqx.partition({"conv": conv, "activation": jnp.tanh}, eqx.is_inexact_array)

    def loss(params):
        z = jax.vmap(eqx.combine(params, static)["conv"])(jnp.moveaxis(data.x, -1, 1))
        return data.loss(jnp.moveaxis(z, 1, -1))

    return Task(params, loss, "conv/weight", "oi...")


FRAMEWORKS = (plain_dicts, nnx_state, nnx_pure_dict, linen, equinox)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 6, 6, 4)), rng.normal(size=(8, 4))
    return Data(*(jnp.asarray(a, jnp.float32) for a in (x, y, 0.2 * rng.normal(size=(3, 3, 4, 4)))))


def scales_at(path, layout="...io"):
    """Scales of both signs for the kernel at `path`, the same numbers for every framework."""
    rng = np.random.default_rng(1)
    branches = default_branches((3, 3, 4, 4) if layout == "...io" else (4, 4, 3, 3), layout=layout)
    vectors = {name: jnp.asarray(rng.normal(size=4), jnp.float32) for name in NAMES}
    return Scales({path: LayerScales(branches, vectors)})


def sgd():
    return optax.sgd(0.1, 0.9, nesterov=True)


def train(params, loss, tx):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    return params


def train_nnx(model, data, tx):
    """`nnx.Optimizer`, which shows `init` variables and `update` bare arrays."""
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: data.loss(model(data.x)))(model))

    for _ in range(STEPS):
        step(model, optimizer)
    return model


def kernel_of(params, task):
    """The kernel of trained parameters, (*spatial, in, out)."""
    kernel = paths.named_leaves(params)[0][task.path]
    return kernel if task.layout == "...io" else jnp.moveaxis(kernel, (0, 1), (-1, -2))


assert_close = functools.partial(
    chex.assert_trees_all_close, rtol=tolerances.FRAMEWORKS, atol=tolerances.FRAMEWORKS
)


@pytest.fixture(scope="module")
def trained(data):
    """The kernel that `nnx.Optimizer` leaves."""
    model = train_nnx(NNXNet(data.kernel), data, optax.chain(repopt_mask(scales_at("conv/kernel")), sgd()))
    assert np.abs(model.conv.kernel[...] - data.kernel).max() > tolerances.FRAMEWORKS_APART
    return np.asarray(model.conv.kernel[...])


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda f: f.__name__)
def test_training(framework, data, trained):
    task = framework(data)
    scales = scales_at(task.path, task.layout)
    params = train(task.params, task.loss, optax.chain(repopt_mask(scales), sgd()))
    assert_close(kernel_of(params, task), trained)


def test_training_without_the_mask_is_another(data, trained):
    task = plain_dicts(data)
    kernel = kernel_of(train(task.params, task.loss, sgd()), task)
    assert np.abs(kernel - trained).max() > tolerances.FRAMEWORKS_APART


class Searched(NamedTuple):
    weights: dict[str, jax.Array]  # at the start
    scales: dict[str, jax.Array]  # at the end, as is the kernel
    kernel: jax.Array


@pytest.fixture(scope="module")
def searched(data):
    """An NNX search model, with layers of branches, trained by `nnx.Optimizer`."""
    scales = scales_at("conv/kernel")
    weights = sample_weights(scales, jax.random.key(3))
    twin = csla_twin(NNXNet(data.kernel), scales, weights, trainable_scales=True)
    twin: Any = train_nnx(twin, data, sgd())
    found = extract_scales(twin).vectors["conv/kernel"]
    start = scales.vectors["conv/kernel"]
    assert min(np.abs(found[name] - start[name]).max() for name in NAMES) > tolerances.FRAMEWORKS_APART
    return Searched(weights["conv/kernel"], found, twin.conv.merged_kernel())


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda f: f.__name__)
def test_search(framework, data, searched):
    task = framework(data)
    tree = search_tree(task.params, scales_at(task.path, task.layout), rngs=nnx.Rngs(0))
    tree = dataclasses.replace(tree, weights={task.path: searched.weights})
    tree = train(tree, lambda tree: task.loss(tree.merged()), sgd())
    found = tree.extract_scales().vectors[task.path]
    assert_close(dict(found), dict(searched.scales))
    assert_close(kernel_of(tree.merged(), task), searched.kernel)


class Structured(NamedTuple):
    theta: Any  # at the start, with the kernel that it makes
    start: jax.Array
    kernel: jax.Array  # at the end


@pytest.fixture(scope="module")
def structured(data):
    """An NNX model with OREPA's branches and scales in `nnx.Optimizer`'s state."""
    model = NNXNet(data.kernel)
    structures = find_parametrizations(model, "orepa")
    model, theta = reinitialize(model, structures, trained=False, rngs=nnx.Rngs(5), return_weights=True)
    start = jnp.array(model.conv.kernel[...])
    tx = reparameterize(sgd(), structures, weights=theta, trainable_scales=True)
    return Structured(theta["conv/kernel"], start, train_nnx(model, data, tx).conv.kernel[...])


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda f: f.__name__)
def test_a_structure_with_trainable_scales(framework, data, structured):
    task = framework(data)
    structures = find_parametrizations(task.loss, task.params, structure="orepa")
    assert list(structures) == [task.path]
    assert structures[task.path].layout == task.layout
    start = structured.start if task.layout == "...io" else jnp.moveaxis(structured.start, (-1, -2), (0, 1))
    params = paths.map_named(lambda path, x: start if path == task.path else x, task.params)
    # Without OREPA's branches the kernel goes another way.
    plain = kernel_of(train(params, task.loss, sgd()), task)
    assert np.abs(plain - structured.kernel).max() > tolerances.FRAMEWORKS_APART
    theta = {task.path: structured.theta}
    tx = reparameterize(sgd(), structures, weights=theta, trainable_scales=True)
    assert_close(kernel_of(train(params, task.loss, tx), task), structured.kernel)
    # What is drawn for a kernel of any layout makes that kernel, or the optimizer would refuse it.
    fresh, drawn = reinitialize(task.params, structures, trained=False, rngs=nnx.Rngs(0), return_weights=True)
    reparameterize(sgd(), structures, weights=drawn, trainable_scales=True).init(fresh)


def test_reinitialize_and_multipliers_on_plain_and_equinox_trees(data):
    plain = plain_dicts(data).params
    scales = scales_at("conv/kernel")
    fresh = reinitialize(plain, scales, rngs=nnx.Rngs(0))
    weights = sample_weights(scales, nnx.Rngs(0).params())
    chex.assert_trees_all_equal(fresh["conv"]["kernel"], merge_weights(scales, weights)["conv/kernel"])
    chex.assert_trees_all_equal(plain["conv"]["kernel"], data.kernel)

    torch_like = equinox(data)
    dense = gradient_multipliers(torch_like.params, scales_at(torch_like.path, torch_like.layout))
    reference = gradient_multipliers(plain, scales)["conv"]["kernel"]
    chex.assert_trees_all_close(kernel_of(dense, torch_like), reference, rtol=tolerances.FEW_OPERATIONS)
