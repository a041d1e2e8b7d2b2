"""Quantization-aware training: the same as that of the branches, by the ordinary trainer, and deployed as it
was trained."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiers
from any_networks import random_scales
from flax import nnx
from networks import randomised
from tolerances import QUANTIZATION_AWARE, QUANTIZATION_AWARE_APART
from training import tiny_config

from repopt_jax import models, repopt_mask, train
from repopt_jax.core import paths
from repopt_jax.deploy import deploy, evaluate, load_any, load_deployed
from repopt_jax.quantize import Scheme, find_quantizable, quantizers
from repopt_jax.quantize.layers import with_quantizers
from repopt_jax.surgery.searchtree import search_tree
from repopt_jax.train.build import config_check
from repopt_jax.train.state import split_model

pytestmark = pytest.mark.once

STEPS = 10


def quantized_network(bits, momentum=0.9, **options):
    """The network "tiny" with batch norms, in float64, its quantizers not yet knowing any range."""
    model = models.create("tiny", num_classes=3, in_channels=1, rngs=nnx.Rngs(0))
    model: Any = randomised(nnx.eval_shape(lambda: model))
    for _, norm in nnx.iter_modules(model):
        if isinstance(norm, nnx.BatchNorm):
            norm.var.set_value(jnp.ones_like(norm.var[...]))
    ranges = dict.fromkeys(find_quantizable(model), (0.0, 0.0))
    quantized: Any = with_quantizers(model, Scheme(bits), ranges, momentum=momentum, **options)
    return model, quantized


def images(count=16):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(count, 8, 8, 1))), jnp.asarray(rng.integers(0, 3, count))


def trained(params, rest, loss, tx):
    """`STEPS` steps of a loss (params, rest) -> (loss, rest)."""

    @jax.jit
    def step(params, rest, state):
        grads, rest = jax.grad(loss, has_aux=True)(params, rest)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), rest, state

    state = tx.init(params)
    for _ in range(STEPS):
        params, rest, state = step(params, rest, state)
    return params, rest


def largest_difference(found, wanted):
    found, wanted = paths.named_leaves(found)[0], paths.named_leaves(wanted)[0]
    return max(float(jnp.abs(found[p] - v).max() / (jnp.abs(v).max() + 1e-30)) for p, v in wanted.items())


@pytest.mark.parametrize("bits", tiers.often([8, 3], 3))
def test_with_multipliers_it_is_that_of_the_branches(x64, bits):
    """The branches' kernel is rounded once merged; the plain network multiplies gradients."""
    _, model = quantized_network(bits)
    scales = random_scales(model.branch_sets(), dtype=jnp.float64)
    graph, params, rest = split_model(model)
    x, y = images()

    def loss(params, rest):
        whole = nnx.merge(graph, params, rest, copy=True)
        whole.train()
        value = optax.softmax_cross_entropy_with_integer_labels(whole(x), y).mean()
        return value, split_model(whole).non_trainable

    tree = search_tree(params, scales, rngs=nnx.Rngs(1), trainable_scales=False)

    def kernels(tree):
        return paths.map_named(lambda path, _: "scales" not in path.split("/"), tree)

    decay = functools.partial(optax.add_decayed_weights, 1e-2)
    sgd = optax.sgd(0.02, 0.9, nesterov=True)
    branches, branch_rest = trained(
        tree, rest, lambda tree, rest: loss(tree.merged(), rest), optax.chain(decay(kernels), sgd)
    )
    begin = tree.merged()
    plain, plain_rest = trained(begin, rest, loss, optax.chain(repopt_mask(scales), decay(), sgd))
    wanted = branches.merged()
    assert largest_difference(begin, wanted) > QUANTIZATION_AWARE_APART  # it has moved
    assert largest_difference(plain, wanted) < QUANTIZATION_AWARE
    assert largest_difference(plain_rest, branch_rest) < QUANTIZATION_AWARE
    without, _ = trained(begin, rest, loss, optax.chain(decay(), sgd))
    assert largest_difference(without, wanted) > QUANTIZATION_AWARE_APART
    # The ranges are part of it: they have followed the inputs.
    assert float(paths.at(plain_rest, "stages").get(0)[0]["conv"]["conv_general_dilated"]["range"][1]) > 1


def test_ranges_follow_the_batches_and_are_frozen(x64):
    _, model = quantized_network(8, momentum=0.75, frozen_after=3)
    x, _ = images()
    quantizer = quantizers(model)["stages/0/0/conv"]
    model.train()
    wanted = np.zeros(2)
    for step in range(5):
        batch = (1 + step) * x
        model(batch)
        new = np.array([batch.min(), batch.max()])
        if step < 3:
            wanted = new if step == 0 else 0.75 * wanted + 0.25 * new
        np.testing.assert_allclose(quantizer.range[...], wanted, rtol=1e-12)
    assert int(quantizer.count[...]) == 5
    model.eval()
    model(100 * x)
    np.testing.assert_allclose(quantizer.range[...], wanted, rtol=1e-12)


def test_ranges_of_quantization_after_training_stay_in_training_mode(x64):
    model, _ = quantized_network(8)
    quantized = with_quantizers(model, Scheme(), dict.fromkeys(find_quantizable(model), (-1.0, 2.0)))
    quantized.train()
    quantized(images()[0])
    for one in quantizers(quantized).values():
        np.testing.assert_array_equal(one.range[...], [-1, 2])


# -- by the trainer


def aware_config(digits, **changes):
    config = tiny_config("plain", digits, **changes)
    config.quantize.bits = config.quantize.bits or 4
    return config


@pytest.fixture(scope="module")
def float_run(tmp_path_factory, digits):
    out = tmp_path_factory.mktemp("runs") / "repvgg"
    train.run(tiny_config("repvgg", digits), out, progress=False)
    return out


