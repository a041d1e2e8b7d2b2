"""The optimizer chain against the same update written out by hand; decay rules; the schedule's numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from training import VGG_VARIANTS

from repopt_jax import paths
from repopt_jax.models import RepOptVGG
from repopt_jax.scales import Scales
from repopt_jax.train import OptimConfig
from repopt_jax.train.optimizer import decay_mask, make_optimizer, make_schedule


def abstract_model(kind="target", **options):
    """The tiny network without numbers; its scales, which need none, are concrete."""
    return nnx.eval_shape(
        lambda: RepOptVGG(VGG_VARIANTS["tiny"], kind=kind, num_classes=3, rngs=nnx.Rngs(0), **options)
    )


@pytest.mark.parametrize("kind", ["target", "search", "csla", "repvgg"])
@pytest.mark.parametrize("post_se", [False, True])
def test_decay_rules_cover_every_parameter(kind, post_se):
    params = nnx.to_pure_dict(nnx.state(abstract_model(kind, post_se=post_se), nnx.Param))
    decayed, _ = paths.named_leaves(decay_mask(params))
    for name, value in decayed.items():
        owner, leaf = name.split("/")[-2:]
        # The published rule: vectors are not decayed, save those that stand for an identity kernel.
        identity = (owner, leaf) in (("weights", "identity"), ("bn_identity", "scale"))
        assert value == (leaf == "kernel" or (owner == "weights" and leaf != "identity") or identity), name


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="stages/0/gate"):
        decay_mask({"stages": {0: {"gate": jnp.ones(3)}}})


def test_decay_keeps_the_structure_and_one_false_value_apart():
    mask = decay_mask({"conv": {"kernel": 1.0}, "bn": {"scale": 1.0, "bias": 1.0}})
    assert mask == {"conv": {"kernel": True}, "bn": {"scale": False, "bias": False}}


def by_hand(params, grads, multiplier, rates, *, momentum, decay):
    """Nesterov SGD: multiplier on the gradient, then decay (of the kernel only), then momentum."""
    kernel, bias = params
    v_kernel, v_bias = np.zeros_like(kernel), np.zeros_like(bias)
    for (g_kernel, g_bias), rate in zip(grads, rates):
        g_kernel = multiplier * g_kernel + decay * kernel
        v_kernel = momentum * v_kernel + g_kernel
        v_bias = momentum * v_bias + g_bias
        kernel = kernel - rate * (g_kernel + momentum * v_kernel)
        bias = bias - rate * (g_bias + momentum * v_bias)
    return kernel, bias


@pytest.mark.parametrize("scaled", [False, True])
def test_chain_equals_the_update_written_out(x64, scaled):
    rng = np.random.default_rng(0)
    path = "stages/1/1/conv/kernel"
    scales = Scales({path: abstract_model().depth_scales().entries[path]}) if scaled else None
    kernel, bias = rng.normal(size=(3, 3, 4, 4)), rng.normal(size=4)
    params = {"stages": {1: {1: {"conv": {"kernel": jnp.array(kernel)}, "bn": {"bias": jnp.array(bias)}}}}}
    # 3x3, 1x1 and identity with scale sqrt(2 / 1): 2 everywhere, 2 more at the centre, 1 more on its
    # diagonal.
    multiplier = np.ones((3, 3, 4, 4))
    if scaled:
        multiplier *= 2.0
        multiplier[1, 1] += 2.0 + np.eye(4)

    optim = OptimConfig(learning_rate=0.1, weight_decay=0.01, warmup_epochs=1)
    schedule = make_schedule(optim, epochs=3, steps_per_epoch=4)
    tx = make_optimizer(optim, schedule, scales=scales)
    state, grads = tx.init(params), []
    for _ in range(10):
        grads.append((rng.normal(size=kernel.shape), rng.normal(size=4)))
        tree = jax.tree.unflatten(
            jax.tree.structure(params), [jnp.array(grads[-1][1]), jnp.array(grads[-1][0])]
        )
        updates, state = tx.update(tree, state, params)
        params = jax.tree.map(jnp.add, params, updates)

    rates = [float(schedule(t)) for t in range(10)]
    expected = by_hand((kernel, bias), grads, multiplier, rates, momentum=0.9, decay=0.01)
    found = params["stages"][1][1]
    # Scales and learning rates are float32, everything else here is float64; measured below 2e-8.
    np.testing.assert_allclose(found["conv"]["kernel"], expected[0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found["bn"]["bias"], expected[1], rtol=1e-6, atol=1e-7)


def test_clipping_bounds_the_gradient_and_is_refused_with_scales():
    params = {"kernel": jnp.zeros(4)}
    optim = OptimConfig(learning_rate=1.0, momentum=0.0, nesterov=False, weight_decay=0.0, clip_norm=0.5)
    tx = make_optimizer(optim, lambda step: 1.0)
    updates, _ = tx.update({"kernel": jnp.full(4, 10.0)}, tx.init(params), params)
    np.testing.assert_allclose(np.linalg.norm(updates["kernel"]), 0.5, rtol=1e-6)
    scales = abstract_model().depth_scales()
    with pytest.raises(ValueError, match=r"`clip_norm`=0.5 cannot be used with `scales`"):
        make_optimizer(optim, lambda step: 1.0, scales=scales)


@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_schedule_values(warmup):
    steps_per_epoch, epochs, peak = 10, 3, 0.2
    optim = OptimConfig(learning_rate=peak, warmup_epochs=warmup / steps_per_epoch)
    schedule = make_schedule(optim, epochs=epochs, steps_per_epoch=steps_per_epoch)
    total = epochs * steps_per_epoch
    for step in range(total + 1):
        if step < warmup:
            expected = peak * (step + 1) / warmup
        else:
            expected = peak / 2 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        assert float(schedule(step)) == pytest.approx(expected, abs=1e-7), step
    assert float(schedule(warmup)) == pytest.approx(peak)
    assert float(schedule(total)) == pytest.approx(0, abs=1e-8)
