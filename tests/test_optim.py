"""The claim itself: 50 steps of the plain layer with `repopt_mask` and of its branches, in float64, end in
one kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from repopt_jax import optim, paths
from repopt_jax.branches import Average, BranchSet, Identity, Kernel, default_branches
from repopt_jax.nn.csla import convolve
from repopt_jax.scales import LayerScales, Scales

STEPS = 50
EXACT = 1e-12  # relative, after 50 steps; measured: 2e-15 to 9e-15
WRONG = 1e-3  # what every wrong rule must exceed; measured: 4e-3 (decay before the multiplier) to 1.2
DECAY = 1e-2  # large enough for a misplaced decay to show in 50 steps

LAYERS = {
    "3x3+1x1+identity": (default_branches((3, 3, 4, 4)), (6, 6)),
    "3x3+1x1": (default_branches((3, 3, 3, 4)), (6, 6)),
    "depthwise": (default_branches((3, 3, 1, 4), groups=4), (6, 6)),
    "grouped": (default_branches((3, 3, 2, 4), groups=2), (6, 6)),
    "5x5": (default_branches((5, 5, 4, 4)), (7, 7)),
    "1-D": (default_branches((5, 4, 4)), (9,)),
    "3-D": (default_branches((3, 3, 3, 2, 2)), (4, 5, 4)),
    "dense": (default_branches((4, 4)), ()),
    "ACNet + dilated": (
        BranchSet(
            (5, 5, 4, 4),
            (Kernel((5, 5)), Kernel((3, 3), (2, 2)), Kernel((1, 5)), Kernel((5, 1)), Identity()),
        ),
        (7, 7),
    ),
    "average pooling": (BranchSet((3, 3, 4, 4), (Kernel((3, 3)), Average(), Identity())), (6, 6)),
    "PyTorch layout": (default_branches((4, 4, 3, 3), layout="oi..."), (6, 6)),
}


def problem(branches, size, seed=0):
    """Scales of mixed sign, branch weights, and a non-quadratic loss of the merged kernel on one batch for
    each step."""
    rng = np.random.default_rng(seed)
    inputs = branches.kernel[-2] * branches.groups if branches.layout == "...io" else branches.kernel[1]
    scales = Scales(
        {
            "layer/kernel": LayerScales(
                branches, {n: jnp.asarray(rng.normal(size=branches.out)) for n in branches.names}
            )
        }
    )
    weights = branches.sample(jax.random.key(seed), dtype=jnp.float64)
    x = jnp.asarray(rng.normal(size=(STEPS, 3, *size, inputs)))
    y = jnp.asarray(rng.normal(size=(STEPS, 3, *size, branches.out)))
    axes = len(size)

    def loss(kernel, x, y):
        if branches.layout == "oi...":
            kernel = jnp.moveaxis(kernel, (0, 1), (-1, -2))
        window = kernel.shape[:axes]
        out = convolve(
            x,
            kernel,
            strides=(1,) * axes,
            padding=[(n // 2, n // 2) for n in window],
            dilation=(1,) * axes,
            groups=branches.groups,
        )
        return jnp.mean((jnp.tanh(out) - y) ** 2)

    return scales, weights, (x, y), loss


def train(tx, params, loss, data):
    """`STEPS` steps as one compiled scan; returns the final parameters."""

    def step(carry, batch):
        params, state = carry
        gradients = jax.grad(loss)(params, *batch)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), data)[0][0])(params)


@functools.cache
def csla_result(name):
    """The kernel that training the branches themselves gives, with plain Nesterov SGD and decay: the
    oracle."""
    branches, size = LAYERS[name]
    scales, weights, data, loss = problem(branches, size)
    vectors = scales.entries["layer/kernel"].vectors
    tx = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(0.2, 0.9, nesterov=True))
    end = train(tx, weights, lambda w, x, y: loss(branches.merge(w, vectors), x, y), data)
    return branches.merge(weights, vectors), branches.merge(end, vectors)


def plain_result(name, make_tx):
    branches, size = LAYERS[name]
    scales, _, data, loss = problem(branches, size)
    start, _ = csla_result(name)
    params = {"layer": {"kernel": start}}
    return train(make_tx(scales), params, lambda p, x, y: loss(p["layer"]["kernel"], x, y), data)["layer"][
        "kernel"
    ]


def relative(a, b):
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


def chain(scales):
    return optax.chain(
        optim.repopt_mask(scales), optax.add_decayed_weights(DECAY), optax.sgd(0.2, 0.9, nesterov=True)
    )


@pytest.mark.parametrize("name", LAYERS)
def test_csla_and_repopt_mask_end_in_one_kernel(x64, name):
    start, expected = csla_result(name)
    assert relative(start, expected) > 0.05  # it has moved
    assert relative(plain_result(name, chain), expected) <= EXACT


def test_repopt_sgd_is_that_chain(x64):
    def make(scales):
        return optim.repopt_sgd(0.2, scales, weight_decay=DECAY)

    name = "3x3+1x1+identity"
    np.testing.assert_array_equal(plain_result(name, make), plain_result(name, chain))


def decay_first(scales):
    return optax.chain(
        optax.add_decayed_weights(DECAY), optim.repopt_mask(scales), optax.sgd(0.2, 0.9, nesterov=True)
    )


def without_identity(scales):
    ((path, entry),) = scales.entries.items()
    branches = tuple(b for b in entry.branches.branches if b.has_scale)
    reduced = BranchSet(entry.branches.kernel, branches, entry.branches.groups)
    vectors = {name: entry.vectors[name] for name in reduced.names}
    return chain(Scales({path: LayerScales(reduced, vectors)}))


def squared_identity(scales):
    """u^2 instead of 1 on the diagonal: the reading of the paper that forgets that u is trained."""

    def update(updates, state, params=None):
        (entry,) = scales.entries.values()
        diagonal = Identity().support(entry.branches.kernel)
        u = entry.vectors["identity"]
        m = entry.branches.multiplier(entry.vectors, dtype=jnp.float64) + jnp.where(diagonal, u**2 - 1, 0)
        return jax.tree.map(lambda g: g * m, updates), state

    wrong = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    return optax.chain(wrong, optax.add_decayed_weights(DECAY), optax.sgd(0.2, 0.9, nesterov=True))


def off_centre(scales):
    """The published code's fixed centre index 1 in a 5x5 kernel."""

    def update(updates, state, params=None):
        (entry,) = scales.entries.values()
        m = entry.branches.multiplier(entry.vectors, dtype=jnp.float64)
        return jax.tree.map(lambda g: g * jnp.roll(m, (-1, -1), (0, 1)), updates), state

    wrong = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    return optax.chain(wrong, optax.add_decayed_weights(DECAY), optax.sgd(0.2, 0.9, nesterov=True))


