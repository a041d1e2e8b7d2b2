"""RepVGG's penalty: the formula of the published code in PyTorch, its gradient, and what the trainer does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from flax import nnx
from networks import abstract, randomised
from training import tiny_config

from repopt_jax import Kernel, to_repvgg, to_structure, train, weight_decay_mask
from repopt_jax.core import paths
from repopt_jax.surgery import custom_l2
from repopt_jax.train import build
from repopt_jax.train.state import make_mesh, put_batch

pytestmark = pytest.mark.once


def network(size=3, *, stride=1, groups=1, inputs=4):
    conv = functools.partial(nnx.Conv, padding=size // 2, feature_group_count=groups, use_bias=False)
    return abstract(
        lambda rngs: to_repvgg(
            nnx.Sequential(conv(inputs, 4, (size, size), strides=stride, rngs=rngs)), rngs=rngs
        )
    )


def by_hand(torch, state, size):
    """The penalty of one block, from its definition."""
    norms = ("rbr_dense.bn", "rbr_1x1.bn")
    t = [
        (state[f"{n}.weight"] / (state[f"{n}.running_var"] + 1e-5).sqrt()).detach().view(-1, 1, 1)
        for n in norms
    ]
    dense, point = state["rbr_dense.conv.weight"], state["rbr_1x1.conv.weight"]
    total = 0.0
    for i in range(size):
        for j in range(size):
            if (i, j) == (size // 2, size // 2):
                centre = dense[:, :, i : i + 1, j] * t[0] + point[..., 0] * t[1]
                total = total + (centre**2 / (t[0] ** 2 + t[1] ** 2)).sum()
            else:
                total = total + (dense[:, :, i, j] ** 2).sum()
    return total


@pytest.mark.parametrize(
    ("size", "options"),
    [
        pytest.param(3, {}, marks=pytest.mark.long),
        (5, {"groups": 2}),
        (3, {"stride": 2, "inputs": 8}),
        pytest.param(7, {"groups": 4}, marks=pytest.mark.long),
    ],
)
def test_the_formula_and_its_gradient(size, options, x64):
    torch = pytest.importorskip("torch")
    from repopt_jax.interop import block_scheme, to_torch

    model = randomised(network(size, **options))
    scheme = block_scheme("repvgg", {"layers/(0)": "block"})
    arrays = {key.removeprefix("block."): value for key, value in to_torch(model, scheme).items()}
    state = {
        key: torch.from_numpy(np.array(v)).requires_grad_(v.dtype != np.int64 and "running" not in key)
        for key, v in arrays.items()
    }
    expected = by_hand(torch, state, size)
    expected.backward()
    value, gradient = nnx.value_and_grad(custom_l2)(model)
    assert float(value) == pytest.approx(float(expected.detach()), rel=tolerances.CUSTOM_L2)
    nnx.update(model, gradient)
    found = to_torch(model, scheme)
    for key in ("rbr_dense.conv.weight", "rbr_1x1.conv.weight"):
        np.testing.assert_allclose(found[f"block.{key}"], state[key].grad.numpy(), rtol=0, atol=1e-12)
    # Neither the norms nor the identity have a gradient.
    assert not any(
        np.any(np.asarray(v[...])) for layer in gradient.layers[0].norms.values() for v in layer.values()
    )


def test_the_identity_does_not_count_and_a_channel_of_zero_scales_is_finite(x64):
    model = randomised(network())
    value = float(custom_l2(model))
    model.layers[0].norms["identity"].scale[...] *= 3
    assert float(custom_l2(model)) == value
    for name in ("3x3", "1x1"):
        model.layers[0].norms[name].scale[...] = jnp.zeros(4)
    value, gradient = nnx.value_and_grad(custom_l2)(model)
    outer = np.asarray(model.layers[0].weights["3x3"][...]).copy()
    outer[1, 1] = 0
    assert float(value) == pytest.approx((outer**2).sum())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_where_t_is_equal_it_is_half_of_the_sum_of_the_centres(x64):
    """Of a fresh network: (K_c + P)^2 / 2; and the plain sum of squares of a layer without a smaller 1x1."""
    model = to_repvgg(
        nnx.Sequential(nnx.Conv(4, 4, (3, 3), use_bias=False, rngs=nnx.Rngs(0))),
        trained=False,
        rngs=nnx.Rngs(1),
    )
    kernel, point = (np.asarray(model.layers[0].weights[name][...]) for name in ("3x3", "1x1"))
    expected = (kernel**2).sum() - (kernel[1, 1] ** 2).sum() + ((kernel[1, 1] + point[0, 0]) ** 2).sum() / 2
    assert float(custom_l2(model)) == pytest.approx(expected, rel=1e-6)
    single = to_repvgg(
        nnx.Sequential(nnx.Conv(4, 4, (1, 1), use_bias=False, rngs=nnx.Rngs(0))),
        trained=False,
        rngs=nnx.Rngs(1),
    )
    expected = (np.asarray(single.layers[0].weights["1x1"][...]) ** 2).sum()
    assert float(custom_l2(single)) == pytest.approx(expected, rel=1e-6)


def test_only_of_repvgg_layers():
    plain = nnx.Sequential(nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="`model` has no RepVGG layer"):
        custom_l2(to_structure(plain, "acnet", rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="`model` has no RepVGG layer"):
        custom_l2(to_repvgg(plain, branches=[Kernel((3, 3)), Kernel((1, 3))], rngs=nnx.Rngs(0)))


def test_its_layers_are_not_decayed_but_the_identity_and_all_others_are():
    def decayed(custom_l2):
        model = nnx.Sequential(
            nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0)),
            nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0)),
            nnx.Linear(4, 2, rngs=nnx.Rngs(0)),
        )
        model = to_structure(model, {"layers/0": "repvgg", "layers/1": "acnet"}, rngs=nnx.Rngs(0))
        params = nnx.state(model, nnx.Param)
        mask = weight_decay_mask(model, custom_l2=custom_l2)(params)
        return {path for path, value in paths.named_leaves(mask)[0].items() if value}

    kernels = {"layers/0/weights/3x3", "layers/0/weights/1x1"}
    others = {"layers/0/norms/identity/scale", "layers/2/kernel"} | {
        f"layers/1/weights/{name}" for name in ("3x3", "3x1", "1x3")
    }
    assert decayed(False) == kernels | others
    assert decayed(True) == others


def test_the_mask_is_for_the_parameters_of_its_model():
    model = nnx.Sequential(nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    with pytest.raises(
        ValueError,
        match=r"^layers/1/mean, layers/1/var are no parameters of the model .*\(model, nnx\.Param\)",
    ):
        weight_decay_mask(model)(nnx.state(model))


def one_step(digits, **changes):
    config = tiny_config(
        "repvgg",
        digits,
        epochs=1,
        batch_size=24,
        checkpoint_every=0,
        optim__warmup_epochs=0.0,
        optim__weight_decay=0.5,
        **changes,
    )
    train.validate(config)
    feed, mesh = build.open_feed(config), make_mesh()
    program, state = build.build_program(config, feed, mesh)
    before = jax.device_get(state.params)
    state, means = program.train_step(state, put_batch(next(iter(feed.train)), mesh))
    return before, jax.device_get(state.params), jax.device_get(state.non_trainable), float(means["loss"])


def test_the_trainer_has_it_in_place_of_the_decay(digits):
    before, plain, statistics, loss = one_step(digits)
    same, custom, _, penalised = one_step(digits, optim__custom_l2=True)
    # Both start alike; one step of Nesterov momentum from rest moves by rate * (1 + momentum) * gradient.
    layer = paths.at(before, "stages")[1][1]["conv"]
    kernel, point = layer["weights"]["3x3"], layer["weights"]["1x1"]
    t = [
        layer["norms"][name]["scale"]
        / np.sqrt(paths.at(statistics, "stages")[1][1]["conv"]["norms"][name]["var"] + 1e-5)
        for name in ("3x3", "1x1")
    ]
    merged = (kernel[1, 1] * t[0] + point[0, 0] * t[1]) / (t[0] ** 2 + t[1] ** 2)
    expected = {"3x3": np.zeros_like(kernel), "1x1": 0.5 * (merged * t[1] - point)}
    expected["3x3"][1, 1] = 0.5 * (merged * t[0] - kernel[1, 1])
    for name, value in expected.items():
        moved = paths.at(custom, "stages")[1][1]["conv"]["weights"][name]
        moved = moved - paths.at(plain, "stages")[1][1]["conv"]["weights"][name]
        np.testing.assert_allclose(moved, -0.05 * 1.9 * value, rtol=0, atol=1e-6)
        assert np.abs(0.05 * 1.9 * expected["1x1"]).max() > 1e-3
    # The others are decayed as before; the loss in the log has the penalty.
    np.testing.assert_allclose(custom["head"]["kernel"], plain["head"]["kernel"], rtol=0, atol=1e-7)
    assert penalised > loss + 0.01
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before, same))


@pytest.mark.parametrize(
    ("mode", "optim", "message"),
    [
        ("dbb", {}, "`optim.custom_l2`=True does nothing with `model.mode`='dbb', only with 'repvgg'"),
        (
            "repvgg",
            {"name": "adamw", "nesterov": True},
            "does nothing with `optim.name`='adamw', only with 'sgd'",
        ),
    ],
)
def test_it_is_refused_where_it_means_nothing(mode, optim, message):
    config = train.Config(
        model=train.ModelConfig(mode=mode), optim=train.OptimConfig(custom_l2=True, **optim)
    )
    with pytest.raises(ValueError) as error:
        train.validate(config)
    assert message in str(error.value)
