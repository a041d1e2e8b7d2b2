"""Step and evaluation: right numbers, on any number of devices, compiled once, with donated buffers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from training import VGG_VARIANTS

from repopt_jax.models import RepOptVGG
from repopt_jax.train import classification
from repopt_jax.train import sharding as shardings
from repopt_jax.train import state as states
from repopt_jax.train.classification import Classification
from repopt_jax.train.config import Config, OptimConfig

RNG = np.random.default_rng(7)
IMAGES = RNG.normal(size=(24, 8, 8, 1)).astype(np.float32)
OBJECTIVE = Classification(Config()).objective
LABELS = RNG.integers(0, 5, 24).astype(np.int32)


def numpy_cross_entropy(logits, labels, smoothing):
    """-sum_c q_c log p_c with q = (1 - smoothing) at the label + smoothing / classes everywhere."""
    logits = logits.astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    q = np.full(logits.shape, smoothing / logits.shape[-1])
    q[np.arange(len(labels)), labels] += 1 - smoothing
    return -(q * log_p).sum(-1)


@pytest.fixture
def network():
    model = RepOptVGG(VGG_VARIANTS["tiny"], num_classes=5, in_channels=1, rngs=nnx.Rngs(0))
    return states.split_model(model)


def batch_of(rows, **more):
    return {"image": IMAGES[rows], "label": LABELS[rows], **more}


def start(network, tx, mesh):
    state = states.init_state(network, tx, sums=Classification.sums)
    sharding = shardings.state_sharding(mesh, state)
    return jax.device_put(state, sharding), sharding


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_equals_numpy(x64, smoothing):
    logits = RNG.normal(size=(6, 5)) * 4
    loss = classification.cross_entropy(jnp.array(logits), jnp.array(LABELS[:6]), label_smoothing=smoothing)
    np.testing.assert_allclose(loss, numpy_cross_entropy(logits, LABELS[:6], smoothing), rtol=1e-12)


def test_half_precision_logits_give_a_float32_loss():
    assert (
        classification.cross_entropy(jnp.ones((2, 5), jnp.bfloat16), jnp.zeros(2, jnp.int32)).dtype
        == jnp.float32
    )


def test_step_reports_smoothed_loss_and_means_of_the_window(network):
    mesh, tx = shardings.make_mesh(), optax.sgd(0.0)
    state, sharding = start(network, tx, mesh)
    smoothed = Classification(Config(optim=OptimConfig(label_smoothing=0.1))).objective
    step = states.make_train_step(
        network.graphdef, tx, lambda t: 0.5 - t, smoothed, log_every=2, sharding=sharding
    )
    model = states.merge_model(network.graphdef, network.params, network.rest)
    model.train()
    expected = []
    for rows in (slice(0, 8), slice(8, 16), slice(16, 24)):
        logits = np.asarray(model(IMAGES[rows]))
        expected.append(
            (
                numpy_cross_entropy(logits, LABELS[rows], 0.1).mean(),
                (logits.argmax(-1) == LABELS[rows]).mean(),
            )
        )
    windows = ([0], [0, 1], [2])  # a new window starts after every second step
    for k, window in enumerate(windows):
        state, means = step(state, shardings.put_batch(batch_of(slice(8 * k, 8 * k + 8)), mesh))
        loss, accuracy = np.mean([expected[i] for i in window], axis=0)
        assert float(means["loss"]) == pytest.approx(loss, rel=1e-5)
        assert float(means["accuracy"]) == pytest.approx(accuracy)
        assert float(means["lr"]) == pytest.approx(0.5 - k)
    assert int(state.step) == 3


def test_batch_statistics_move_by_the_global_batch(network):
    mesh, tx = shardings.make_mesh(), optax.sgd(0.1)
    state, sharding = start(network, tx, mesh)
    step = states.make_train_step(network.graphdef, tx, lambda t: 0.1, OBJECTIVE, sharding=sharding)
    state, _ = step(state, shardings.put_batch(batch_of(slice(0, 8)), mesh))
    kernel = network.params["stages"][0][0]["conv"]["kernel"]
    maps = jax.lax.conv_general_dilated(
        IMAGES[:8], kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    mean = state.rest["stages"][0][0]["bn"]["mean"]
    np.testing.assert_allclose(mean, 0.1 * np.mean(maps, axis=(0, 1, 2)), rtol=1e-4, atol=1e-7)


def test_second_step_does_not_compile_and_donation_frees_the_state(network):
    mesh, tx = shardings.make_mesh(), optax.sgd(0.1, 0.9)
    state, sharding = start(network, tx, mesh)
    step = states.make_train_step(network.graphdef, tx, lambda t: 0.1, OBJECTIVE, sharding=sharding)
    given = jax.tree.leaves(state)
    for k in range(3):
        state, _ = step(state, shardings.put_batch(batch_of(slice(8 * k, 8 * k + 8)), mesh))
    assert step._cache_size() == 1
    assert all(leaf.is_deleted() for leaf in given)
    # The model that the state was made from keeps its arrays.
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(network.params))


def test_first_bad_step_is_remembered(network):
    mesh, tx = shardings.make_mesh(), optax.sgd(0.0)
    state, sharding = start(network, tx, mesh)
    step = states.make_train_step(network.graphdef, tx, lambda t: 0.0, OBJECTIVE, sharding=sharding)
    for value, expected in ((1.0, -1), (np.nan, 2), (1.0, 2), (np.inf, 2)):
        batch = batch_of(slice(0, 8))
        batch["image"] = batch["image"] * np.float32(value)
        # Running statistics are ruined by the bad batch, but training uses those of the batch.
        state, means = step(state, shardings.put_batch(batch, mesh))
        assert int(means["bad_step"]) == expected


def evaluate(network, mesh, batch_size):
    """Means over the 24 images in batches of `batch_size`, the last one padded with rows of NaN."""
    step = classification.make_eval_step(network.graphdef)
    params, rest = jax.device_put((network.params, network.rest), shardings.replicated(mesh))
    sums = jax.device_put(states.zero_sums(Classification.sums), shardings.replicated(mesh))
    for first in range(0, 24, batch_size):
        batch = batch_of(slice(first, first + batch_size))
        missing = batch_size - len(batch["label"])
        batch["image"] = np.pad(batch["image"], ((0, missing), *((0, 0),) * 3), constant_values=np.nan)
        batch["mask"] = np.pad(np.ones(len(batch["label"]), np.float32), (0, missing))
        batch["label"] = np.pad(batch["label"], (0, missing))
        sums = step(params, rest, sums, shardings.put_batch(batch, mesh))
    return classification.sums_to_means(sums)


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("batch_size", [20, 24, 32])
def test_evaluation_counts_every_image_once(network, devices, batch_size):
    found = evaluate(network, shardings.make_mesh(devices=jax.devices()[:devices]), batch_size)
    model = states.merge_model(network.graphdef, network.params, network.rest)
    model.eval()
    logits = np.asarray(model(IMAGES))
    assert found["count"] == 24
    assert found["accuracy"] == (logits.argmax(-1) == LABELS).mean()
    assert found["loss"] == pytest.approx(numpy_cross_entropy(logits, LABELS, 0.0).mean(), rel=1e-5)


def test_state_divided_over_fsdp_trains_the_same(network):
    finals = []
    for fsdp in (1, 2):
        mesh, tx = shardings.make_mesh(fsdp), optax.sgd(0.1, 0.9)
        state, sharding = start(network, tx, mesh)
        step = states.make_train_step(network.graphdef, tx, lambda t: 0.1, OBJECTIVE, sharding=sharding)
        for k in range(2):
            state, _ = step(state, shardings.put_batch(batch_of(slice(8 * k, 8 * k + 8)), mesh))
        kernel = state.params["stages"][3][0]["conv"]["kernel"]
        assert kernel.sharding.spec == (P() if fsdp == 1 else P(None, None, None, "fsdp"))
        finals.append(jax.device_get(state.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *finals)


def test_all_finite_finds_one_bad_number():
    assert states.all_finite({"a": jnp.ones(3), "b": jnp.zeros((2, 2))})
    assert not states.all_finite({"a": jnp.ones(3), "b": jnp.array([1.0, jnp.inf])})