def clipped(scales):
    return optax.chain(optax.clip_by_global_norm(0.05), chain(scales))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (decay_first, "3x3+1x1+identity"),
        (without_identity, "3x3+1x1+identity"),
        (without_identity, "depthwise"),
        (squared_identity, "3x3+1x1+identity"),
        (off_centre, "5x5"),
    ],
)
def test_wrong_rules_are_seen(x64, make, name):
    _, expected = csla_result(name)
    assert relative(plain_result(name, make), expected) > WRONG


def test_ordinary_clipping_breaks_the_equivalence(x64):
    name = "3x3+1x1+identity"
    branches, size = LAYERS[name]
    scales, weights, data, loss = problem(branches, size)
    vectors = scales.entries["layer/kernel"].vectors
    tx = optax.chain(
        optax.clip_by_global_norm(0.05), optax.add_decayed_weights(DECAY), optax.sgd(0.2, 0.9, nesterov=True)
    )
    end = train(tx, weights, lambda w, x, y: loss(branches.merge(w, vectors), x, y), data)
    assert relative(plain_result(name, clipped), branches.merge(end, vectors)) > WRONG


def scales_for(*named):
    return Scales.depth_rule(
        {path: default_branches(shape) for path, shape in named}, {path: 1 for path, _ in named}
    )


