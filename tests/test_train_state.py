"""Step and evaluation: right numbers, on any number of devices, compiled once, with donated buffers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training  # noqa: F401  (registers the network)
from flax import nnx
from jax.sharding import PartitionSpec as P

from repopt_jax import depth_scales, models
from repopt_jax.core import paths
from repopt_jax.surgery import csla_twin
from repopt_jax.surgery.reinitialize import sample_weights
from repopt_jax.train import state as states
from repopt_jax.train import tasks
from repopt_jax.train.config import Config, OptimConfig
from repopt_jax.train.tasks import Classification

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
    model = models.create("tiny", num_classes=5, in_channels=1, rngs=nnx.Rngs(0))
    return states.split_model(model)


def batch_of(rows, **more):
    return {"image": IMAGES[rows], "label": LABELS[rows], **more}


def start(network, tx, mesh):
    state = states.init_state(network, tx, sums=Classification.sums)
    sharding = states.state_sharding(mesh, state)
    return jax.device_put(state, sharding), sharding


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_equals_numpy(x64, smoothing):
    logits = RNG.normal(size=(6, 5)) * 4
    loss = tasks.cross_entropy(jnp.array(logits), jnp.array(LABELS[:6]), label_smoothing=smoothing)
    np.testing.assert_allclose(loss, numpy_cross_entropy(logits, LABELS[:6], smoothing), rtol=1e-12)


def test_half_precision_logits_give_a_float32_loss():
    assert tasks.cross_entropy(jnp.ones((2, 5), jnp.bfloat16), jnp.zeros(2, jnp.int32)).dtype == jnp.float32


def test_step_reports_smoothed_loss_and_means_of_the_window(network):
    mesh, tx = states.make_mesh(), optax.sgd(0.0)
    state, sharding = start(network, tx, mesh)
    smoothed = Classification(Config(optim=OptimConfig(label_smoothing=0.1))).objective
    step = states.make_train_step(
        network.graphdef, tx, lambda t: 0.5 - t, smoothed, log_every=2, sharding=sharding
    )
    model = states.merge_model(network.graphdef, network.params, network.non_trainable)
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
        state, means = step(state, states.put_batch(batch_of(slice(8 * k, 8 * k + 8)), mesh))
        loss, accuracy = np.mean([expected[i] for i in window], axis=0)
        assert float(means["loss"]) == pytest.approx(loss, rel=1e-5)
        assert float(means["accuracy"]) == pytest.approx(accuracy)
        assert float(means["lr"]) == pytest.approx(0.5 - k)
    assert int(state.step) == 3


def test_batch_statistics_move_by_the_global_batch(network):
    mesh, tx = states.make_mesh(), optax.sgd(0.1)
    state, sharding = start(network, tx, mesh)
    step = states.make_train_step(network.graphdef, tx, lambda t: 0.1, OBJECTIVE, sharding=sharding)
    state, _ = step(state, states.put_batch(batch_of(slice(0, 8)), mesh))
    kernel = network.params["stages"][0][0]["conv"]["kernel"]
    maps = jax.lax.conv_general_dilated(
        IMAGES[:8], kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    mean = state.non_trainable["stages"][0][0]["bn"]["mean"]
    np.testing.assert_allclose(mean, 0.1 * np.mean(maps, axis=(0, 1, 2)), rtol=1e-4, atol=1e-7)


def test_second_step_does_not_compile_and_donation_frees_the_state(network):
    mesh, tx = states.make_mesh(), optax.sgd(0.1, 0.9)
    state, sharding = start(network, tx, mesh)
    step = states.make_train_step(network.graphdef, tx, lambda t: 0.1, OBJECTIVE, sharding=sharding)
    given = jax.tree.leaves(state)
    for k in range(3):
        state, _ = step(state, states.put_batch(batch_of(slice(8 * k, 8 * k + 8)), mesh))
    assert step._cache_size() == 1
    assert all(leaf.is_deleted() for leaf in given)
    # The model that the state was made from keeps its arrays.
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(network.params))


def test_first_bad_step_is_remembered(network):
    mesh, tx = states.make_mesh(), optax.sgd(0.0)
    state, sharding = start(network, tx, mesh)
    step = states.make_train_step(network.graphdef, tx, lambda t: 0.0, OBJECTIVE, sharding=sharding)
    for value, expected in ((1.0, -1), (np.nan, 2), (1.0, 2), (np.inf, 2)):
        batch = batch_of(slice(0, 8))
        batch["image"] = batch["image"] * np.float32(value)
        # Running statistics are ruined by the bad batch, but training uses those of the batch.
        state, means = step(state, states.put_batch(batch, mesh))
        assert int(means["bad_step"]) == expected


def evaluate(network, mesh, batch_size):
    """Means over the 24 images in batches of `batch_size`, the last one padded with rows of NaN."""
    step = tasks.make_eval_step(network.graphdef)
    params, rest = jax.device_put((network.params, network.non_trainable), states.replicated(mesh))
    sums = jax.device_put(states.zero_sums(Classification.sums), states.replicated(mesh))
    for first in range(0, 24, batch_size):
        batch = batch_of(slice(first, first + batch_size))
        missing = batch_size - len(batch["label"])
        batch["image"] = np.pad(batch["image"], ((0, missing), *((0, 0),) * 3), constant_values=np.nan)
        batch["mask"] = np.pad(np.ones(len(batch["label"]), np.float32), (0, missing))
        batch["label"] = np.pad(batch["label"], (0, missing))
        sums = step(params, rest, sums, states.put_batch(batch, mesh))
    return tasks.sums_to_means(sums)


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("batch_size", [20, 24, 32])
def test_evaluation_counts_every_image_once(network, devices, batch_size):
    found = evaluate(network, states.make_mesh(devices=jax.devices()[:devices]), batch_size)
    model = states.merge_model(network.graphdef, network.params, network.non_trainable)
    model.eval()
    logits = np.asarray(model(IMAGES))
    assert found["count"] == 24
    assert found["accuracy"] == (logits.argmax(-1) == LABELS).mean()
    assert found["loss"] == pytest.approx(numpy_cross_entropy(logits, LABELS, 0.0).mean(), rel=1e-5)


def test_state_divided_over_fsdp_trains_the_same(network):
    finals = []
    for fsdp in (1, 2):
        mesh, tx = states.make_mesh(fsdp), optax.sgd(0.1, 0.9)
        state, sharding = start(network, tx, mesh)
        step = states.make_train_step(network.graphdef, tx, lambda t: 0.1, OBJECTIVE, sharding=sharding)
        for k in range(2):
            state, _ = step(state, states.put_batch(batch_of(slice(8 * k, 8 * k + 8)), mesh))
        kernel = state.params["stages"][3][0]["conv"]["kernel"]
        assert kernel.sharding.spec == (P() if fsdp == 1 else P(None, None, None, "fsdp"))
        finals.append(jax.device_get(state.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *finals)


def test_all_finite_finds_one_bad_number():
    assert states.all_finite({"a": jnp.ones(3), "b": jnp.zeros((2, 2))})
    assert not states.all_finite({"a": jnp.ones(3), "b": jnp.array([1.0, jnp.inf])})


# -- accumulation, statistics of each device, moving averages: against loops written out here
# ---

# Of the largest entry of an array, in float64. Measured: 3e-15; the controls differ by 0.02 and more.
EXACT = 1e-12
CONTROL = 1e-3


def wide(tree):
    # Arrays of JAX: batch norm writes into those of NumPy where it stands.
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64 if x.dtype == np.float32 else None), tree)


def gradient_of(network, params, rest, rows):
    """(gradient, running statistics after it) of some rows, by themselves."""

    return _gradient_of_batch(network.graphdef, params, rest, wide(batch_of(rows)))


@functools.partial(jax.jit, static_argnums=0)
def _gradient_of_batch(graphdef, params, rest, batch):
    def loss_of(params):
        model = states.merge_model(graphdef, params, rest)
        model.train()
        loss, _ = OBJECTIVE(model, batch)
        return loss, states.split_model(model).non_trainable

    return jax.grad(loss_of, has_aux=True)(params)


def stepped(network, steps=1, **options):
    """The state after steps of plain SGD at rate 0.5 on the first 8 rows, in float64."""
    network = states.Network(network.graphdef, wide(network.params), wide(network.non_trainable))
    mesh, tx = states.make_mesh(), optax.sgd(0.5)
    state = states.init_state(network, tx, sums=Classification.sums, ema="ema" in options)
    state = jax.device_put(state, states.replicated(mesh))
    if options.pop("device_statistics", False):
        options["statistics_mesh"] = mesh
    step = states.make_train_step(network.graphdef, tx, lambda t: 0.5, OBJECTIVE, **options)
    seen = []
    for _ in range(steps):
        state, _ = step(state, states.put_batch(wide(batch_of(slice(0, 8))), mesh))
        seen.append(jax.device_get(state))
    return network, seen


def relative(found, expected):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6) for a, b in pairs)


def test_an_accumulated_step_is_the_mean_of_its_parts(x64, network):
    network, (state,) = stepped(network, accumulate=2)
    rest, grads = network.non_trainable, []
    for part in (0, 1):  # row i is of part i % 2, and the statistics go on from part to part
        grad, rest = gradient_of(network, network.params, rest, slice(part, 8, 2))
        grads.append(grad)
    expected = jax.tree.map(lambda p, a, b: p - 0.5 * (a + b) / 2, network.params, *grads)
    assert relative(state.params, expected) < EXACT
    assert relative(state.non_trainable, rest) < EXACT
    assert int(state.metric_sums["count"]) == 8
    whole, _ = gradient_of(network, network.params, network.non_trainable, slice(0, 8))
    at_once = jax.tree.map(lambda p, g: p - 0.5 * g, network.params, whole)
    assert relative(state.params, at_once) > CONTROL  # batch norm sees parts


def test_statistics_of_each_device_are_those_of_its_rows(x64, network):
    network, (state,) = stepped(network, device_statistics=True)
    parts = [
        gradient_of(network, network.params, network.non_trainable, slice(2 * d, 2 * d + 2)) for d in range(4)
    ]
    expected = jax.tree.map(
        lambda p, *gs: p - 0.5 * sum(gs) / 4, network.params, *(grad for grad, _ in parts)
    )
    assert relative(state.params, expected) < EXACT
    means = jax.tree.map(lambda *rests: sum(rests) / 4, *(rest for _, rest in parts))
    assert relative(state.non_trainable, means) < EXACT
    whole, _ = gradient_of(network, network.params, network.non_trainable, slice(0, 8))
    at_once = jax.tree.map(lambda p, g: p - 0.5 * g, network.params, whole)
    assert relative(state.params, at_once) > CONTROL


def test_moving_averages_follow_their_rule(x64, network):
    network, seen = stepped(network, steps=3, ema=0.25)
    average = {"params": network.params, "non_trainable": network.non_trainable}
    for t, state in enumerate(seen):
        d = min(0.25, (1 + t) / (10 + t))
        now = {"params": state.params, "non_trainable": state.non_trainable}
        average = jax.tree.map(lambda e, x, d=d: d * e + (1 - d) * x, average, now)
        assert relative(state.ema, average) < EXACT
        assert relative(state.network, (average["params"], average["non_trainable"])) < EXACT
    assert relative(seen[-1].ema["params"], seen[-1].params) > CONTROL


def test_constant_scales_stay_what_they_are(x64):
    """Also where the devices' changes are averaged."""
    plain = models.create("tiny", num_classes=5, in_channels=1, rngs=nnx.Rngs(0))
    scales = depth_scales(plain)
    model = csla_twin(plain, scales, sample_weights(scales, jax.random.key(1)))
    network, (state,) = stepped(states.split_model(model), device_statistics=True, ema=0.5)
    for tree in (state.non_trainable, state.ema["non_trainable"]):
        kept = paths.named_leaves(tree)[0]
        constants = {
            name: leaf
            for name, leaf in paths.named_leaves(network.non_trainable)[0].items()
            if "scales" in name
        }
        assert constants
        assert all((kept[name] == leaf).all() for name, leaf in constants.items())
