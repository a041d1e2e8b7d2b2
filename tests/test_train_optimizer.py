"""The optimizer against the same update written out by hand and against the network with branches; held
scales; decay rules; the schedule's numbers."""

import dataclasses
import itertools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiers
import training  # noqa: F401  (registers the network)
from flax import nnx

from repopt_jax import default_branches, depth_scales, models, prepare, weight_decay_mask
from repopt_jax.core import paths
from repopt_jax.core.scales import LayerScales, Scales
from repopt_jax.train import OptimConfig
from repopt_jax.train.optimizer import hold_scales, make_optimizer, make_schedule


def abstract_model(mode="plain", name="tiny", **options):
    """The tiny network without numbers; its scales, which need none, are concrete."""

    def make():
        plain = models.create(name, num_classes=3, rngs=nnx.Rngs(0), **options)
        return prepare(plain, mode, rngs=nnx.Rngs(1)).model

    return nnx.eval_shape(make)


def kernels(params):
    """The mask of weight decay for the trees of these tests: kernels, and branches that stand for them."""
    return paths.map_named(lambda path, _: path.endswith("kernel") or "/weights/" in path, params)


@pytest.mark.parametrize("mode", ["plain", "search", "repvgg", "dbb"])
@pytest.mark.parametrize("post_se", [False, True])
def test_decay_covers_every_parameter(mode, post_se):
    model = abstract_model(mode, post_se=post_se)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    decayed, _ = paths.named_leaves(weight_decay_mask(model)(params))
    for name, value in decayed.items():
        *_, owner, leaf = name.split("/")
        # The published rule: vectors are not decayed, save those that stand for an identity kernel.
        assert value == (leaf == "kernel" or owner == "weights" or name.endswith("identity/scale")), name