def test_multipliers_of_a_tree_equal_the_published_formula():
    """M[h, w, i, o] = s_o^2 + [centre] t_o^2 + [centre and i = o], the rest of the tree ones."""
    rng = np.random.default_rng(0)
    branches = default_branches((3, 3, 4, 4))
    s, t, u = rng.normal(size=(3, 4)).astype(np.float32)
    scales = Scales(
        {
            "a/kernel": LayerScales(
                branches, {"3x3": jnp.asarray(s), "1x1": jnp.asarray(t), "identity": jnp.asarray(u)}
            )
        }
    )
    params = {"a": {"kernel": jnp.zeros((3, 3, 4, 4)), "bias": jnp.zeros(4)}}
    for power, one in ((2, 1), (1, 1)):
        m = optim.gradient_multipliers(params, scales, power=power)
        expected = np.broadcast_to(np.abs(s) ** power, (3, 3, 4, 4)).copy()
        for o in range(4):
            for i in range(4):
                expected[1, 1, i, o] += np.abs(t[o]) ** power + one * (i == o)
        np.testing.assert_allclose(m["a"]["kernel"], expected, rtol=1e-6)
        np.testing.assert_array_equal(m["a"]["bias"], np.ones(4))


def test_multipliers_of_half_precision_parameters_are_squared_in_float32():
    scales = jax.tree.map(lambda v: v * 1e-3, scales_for(("a/kernel", (3, 3, 4, 4))))
    params = {"a": {"kernel": jnp.zeros((3, 3, 4, 4), jnp.float16)}}
    m = optim.gradient_multipliers(params, scales)["a"]["kernel"]
    assert m.dtype == jnp.float16
    np.testing.assert_allclose(np.asarray(m[0, 0], np.float32), 2e-6, rtol=0.05)  # (1e-3 * sqrt(2))^2


def test_a_vector_of_another_length_is_not_broadcast():
    scales = scales_for(("a/kernel", (3, 3, 4, 4)))
    (entry,) = scales.entries.values()
    short = Scales({"a/kernel": LayerScales(entry.branches, {**entry.vectors, "1x1": jnp.ones(1)})})
    with pytest.raises(
        ValueError, match=r"misshapen vectors: a/kernel/1x1 \(expected \(4,\), found \(1,\)\)"
    ):
        optim.repopt_mask(short).init({"a": {"kernel": jnp.zeros((3, 3, 4, 4))}})


def test_scales_that_do_not_fit_the_parameters_are_refused():
    scales = scales_for(("a/kernel", (3, 3, 4, 4)), ("b/kernel", (3, 3, 4, 4)))
    params = {"a": {"kernel": jnp.zeros((5, 5, 4, 4))}}
    with pytest.raises(ValueError, match=r"extra layers: b/kernel .*misshapen layers: a/kernel"):
        optim.repopt_mask(scales).init(params)


def test_nan_scales_are_refused():
    scales = jax.tree.map(lambda v: v.at[1].set(jnp.nan), scales_for(("a/kernel", (3, 3, 4, 4))))
    with pytest.raises(
        ValueError, match="NaN or infinite values: a/kernel/1x1, a/kernel/3x3, a/kernel/identity"
    ):
        optim.repopt_mask(scales)


