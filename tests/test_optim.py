"""The claim itself: 50 steps of the plain layer with `repopt_mask` and of its branches, in float64, end in
one kernel."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiers
from twins import LAYERS, MIXING, assert_close, jacobian, problem, relative

from repopt_jax.core import paths
from repopt_jax.core.branches import BranchSet, Identity, Kernel
from repopt_jax.core.published import default_branches
from repopt_jax.core.scales import LayerScales, Scales
from repopt_jax.optim import sgd as optim

EXACT = 1e-12  # relative, after 50 steps; measured: 3e-15 to 9e-15
WRONG = 1e-2  # what every wrong rule must exceed; measured: 0.02 (decay before the multiplier) to 1.2
DECAY = 1e-2  # large enough for a misplaced decay to show in 50 steps
CLIP = 0.3  # below the branches' gradient norm at most steps

nesterov = functools.partial(optax.sgd, 0.2, 0.9, nesterov=True)


def ordinary(*first):
    return optax.chain(*first, optax.add_decayed_weights(DECAY), nesterov())


@functools.cache
def twin(name):
    """The problem and the kernel that training the branches themselves gives: the oracle."""
    p = problem([name])
    return p, p.train_twin(ordinary())


# Their kinds are in "stacked, PyTorch layout", whose layers are grouped, and in "stacked averages".
SELDOM = ("3x3+1x1", "grouped", "stacked", "average pooling")


@pytest.mark.parametrize("name", tiers.seldom(LAYERS, *SELDOM))
def test_csla_and_repopt_mask_end_in_one_kernel(x64, name):
    p, expected = twin(name)
    start = {name: p.start()[name]["kernel"]}
    assert relative(start, expected) > 0.05  # it has moved
    assert_close(p.train(ordinary(optim.repopt_mask(p.scales))), expected, EXACT)


def test_sgd_without_momentum(x64):
    p = problem(["3x3+1x1+identity"])
    end = p.train_twin(optax.sgd(0.2))
    assert_close(p.train(optim.repopt_sgd(0.2, p.scales, momentum=None, nesterov=False)), end, EXACT)


def test_repopt_sgd_is_that_chain(x64):
    p, _ = twin("3x3+1x1+identity")
    made = p.train(optim.repopt_sgd(0.2, p.scales, weight_decay=DECAY))
    chain = p.train(ordinary(optim.repopt_mask(p.scales)))
    chex.assert_trees_all_equal(made, chain)


def test_clipping_in_the_norm_of_the_branches_keeps_the_equivalence(x64):
    """Several layers at once, a stack and average pooling included: one norm over everything that is
    trained."""
    p = problem(("3x3+1x1+identity", "PyTorch layout", "stacked", "average pooling", "stacked averages"))
    expected = p.train_twin(ordinary(optax.clip_by_global_norm(CLIP)))
    clip = optim.clip_by_repopt_global_norm(CLIP, p.scales)
    mask = optim.repopt_mask(p.scales)
    assert_close(p.train(ordinary(clip, mask)), expected, EXACT)
    assert relative(p.train(ordinary(mask)), expected) > WRONG  # it does clip
    assert relative(p.train(ordinary(optax.clip_by_global_norm(CLIP), mask)), expected) > WRONG
    assert relative(p.train(ordinary(mask, optax.clip_by_global_norm(CLIP))), expected) > WRONG


def test_the_norm_is_that_of_the_branches_gradient(x64):
    """Against the Jacobians of the merges, made entry by entry: |J^T g| of every layer, |g| of the rest."""
    p = problem(LAYERS)
    rng = np.random.default_rng(0)
    plain = {n: {"kernel": rng.normal(size=p.entry(n).branches.kernel)} for n in p.weights}
    squares = [
        np.sum((jacobian(p.entry(n).branches, p.entry(n).vectors).T @ plain[n]["kernel"].ravel()) ** 2)
        for n in p.weights
    ]
    plain |= {"other": np.arange(3.0)}
    expected = np.sqrt(sum(squares) + 5)
    found = jax.jit(optim.repopt_global_norm)(plain, p.scales)
    np.testing.assert_allclose(found, expected, rtol=EXACT)
    assert abs(optax.tree.norm(plain) / expected - 1) > 0.01  # measured: 0.015
    with pytest.raises(ValueError, match="do not fit"):
        optim.repopt_global_norm({"other": p.bias}, p.scales)


def without_identity(scales):
    ((path, entry),) = scales.entries.items()
    branches = tuple(b for b in entry.branches.branches if b.has_scale)
    reduced = BranchSet(entry.branches.kernel, branches, entry.branches.groups)
    vectors = {name: entry.vectors[name] for name in reduced.names}
    return ordinary(optim.repopt_mask(Scales({path: LayerScales(reduced, vectors)})))


def times(change):
    """A wrong multiplier: `change` of the right one."""

    def make(scales):
        ((path, entry),) = scales.entries.items()
        m = change(entry.branches.multiplier(entry.vectors, dtype=jnp.float64), entry)

        def update(updates, state, params=None):
            return paths.map_named(lambda p, g: g * m if p == path else g, updates), state

        return ordinary(optax.GradientTransformation(lambda params: optax.EmptyState(), update))

    return make


def decay_first(scales):
    return optax.chain(optax.add_decayed_weights(DECAY), optim.repopt_mask(scales), nesterov())


def squared_identity(m, entry):
    """u^2 instead of 1 on the diagonal: the reading of the paper that forgets that u is trained."""
    diagonal = Identity().support(entry.branches.kernel)
    return m + jnp.where(diagonal, entry.vectors["identity"] ** 2 - 1, 0)


def off_centre(m, entry):
    """The published code's fixed centre index 1 in a 5x5 kernel."""
    return jnp.roll(m, (-1, -1), (0, 1))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (decay_first, "3x3+1x1+identity"),
        (without_identity, "3x3+1x1+identity"),
        (without_identity, "depthwise"),
        (times(squared_identity), "3x3+1x1+identity"),
        (times(off_centre), "5x5"),
    ],
)
def test_wrong_rules_are_seen(x64, make, name):
    p, expected = twin(name)
    assert relative(p.train(make(p.scales)), expected) > WRONG


def test_mixing_layers_are_the_ones_without_a_multiplier():
    assert tuple(name for name, (branches, _) in LAYERS.items() if not branches.elementwise) == MIXING


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


def test_a_stack_is_multiplied_without_a_constant_or_a_buffer_of_its_size():
    """Kernels of eight stacked layers: the program holds no multiplier, and no room for one."""
    branches = default_branches((8, 3, 3, 64, 64), stacked=1)
    params = {"a": {"kernel": jnp.zeros(branches.kernel)}}
    tx = optim.repopt_mask(Scales.depth_rule({"a/kernel": branches}, {"a/kernel": range(8)}))
    lowered = jax.jit(tx.update).lower(params, tx.init(params))
    assert len(lowered.as_text()) < 100_000  # a stored multiplier would be 9 MB of text
    memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes < params["a"]["kernel"].nbytes / 100


def test_second_step_does_not_recompile_and_dtypes_stay():
    scales = scales_for(("a/kernel", (3, 3, 4, 4)))
    for dtype in (jnp.float32, jnp.bfloat16):
        params = {"a": {"kernel": jnp.ones((3, 3, 4, 4), dtype)}}
        tx = optim.repopt_sgd(0.1, scales, weight_decay=1e-4)
        step = jax.jit(tx.update)
        state = tx.init(params)
        updates, new = step(params, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
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