@pytest.fixture(scope="module")
def aware_run(tmp_path_factory, digits):
    """The config, the folder and the summary of a run from scratch, whose ranges are frozen on the way."""
    config = aware_config(digits, scales="depth", quantize__bits=4, quantize__freeze_after=12)
    config.model.mode = "repopt"
    out = tmp_path_factory.mktemp("runs") / "aware"
    return config, out, train.run(config, out, progress=False)


def state_of(trained):
    return {p: np.asarray(v) for p, v in paths.named_leaves(nnx.state(trained.model))[0].items()}


def test_a_run_from_scratch_deploys_what_it_trained(tmp_path, aware_run):
    config, run, summary = aware_run
    found = train.load_trained(run)
    counts = {int(one.count[...]) for one in quantizers(found.model).values()}
    assert counts == {summary.steps}
    assert all(float(one.range[...][1]) > 0 for one in quantizers(found.model).values())
    done = deploy(run, tmp_path / "out")
    assert done.max_rel < 1e-4
    assert done.agreement == 1
    deployed = load_deployed(tmp_path / "out")
    assert list(quantizers(deployed.model)) == list(quantizers(found.model))
    assert not nnx.state(deployed.model, nnx.BatchStat)
    measured = evaluate(load_any(tmp_path / "out"))
    assert measured["accuracy"] == evaluate(found)["accuracy"] == done.test_accuracy
    assert train.run(config, run, progress=False).reused


# In the ordinary run `test_resume.py` goes on with runs.
@pytest.mark.long
@pytest.mark.once
def test_a_stopped_run_goes_on_as_an_unbroken_one(tmp_path, aware_run):
    config, unbroken, _ = aware_run
    asked = iter([False] * 8 + [True] * 100)
    first = train.run(config, tmp_path / "parts", progress=False, stop=lambda: next(asked))
    assert not first.finished
    train.run(config, tmp_path / "parts", progress=False)
    whole, parts = (state_of(train.load_trained(run)) for run in (unbroken, tmp_path / "parts"))
    for path, value in whole.items():
        np.testing.assert_array_equal(parts[path], value)


def test_a_network_of_branches_goes_on_fused(tmp_path, digits, float_run):
    config = aware_config(
        digits,
        quantize__bits=8,
        quantize__per="tensor",
        quantize__run=str(float_run),
        quantize__fused=True,
        quantize__keep_float=("head",),
        epochs=1,
        optim__learning_rate=1e-4,
        optim__warmup_epochs=0.0,
    )
    config.model.mode = "repvgg"
    train.run(config, tmp_path / "run", progress=False)
    found = train.load_trained(tmp_path / "run")
    assert "head" not in quantizers(found.model)
    assert not nnx.state(found.model, nnx.BatchStat)
    before, after = evaluate(train.load_trained(float_run)), evaluate(found)
    assert abs(before["loss"] - after["loss"]) < 0.05  # a small rate: it is still the network that it was
    done = deploy(tmp_path / "run", tmp_path / "out")
    assert done.max_abs == 0
    record = json.loads((tmp_path / "out" / "deploy.json").read_text())
    assert record["config"]["quantize"]["bits"] == 8
    assert evaluate(load_any(tmp_path / "out"))["loss"] == pytest.approx(after["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 9}, "`quantize.bits`=9 must be a whole number, at least 0 and at most 8"),
        ({"bits": 1}, "`quantize.bits`=1 must be at least 2, or 0 for floating point"),
        ({"per": "group"}, "`quantize.per`='group' must be one of channel, tensor"),
        ({"per": "tensor"}, "one scale for a kernel does not commute with their factors"),
        ({"scale_bits": 4}, "rounded scales do not commute with their factors"),
        ({"fused": True}, "needs `quantize.run`"),
        ({"step": 3}, "`quantize.step`=3 does nothing without `quantize.run`"),
        ({"momentum": 1.0}, "`quantize.momentum`=1.0 must"),
        ({"bits": 0, "per": "tensor"}, "`quantize.per`='tensor' does nothing without `quantize.bits`"),
        ({"bits": 0, "keep_float": ("head",)}, "`quantize.keep_float`=.* does nothing without"),
    ],
)
def test_settings_that_cannot_run_are_refused(digits, changes, message):
    config = tiny_config("plain", digits)
    config.quantize.bits = 4
    for name, value in changes.items():
        setattr(config.quantize, name, value)
    with pytest.raises(ValueError, match=message):
        train.validate(config, device_count=1)


def test_modes_and_layers_that_cannot_be_quantized_are_refused(tmp_path, digits, float_run):
    with pytest.raises(ValueError, match=r"`model.mode`='repvgg' with `quantize.bits`: layers of branches"):
        train.validate(aware_config(digits, model__mode="repvgg"), device_count=1)
    config = aware_config(digits, model__mode="repopt", scales="depth")
    config.quantize.run, config.quantize.fused = "run", True
    with pytest.raises(ValueError, match="scales belong to the network before it is fused"):
        train.validate(config, device_count=1)
    with pytest.raises(ValueError, match=r"`quantize.keep_float` names haed, which are no layers"):
        train.run(aware_config(digits, quantize__keep_float=("haed",)), tmp_path / "a", progress=False)
    with pytest.raises(ValueError, match=r"check it in floating point, with --config\.quantize\.bits=0"):
        config_check(aware_config(digits, model__mode="repopt", scales="depth"))
    other = aware_config(digits, quantize__run=str(float_run), quantize__fused=True, model__mode="repvgg")
    other.model.name = "tiny-wider"
    with pytest.raises(ValueError, match=r"`quantize.run` .* has trained the network"):
        train.run(other, tmp_path / "b", progress=False)