def test_masked_and_partitioned_parameters_are_left_alone():
    params = {"a": {"kernel": jnp.ones((3, 3, 4, 4))}, "b": {"kernel": jnp.ones((3, 3, 4, 4))}}
    scales = scales_for(("a/kernel", (3, 3, 4, 4)), ("b/kernel", (3, 3, 4, 4)))
    tx = optax.masked(optim.repopt_mask(scales), {"a": True, "b": {"kernel": False}})
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(updates["b"]["kernel"], params["b"]["kernel"])
    expected = optim.gradient_multipliers(params, scales)["a"]["kernel"]
    np.testing.assert_allclose(updates["a"]["kernel"], expected, rtol=1e-6)
    labels = {"a": {"kernel": "repopt"}, "b": {"kernel": "plain"}}
    tx = optax.partition({"repopt": optim.repopt_sgd(0.1, scales), "plain": optax.sgd(0.1)}, labels)
    updates, _ = tx.update(params, tx.init(params), params)
    assert not np.allclose(updates["a"]["kernel"], updates["b"]["kernel"])


def test_state_holds_vectors_and_the_program_no_large_constant():
    params = {"a": {"kernel": jnp.zeros((3, 3, 256, 256))}}
    scales = scales_for(("a/kernel", (3, 3, 256, 256)))
    tx = optim.repopt_mask(scales)
    state = tx.init(params)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) == 3 * 256 * 4
    lowered = jax.jit(tx.update).lower(params, state)
    assert len(lowered.as_text()) < 100_000  # a stored multiplier would be 4.7 MB of text
    assert "tensor<3x3x256x256xf32>" in lowered.as_text()


def test_second_step_does_not_recompile_and_dtypes_stay():
    scales = scales_for(("a/kernel", (3, 3, 4, 4)))
    for dtype in (jnp.float32, jnp.bfloat16):
        params = {"a": {"kernel": jnp.ones((3, 3, 4, 4), dtype)}}
        tx = optim.repopt_sgd(0.1, scales, weight_decay=1e-4)
        step = jax.jit(tx.update)
        state = tx.init(params)
        updates, new = step(params, state, params)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), new) == jax.tree.map(
            lambda a: (a.shape, a.dtype), state
        )
        assert updates["a"]["kernel"].dtype == dtype
        step(params, new, params)
        assert step._cache_size() == 1


@pytest.mark.parametrize(
    "spec", [("x", None, None, None), (None, None, "x", None), (None, None, None, "x"), ()]
)
def test_leaves_may_be_sharded_along_any_axis(spec):
    """The same numbers, the sharding kept, and no communication: the multiplier is made where the shard
    is."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    shape = (4, 3, 8, 8)
    branches = BranchSet(shape, (Kernel((4, 3)), Kernel((2, 1))))
    rng = np.random.default_rng(0)
    vectors = {n: jnp.asarray(rng.normal(size=8).astype(np.float32)) for n in branches.names}
    scales = Scales({"k": LayerScales(branches, vectors)})
    tx = optim.repopt_mask(scales)
    g = {"k": jnp.asarray(rng.normal(size=shape).astype(np.float32))}
    expected, _ = tx.update(g, tx.init(g))
    sharding = jax.NamedSharding(mesh, jax.P(*spec))
    sharded = jax.device_put(g, sharding)
    step = jax.jit(tx.update, out_shardings=({"k": sharding}, None))
    state = jax.device_put(tx.init(g), jax.NamedSharding(mesh, jax.P()))
    found, _ = step(sharded, state)
    assert found["k"].sharding.is_equivalent_to(sharding, 4)
    np.testing.assert_allclose(found["k"], expected["k"], rtol=1e-6)  # fused multiply-add
    compiled = step.lower(sharded, state).compile().as_text()
    assert not any(
        word in compiled for word in ("all-gather", "all-reduce", "collective-permute", "all-to-all")
    )


def test_paths_in_the_state_are_those_of_the_scales():
    scales = scales_for(("a/kernel", (3, 3, 4, 4)))
    state = optim.repopt_mask(scales).init({"a": {"kernel": jnp.zeros((3, 3, 4, 4))}})
    names, _ = paths.named_leaves(state)
    assert list(names) == ["scales/a/kernel/1x1", "scales/a/kernel/3x3", "scales/a/kernel/identity"]
