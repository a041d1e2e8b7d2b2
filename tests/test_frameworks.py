"""`optax.chain(repopt_mask(scales), optax.sgd(...))` on the parameters of every framework: one network, one
result.

The network is a 3x3 convolution, a non-linearity and a mean; its kernel moves by the same numbers whoever
holds it.
"""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from repopt_jax import Scales, default_branches, gradient_multipliers, reinitialize, repopt_mask, surgery
from repopt_jax.nn.csla import convolve

STEPS = 5
CLOSE = 1e-5  # relative, float32, 5 steps through different convolution layouts; measured: 4e-7
PADS = ((1, 1), (1, 1))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 6, 6, 4)).astype(np.float32), rng.normal(size=(8, 4)).astype(np.float32)
    kernel = (0.2 * rng.normal(size=(3, 3, 4, 4))).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(y), jnp.asarray(kernel)


def scales_at(path, layout="...io"):
    kernel = (3, 3, 4, 4) if layout == "...io" else (4, 4, 3, 3)
    scales = Scales.ones({path: default_branches(kernel, layout=layout)})
    rng = np.random.default_rng(1)
    return Scales(
        {
            path: type(entry)(
                entry.branches,
                {n: jnp.asarray(rng.normal(size=4), jnp.float32) for n in entry.branches.names},
            )
            for path, entry in scales.entries.items()
        }
    )


def optimizer(scales):
    return optax.chain(repopt_mask(scales), optax.sgd(0.1, 0.9, nesterov=True))


def head_loss(z, y):
    return jnp.mean((jnp.tanh(z).mean((1, 2)) - y) ** 2)


@pytest.fixture(scope="module")
def expected(data):
    """Plain dicts, a loop of one's own."""
    x, y, kernel = data
    params = {"conv": {"kernel": kernel, "bias": jnp.zeros(4)}}
    tx = optimizer(scales_at("conv/kernel"))

    def loss(params):
        z = convolve(x, params["conv"]["kernel"], strides=(1, 1), padding=PADS, dilation=(1, 1), groups=1)
        return head_loss(z + params["conv"]["bias"].reshape(1, 1, 1, 4), y)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    moved = np.abs(params["conv"]["kernel"] - kernel).max()
    assert moved > 1e-3
    return np.asarray(params["conv"]["kernel"])


class Net(nnx.Module):
    def __init__(self, kernel):
        self.conv = nnx.Conv(4, 4, (3, 3), padding=PADS, rngs=nnx.Rngs(0))
        self.conv.kernel[...] = kernel

    def __call__(self, x):
        return self.conv(x)


def test_nnx_optimizer(data, expected):
    """`nnx.Optimizer` shows `init` variables and `update` bare arrays."""
    x, y, kernel = data
    model = Net(kernel)
    opt = nnx.Optimizer(model, optimizer(scales_at("conv/kernel")), wrt=nnx.Param)

    @nnx.jit
    def step(model, opt):
        grads = nnx.grad(lambda model: head_loss(model(x), y))(model)
        opt.update(model, grads)

    for _ in range(STEPS):
        step(model, opt)
    np.testing.assert_allclose(model.conv.kernel[...], expected, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("pure", [False, True])
def test_nnx_state(data, expected, pure):
    """Functional NNX: an `nnx.State`, or its pure dict, as the parameters of an Optax loop."""
    x, y, kernel = data
    graph, params, rest = nnx.split(Net(kernel), nnx.Param, ...)
    params = nnx.to_pure_dict(params) if pure else params
    tx = optimizer(scales_at("conv/kernel"))

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: head_loss(nnx.merge(graph, p, rest, copy=True)(x), y))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    np.testing.assert_allclose(
        nnx.merge(graph, params, rest, copy=True).conv.kernel[...], expected, rtol=CLOSE, atol=CLOSE
    )


def test_linen(data, expected):
    x, y, kernel = data

    class LinenNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(4, (3, 3), padding=PADS)(x)

    model = LinenNet()
    params = model.init(jax.random.key(0), x)["params"]
    params = params | {"Conv_0": params["Conv_0"] | {"kernel": kernel}}
    tx = optimizer(scales_at("Conv_0/kernel"))

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: head_loss(model.apply({"params": p}, x), y))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    np.testing.assert_allclose(params["Conv_0"]["kernel"], expected, rtol=CLOSE, atol=CLOSE)


def test_equinox(data, expected):
    """Equinox kernels are (out, in/groups, *spatial): the branch set says so."""
    x, y, kernel = data
    conv = eqx.nn.Conv2d(4, 4, 3, padding=1, key=jax.random.key(0))
    conv = eqx.tree_at(
        lambda c: (c.weight, c.bias), conv, (jnp.moveaxis(kernel, (-1, -2), (0, 1)), jnp.zeros((4, 1, 1)))
    )
    model = {"conv": conv, "activation": jnp.tanh}
    tx = optimizer(scales_at("conv/weight", "oi..."))

    @eqx.filter_value_and_grad
    def loss(model):
        z = jax.vmap(model["conv"])(jnp.moveaxis(x, -1, 1))
        return head_loss(jnp.moveaxis(z, 1, -1), y)

    @eqx.filter_jit
    def step(model, state):
        _, grads = loss(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state

    state = tx.init(eqx.filter(model, eqx.is_array))
    for _ in range(STEPS):
        model, state = step(model, state)
    found = jnp.moveaxis(model["conv"].weight, (0, 1), (-1, -2))
    np.testing.assert_allclose(found, expected, rtol=CLOSE, atol=CLOSE)


def test_reinitialize_and_multipliers_on_plain_and_equinox_trees(data):
    _, _, kernel = data
    plain = {"conv": {"kernel": kernel, "bias": jnp.zeros(4)}}
    scales = scales_at("conv/kernel")
    fresh = reinitialize(plain, scales, rngs=nnx.Rngs(0))
    weights = surgery.sample_weights(scales, nnx.Rngs(0).params())
    np.testing.assert_array_equal(
        fresh["conv"]["kernel"], surgery.merge_weights(scales, weights)["conv/kernel"]
    )
    np.testing.assert_array_equal(plain["conv"]["kernel"], kernel)

    conv = eqx.nn.Conv2d(4, 4, 3, padding=1, key=jax.random.key(0))
    torch_like = scales_at("weight", "oi...")
    dense = gradient_multipliers(eqx.filter(conv, eqx.is_array), torch_like)
    reference = gradient_multipliers(plain, scales)["conv"]["kernel"]
    np.testing.assert_allclose(jnp.moveaxis(dense.weight, (0, 1), (-1, -2)), reference, rtol=1e-6)