@pytest.mark.parametrize(
    ("name", "mode", "decayed"),
    [
        ("repghost-digits", "search", True),
        ("repghost-digits", "repghost", False),
        ("mobileone-digits", "mobileone", True),
    ],
)
def test_decay_of_the_other_families(name, mode, decayed):
    """What stands for an identity is decayed, but not RepGhost's, as published."""
    model = abstract_model(mode, name)
    mask, _ = paths.named_leaves(weight_decay_mask(model)(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    identities = {path for path in mask if path.endswith(("weights/identity", "identity/scale"))}
    assert identities
    assert {mask[path] for path in identities} == {decayed}
    assert all(
        mask[path] == (path.endswith("kernel") or "weights/" in path) for path in set(mask) - identities
    )


def test_a_parameter_that_needs_a_decision_is_an_error():
    class Odd(nnx.Module):
        def __init__(self):
            self.gate = nnx.Param(jnp.ones(3))
            self.table = nnx.Param(jnp.ones((2, 3)))

    with pytest.raises(ValueError, match=r"^table are neither kernels nor vectors"):
        weight_decay_mask(Odd())


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
    scales = Scales({path: depth_scales(abstract_model()).entries[path]}) if scaled else None
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
    tx = make_optimizer(optim, schedule, scales=scales, batch_size=64, decayed=kernels)
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


def test_clipping_bounds_the_gradient():
    params = {"kernel": jnp.zeros(4)}
    optim = OptimConfig(learning_rate=1.0, momentum=0.0, nesterov=False, weight_decay=0.0, clip_norm=0.5)
    tx = make_optimizer(optim, lambda step: 1.0, batch_size=64, decayed=kernels)
    updates, _ = tx.update({"kernel": jnp.full(4, 10.0)}, tx.init(params), params)
    np.testing.assert_allclose(np.linalg.norm(updates["kernel"]), 0.5, rtol=1e-6)


BRANCHES = default_branches((3, 3, 4, 4))
OPTIMIZERS = {
    "sgd": OptimConfig(weight_decay=0.05),
    "adamw": OptimConfig(name="adamw", learning_rate=0.05, b2=0.99, eps=1e-3, weight_decay=0.05),
    "lion": OptimConfig(name="lion", learning_rate=0.02, b1=0.8, weight_decay=0.05),
}
TWIN_STEPS = 30
# Largest difference of a merged kernel from that of its twin, relative to its largest entry. Measured: at
# most 6.1e-15 (AdamW).
EQUAL = 1e-12
# What clipping by the ordinary norm must miss by. Measured: SGD 22 %, AdamW 5.9 %, Lion 4.4 %.
WRONG = 0.02


def mixed_scales(rng):
    """Constants of both signs."""
    vectors = {name: jnp.array(rng.normal(size=4)) for name in BRANCHES.names}
    return Scales({"conv/kernel": LayerScales(BRANCHES, vectors)})


def branch_tensors(rng):
    return {name: jnp.array(rng.normal(size=shape)) for name, shape in BRANCHES.shapes().items()}


def slow_merge(weights, vectors):
    """3x3 + 1x1 at the centre + identity on its diagonal, entry by entry."""
    rows = [[jnp.zeros((4, 4))] * 3 for _ in range(3)]
    for h in range(3):
        for w in range(3):
            rows[h][w] = weights["3x3"][h, w] * vectors["3x3"][None, :]
    rows[1][1] = rows[1][1] + weights["1x1"][0, 0] * vectors["1x1"][None, :] + jnp.diag(weights["identity"])
    return jnp.stack([jnp.stack(row) for row in rows])


def kernel_loss(kernel, bias, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(jnp.einsum("hwio,nhwi->no", kernel, x) + bias[None, :]) - y) ** 2)


def train_twice(tx, tx_twin, scales, *, seed=0):
    """Merged kernels at the end: of a plain network, and of the one with branches."""
    rng = np.random.default_rng(seed)
    vectors = scales.entries["conv/kernel"].vectors
    weights, bias = branch_tensors(rng), jnp.array(rng.normal(size=4))
    batches = [
        # The first gradients are the largest: clipping holds for a part of the steps.
        (jnp.array(rng.normal(size=(3, 3, 3, 4))), jnp.array(rng.normal(size=(3, 4)) * 8 / (1 + t)))
        for t in range(TWIN_STEPS)
    ]

    def train(tx, params, kernel_of):
        @jax.jit
        def step(params, state, batch):
            grads = jax.grad(lambda p: kernel_loss(kernel_of(p), p["bn"]["bias"], batch))(params)
            updates, state = tx.update(grads, state, params)
            return jax.tree.map(jnp.add, params, updates), state

        state = tx.init(params)
        for batch in batches:
            params, state = step(params, state, batch)
        return np.asarray(kernel_of(params))

    plain = {"conv": {"kernel": slow_merge(weights, vectors)}, "bn": {"bias": bias}}
    twin = {"conv": {"weights": weights}, "bn": {"bias": bias}}
    return (
        train(tx, plain, lambda p: p["conv"]["kernel"]),
        train(tx_twin, twin, lambda p: slow_merge(p["conv"]["weights"], vectors)),
    )


def relative_difference(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("clip_norm", [None, 2.0])
@pytest.mark.parametrize("name", tiers.often(OPTIMIZERS, "sgd", "adamw"))
def test_with_scales_the_plain_network_trains_as_the_one_with_branches(x64, name, clip_norm):
    optim = dataclasses.replace(OPTIMIZERS[name], clip_norm=clip_norm)
    schedule = make_schedule(optim, epochs=3, steps_per_epoch=10)
    scales = mixed_scales(np.random.default_rng(1))
    tx, tx_twin = (
        make_optimizer(optim, schedule, scales=scales, batch_size=64, decayed=kernels),
        make_optimizer(optim, schedule, batch_size=64, decayed=kernels),
    )
    assert relative_difference(*train_twice(tx, tx_twin, scales)) < EQUAL


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_ordinary_norm_would_clip_otherwise(x64, name):
    optim = dataclasses.replace(OPTIMIZERS[name], clip_norm=2.0)
    schedule = make_schedule(optim, epochs=3, steps_per_epoch=10)
    scales = mixed_scales(np.random.default_rng(1))
    unclipped = make_optimizer(OPTIMIZERS[name], schedule, scales=scales, batch_size=64, decayed=kernels)
    wrong = optax.chain(optax.clip_by_global_norm(2.0), unclipped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that this is wrong
        difference = relative_difference(
            *train_twice(wrong, make_optimizer(optim, schedule, batch_size=64, decayed=kernels), scales)
        )
    assert difference > WRONG


@pytest.mark.parametrize(
    ("batch", "factor"), [(1, 1), (16, 1), (24, 1.125), (64, 1), (96, 1.5), (128, 2), (512, 8)]
)
def test_decay_scaled_by_the_batch(batch, factor):
    params, rate = {"kernel": jnp.full(3, 2.0)}, lambda step: 1.0
    optim = OptimConfig(learning_rate=1.0, momentum=0.0, nesterov=False, weight_decay=0.01)
    for scaling, expected in (("none", 1), ("batch", factor)):
        scaled = dataclasses.replace(optim, decay_scaling=scaling)
        tx = make_optimizer(scaled, rate, batch_size=batch, decayed=kernels)
        updates, _ = tx.update({"kernel": jnp.zeros(3)}, tx.init(params), params)
        np.testing.assert_allclose(updates["kernel"], -0.02 * expected, rtol=1e-6)


def test_constants_left_out_are_those_of_optax(x64):
    params = {"kernel": jnp.arange(4.0)}
    grads = {"kernel": jnp.array([1.0, -2.0, 3.0, -4.0])}
    mask = {"kernel": True}
    for name, expected in (
        ("adamw", optax.adamw(0.1, weight_decay=4e-5, mask=mask)),
        ("lion", optax.lion(0.1, weight_decay=4e-5, mask=mask)),
        ("sgd", optax.chain(optax.add_decayed_weights(4e-5, mask), optax.sgd(0.1, 0.9, nesterov=True))),
    ):
        tx = make_optimizer(OptimConfig(name=name), lambda step: 0.1, batch_size=64, decayed=kernels)
        found, _ = tx.update(grads, tx.init(params), params)
        right, _ = expected.update(grads, expected.init(params), params)
        np.testing.assert_allclose(found["kernel"], right["kernel"], rtol=1e-12)


HELD_AFTER = 7


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_held_scales_leave_a_csla_network(x64, clip_norm):
    """Against SGD written out by hand, which from step `HELD_AFTER` on knows no gradient of a scale."""
    rng = np.random.default_rng(3)
    start = {
        "conv": {
            "weights": branch_tensors(rng),
            "scales": {name: jnp.array(rng.normal(size=4)) for name in ("3x3", "1x1")},
        },
        "bn": {"bias": jnp.array(rng.normal(size=4))},
    }
    batches = [
        (jnp.array(rng.normal(size=(3, 3, 3, 4))), jnp.array(rng.normal(size=(3, 4)) * 4)) for _ in range(20)
    ]

    def loss(p, batch):
        return kernel_loss(slow_merge(p["conv"]["weights"], p["conv"]["scales"]), p["bn"]["bias"], batch)

    gradient = jax.jit(jax.grad(loss))
    optim = OptimConfig(weight_decay=0.05, clip_norm=clip_norm)
    tx = make_optimizer(optim, lambda step: 0.1, batch_size=64, decayed=kernels)
    tx = hold_scales(tx, {"conv/scales/3x3", "conv/scales/1x1"}, after=HELD_AFTER)
    step = jax.jit(tx.update)
    params, state, history = start, tx.init(start), []
    for batch in batches:
        updates, state = step(gradient(params, batch), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        history.append(paths.named_leaves(params)[0])
    assert step._cache_size() == 1  # the same program before and after

    values, treedef = paths.named_leaves(start)
    velocity = {path: np.zeros(value.shape) for path, value in values.items()}
    for t, batch in enumerate(batches):
        grads, _ = paths.named_leaves(gradient(treedef.unflatten(values.values()), batch))
        moving = [p for p in values if t < HELD_AFTER or "/scales/" not in p]
        norm = math.sqrt(sum(float(jnp.sum(grads[p] ** 2)) for p in moving))
        factor = 1.0 if clip_norm is None else min(1.0, clip_norm / norm)
        for p in moving:
            g = factor * grads[p] + (0.05 * values[p] if "weights" in p else 0)
            velocity[p] = 0.9 * velocity[p] + g
            values[p] = values[p] - 0.1 * (g + 0.9 * velocity[p])

    for path, value in values.items():
        assert relative_difference(np.asarray(history[-1][path]), np.asarray(value)) < EQUAL, path
        moved = [not np.array_equal(a[path], b[path]) for a, b in itertools.pairwise(history)]
        # The first pair of `history` is of steps 1 and 2: the last step that moves a scale is HELD_AFTER.
        assert moved == [t < HELD_AFTER - 1 or "/scales/" not in path for t in range(len(moved))], path


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


# float32 rates of at most 0.4 against Python's floats; measured: 3e-8.
RATE = 2e-7
STEPS, EPOCHS = 7, 5


def slow_rate(optim, batch_size, step):
    """The rate of a step, from the words of `OptimConfig`, in Python's floats."""
    times = 1 if optim.base_batch is None else batch_size / optim.base_batch
    start, peak, least = optim.warmup_start, optim.learning_rate, optim.min_learning_rate
    by_epoch = optim.schedule_by == "epoch"
    at, length = (step // STEPS, EPOCHS) if by_epoch else (step, EPOCHS * STEPS)
    warmup = math.ceil(optim.warmup_epochs * (1 if by_epoch else STEPS))
    if at < warmup:
        passed = at if by_epoch else at + 1  # steps count when they are made, epochs when they begin
        return times * (start + (peak - start) * passed / warmup)
    if optim.cosine_over == "rest":
        at, length = at - warmup, length - warmup
    return times * (least + (peak - least) * (1 + math.cos(math.pi * at / length)) / 2)


@pytest.mark.parametrize("schedule_by", ["step", "epoch"])
@pytest.mark.parametrize("cosine_over", ["rest", "run"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"warmup_epochs": 1.0, "warmup_start": 1e-4},
        {"warmup_epochs": 2.5, "warmup_start": 0.01, "min_learning_rate": 1e-3, "base_batch": 256},
    ],
)
def test_schedules_against_a_slow_reference(fields, cosine_over, schedule_by):
    optim = OptimConfig(cosine_over=cosine_over, schedule_by=schedule_by, **fields)
    schedule = make_schedule(optim, epochs=EPOCHS, steps_per_epoch=STEPS, batch_size=1024)
    for step in range(EPOCHS * STEPS):
        assert float(schedule(step)) == pytest.approx(slow_rate(optim, 1024, step), abs=RATE), step


def test_the_forms_of_a_schedule_are_told_apart():
    """The negative control: each field changes some rate by far more than `RATE`."""
    optim = OptimConfig(warmup_epochs=1.0, warmup_start=0.01)
    rates = [slow_rate(optim, 64, step) for step in range(EPOCHS * STEPS)]
    for change in (
        {"cosine_over": "run"},
        {"schedule_by": "epoch"},
        {"warmup_start": 0.0},
        {"min_learning_rate": 1e-3},
        {"base_batch": 32},
    ):
        other = dataclasses.replace(optim, **change)
        schedule = make_schedule(other, epochs=EPOCHS, steps_per_epoch=STEPS, batch_size=64)
        assert max(abs(float(schedule(t)) - rate) for t, rate in enumerate(rates)) > 1000 * RATE, change


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_default_schedule_is_that_of_optax(warmup):
    """To the last bit: the warm-up, then the cosine."""
    optim = OptimConfig(learning_rate=0.1, warmup_epochs=warmup / STEPS)
    fall = optax.cosine_decay_schedule(0.1, EPOCHS * STEPS - warmup)
    rise = optax.linear_schedule(0.1 / 3, 0.1, 2)
    before = optax.join_schedules([rise, fall], [warmup]) if warmup else fall
    now = make_schedule(optim, epochs=EPOCHS, steps_per_epoch=STEPS)
    steps = jnp.arange(EPOCHS * STEPS)
    np.testing.assert_array_equal(jax.vmap(now)(steps), jax.vmap(before)(steps))


def test_a_rate_for_some_images_needs_the_batch():
    with pytest.raises(ValueError, match="`batch_size` is missing: the rate is for 256 images"):
        make_schedule(OptimConfig(base_batch=256), epochs=1, steps_per_epoch=2)
