"""Any optimizer on the branches, kept in the state, while the network computes with merged kernels: 50 steps,
float64."""

import functools
import os

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiers
from hypothesis import strategies as st
from optax import contrib
from test_branches import branch_sets, draw_scales
from twins import LIGHT, assert_close, jacobian, problem, relative, slow_merge

from repopt_jax.core.branches import AfterPointwise, Average, BranchSet, Identity, Kernel
from repopt_jax.core.parametrization import other_kernels
from repopt_jax.core.published import default_branches
from repopt_jax.core.scales import LayerScales, Scales
from repopt_jax.optim import sgd as optim
from repopt_jax.optim.reparameterize import reparameterize

EXACT = 1e-10  # relative, after 50 steps; measured: 7e-16 to 3e-15
WRONG = 1e-2  # measured: 0.06 (the Kronecker rule behind `repopt_mask`) to 1.1


def kronecker(rate):
    """A Shampoo-like rule: the gradient as a matrix (rest, out), whitened from both sides by running
    moments."""

    def inverse_root(moment):
        values, vectors = jnp.linalg.eigh(moment + 1e-3 * jnp.eye(len(moment), dtype=moment.dtype))
        return (vectors * values.reshape(1, -1) ** -0.25) @ vectors.T

    def init(params):
        def zeros(p):
            rest, out = (p.size // p.shape[-1], p.shape[-1]) if p.ndim > 1 else (p.size, 1)
            return jnp.zeros((rest, rest), p.dtype), jnp.zeros((out, out), p.dtype)

        return jax.tree.map(zeros, params)

    def update(updates, state, params=None):
        def step(g, moments):
            matrix = g.reshape(len(moments[0]), len(moments[1]))
            left, right = moments[0] + matrix @ matrix.T, moments[1] + matrix.T @ matrix
            return (inverse_root(left) @ matrix @ inverse_root(right)).reshape(g.shape), (left, right)

        leaves, treedef = jax.tree.flatten(updates)
        moved = [step(g, m) for g, m in zip(leaves, treedef.flatten_up_to(state))]
        return treedef.unflatten([u for u, _ in moved]), treedef.unflatten([m for _, m in moved])

    return optax.chain(optax.GradientTransformation(init, update), optax.scale_by_learning_rate(rate))


INNER = {
    "nesterov": lambda: optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.2, 0.9, nesterov=True)),
    "adam": lambda: optax.adam(1e-2),
    "adamw, clipped": lambda: optax.chain(
        optax.clip_by_global_norm(0.3), optax.adamw(1e-2, weight_decay=0.1)
    ),
    "lion": lambda: optax.lion(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2, weight_decay_rate=1e-3),
    "lamb": lambda: optax.lamb(1e-2, weight_decay=0.1),
    "muon": lambda: contrib.muon(1e-2),
    "kronecker": lambda: kronecker(1e-2),
}


@functools.cache
def everything():
    return problem(LIGHT)


@functools.cache
def expected(name):
    return everything().train_twin(INNER[name]())


# One that is linear in the gradient, one that is not and looks at all of it, one that looks at each weight.
OFTEN = ("nesterov", "adamw, clipped", "lamb")


@pytest.mark.parametrize("name", tiers.often(INNER, *OFTEN))
def test_every_layer_ends_as_its_branches_do(x64, name):
    p = everything()
    assert relative({n: p.start()[n]["kernel"] for n in p.weights}, expected(name)) > 0.05
    found = p.train(reparameterize(INNER[name](), p.scales, weights=p.path_weights()))
    assert_close(found, expected(name), EXACT)


@pytest.mark.parametrize(
    "name",
    tiers.often(("adam", "adamw, clipped", "lion", "adafactor", "muon", "kronecker"), "adamw, clipped"),
)
def test_the_mask_alone_is_not_enough(x64, name):
    """The same optimizers behind `repopt_mask`: another training."""
    p = everything()
    found = p.train(optax.chain(optim.repopt_mask(p.scales), INNER[name]()))
    assert relative(found, expected(name)) > WRONG


def test_least_norm_branches_serve_where_weights_are_not_looked_at(x64):
    p = everything()
    assert_close(p.train(reparameterize(INNER["adam"](), p.scales)), expected("adam"), EXACT)
    # Decay shrinks every branch alike, whichever branches they are.
    name = "adamw, clipped"
    assert_close(p.train(reparameterize(INNER[name](), p.scales)), expected(name), EXACT)
    # LAMB's ratio is between the norms of a tensor and its update.
    assert relative(p.train(reparameterize(INNER["lamb"](), p.scales)), expected("lamb")) > WRONG


@hypothesis.settings(max_examples=int(os.environ.get("REPOPT_EXAMPLES", "4")))
@hypothesis.given(branch_sets(), st.integers(0, 1000))
@jax.enable_x64(True)
def test_split_is_the_least_norm_inverse_of_merge(branches, seed):
    """Against NumPy's least squares on the Jacobian of the merge, which has the least norm by
    construction."""
    scales = draw_scales(branches, seed)
    matrix = jacobian(branches, scales)
    kernel = matrix @ np.random.default_rng(seed).normal(size=matrix.shape[1])
    found = jax.jit(branches.split)(kernel.reshape(branches.kernel), scales)
    least, *_ = np.linalg.lstsq(matrix, kernel, rcond=1e-13)
    flat = np.concatenate([np.asarray(found[n]).ravel() for n in branches.names])
    np.testing.assert_allclose(flat, least, rtol=1e-7, atol=1e-7 * np.abs(least).max())


@pytest.mark.parametrize(
    "branches",
    [
        BranchSet((3, 3, 2, 3), (Average(),)),
        BranchSet((3, 3, 2, 3), (Average(), Kernel((1, 1)))),
        BranchSet((3, 3, 3, 3), (AfterPointwise((3, 3), np.arange(1.0, 4).reshape(3, 1)), Identity())),
        BranchSet((3, 3, 2, 3), (Kernel((3, 3)), Average())),
    ],
    ids=lambda b: "+".join(b.names),
)
def test_split_of_a_kernel_that_the_branches_cannot_express(x64, branches):
    """The nearest that they can, by least squares; and training goes on from there without bursting."""
    scales = {n: s.at[0].set(0.0) for n, s in draw_scales(branches).items()}
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=branches.kernel))
    found = jax.jit(branches.split)(kernel, scales)
    least, *_ = np.linalg.lstsq(jacobian(branches, scales), np.asarray(kernel).ravel(), rcond=1e-12)
    flat = np.concatenate([np.asarray(found[n]).ravel() for n in branches.names])
    np.testing.assert_allclose(flat, least, rtol=1e-6, atol=1e-6)
    tx = reparameterize(optax.adamw(1e-3, weight_decay=0.1), Scales({"k": LayerScales(branches, scales)}))
    updates, _ = tx.update({"k": kernel}, tx.init({"k": kernel}), {"k": kernel})
    assert np.abs(updates["k"]).max() < 0.05


def test_rules_that_ignore_the_weights_need_not_keep_them(x64):
    p = problem(["average pooling"])
    kept = reparameterize(optax.scale_by_adam(), p.scales)
    light = reparameterize(optax.scale_by_adam(), p.scales, keep_weights=False)
    start = p.start()
    state, other = light.init(start), kept.init(start)
    assert state.weights == {}
    gradients = jax.tree.map(jnp.sin, start)
    for _ in range(2):
        updates, state = light.update(gradients, state, start)
        expected, other = kept.update(gradients, other, start)
    chex.assert_trees_all_equal(updates, expected)
    with pytest.raises(ValueError, match="`weights` are given and `keep_weights` is False"):
        reparameterize(optax.sgd(0.1), p.scales, weights=p.path_weights(), keep_weights=False)


def test_split_where_all_scales_are_zero(x64):
    branches = default_branches((3, 3, 2, 3))
    scales = {"3x3": jnp.array([0.0, 1.0, -2.0]), "1x1": jnp.array([0.0, 0.0, 1.0])}
    kernel = jnp.ones((3, 3, 2, 3))
    merged = branches.merge(branches.split(kernel, scales), scales)
    np.testing.assert_allclose(
        merged, jnp.where(jnp.arange(3).reshape(1, 1, 1, 3) == 0, 0, kernel), atol=1e-15
    )


def test_reinitialize_gives_the_branches_that_it_merged():
    from flax import nnx

    from repopt_jax.surgery import reinitialize

    params = {"conv": {"kernel": jnp.zeros((3, 3, 4, 4)), "bias": jnp.zeros(4)}}
    scales = Scales.depth_rule({"conv/kernel": default_branches((3, 3, 4, 4))}, {"conv/kernel": 2})
    fresh, weights = reinitialize(params, scales, rngs=nnx.Rngs(0), return_weights=True)
    state = reparameterize(optax.lamb(1e-3), scales, weights=weights).init(fresh)
    chex.assert_trees_all_equal(state.weights, weights)
    chex.assert_trees_all_equal(reinitialize(params, scales, rngs=nnx.Rngs(0)), fresh)
    other = reinitialize(params, scales, rngs=nnx.Rngs(1))
    with pytest.raises(
        ValueError, match=r"`weights` merge into other kernels .* at conv/kernel: give the weights"
    ):
        reparameterize(optax.lamb(1e-3), scales, weights=weights).init(other)
    short = {"conv/kernel": {n: w for n, w in weights["conv/kernel"].items() if n != "1x1"}}
    with pytest.raises(ValueError, match=r"1 missing branch tensors: conv/kernel/1x1"):
        reparameterize(optax.lamb(1e-3), scales, weights=short).init(fresh)
    with pytest.raises(ValueError, match="extra layers: conv/kernel"):
        reparameterize(optax.sgd(0.1), scales).init({"dense": jnp.ones((2, 2))})


def test_inner_sees_branches_by_path_and_extra_arguments():
    seen = {}

    def update(updates, state, params=None, *, value, **extra):
        seen["updates"], seen["params"], seen["value"] = updates, params, value
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    params = {"a": {"kernel": jnp.ones((3, 3, 2, 2)), "bias": jnp.ones(2)}}
    tx = reparameterize(inner, Scales.ones({"a/kernel": default_branches((3, 3, 2, 2))}))
    tx.update(params, tx.init(params), params, value=3.0)
    assert seen["value"] == 3.0
    for tree in (seen["updates"], seen["params"]):
        assert sorted(tree["a"]["kernel"]) == ["1x1", "3x3", "identity"]
        assert tree["a"]["bias"].shape == (2,)


@hypothesis.given(branch_sets(), st.sampled_from(["sgd", "adam", "lion"]), st.integers(0, 1000))
@jax.enable_x64(True)
def test_two_steps_of_any_branch_set(branches, rule, seed):
    """Two steps of our rule, of `reparameterize` and of the branches themselves, for branch sets drawn at
    random."""
    from repopt_jax.optim.adaptive import repopt_adamw, repopt_lion

    rng = np.random.default_rng(seed)
    vectors = draw_scales(branches, seed)
    scales = Scales({"kernel": LayerScales(branches, vectors)})
    weights = {n: jnp.asarray(rng.normal(size=s)) for n, s in branches.shapes().items()}
    ordinary = {
        "sgd": lambda: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, 0.9, nesterov=True)),
        "adam": lambda: optax.adamw(0.1, eps=1e-3, weight_decay=0.1),
        "lion": lambda: optax.lion(0.1, weight_decay=0.1),
    }[rule]
    ours = {
        "sgd": lambda: optim.repopt_sgd(0.1, scales, weight_decay=0.1),
        "adam": lambda: repopt_adamw(0.1, scales, eps=1e-3, weight_decay=0.1),
        "lion": lambda: repopt_lion(0.1, scales, weight_decay=0.1),
    }[rule]
    flat = np.concatenate([np.ravel(weights[n]) for n in branches.names])
    start = {"kernel": jnp.asarray((jacobian(branches, vectors) @ flat).reshape(branches.kernel))}
    target = jnp.asarray(rng.normal(size=branches.kernel))

    def loss(params):
        return jnp.sum(jnp.tanh(params["kernel"] - target) ** 2)

    def twin_loss(w):
        return loss({"kernel": slow_merge(branches, w, vectors)})

    def two_steps(tx, params, loss):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
        return params

    @jax.jit
    def ends(weights, start):
        """Of the branches themselves; of our rule and of `reparameterize`."""
        given = reparameterize(ordinary(), scales, weights={"kernel": weights})
        end = slow_merge(branches, two_steps(ordinary(), weights, twin_loss), vectors)
        return {"kernel": end}, [two_steps(tx, start, loss) for tx in (ours(), given)]

    expected, found = ends(weights, start)
    for each in found:
        assert_close(each, expected, EXACT)


def test_a_fixed_pointwise_convolution_is_checked_and_stored():
    c = np.random.default_rng(0).normal(size=(2, 3, 4))
    branches = BranchSet((3, 3, 3, 6), (Kernel((3, 3)), AfterPointwise((1, 3), c)), groups=2)
    assert branches.shapes()["fixed_1x3"] == (1, 3, 4, 6)
    assert BranchSet.from_json(branches.to_json()) == branches
    with pytest.raises(
        ValueError, match=r"fixed_3x3 does not fit .* must have 5 input channels in 1 or 1 groups"
    ):
        BranchSet((3, 3, 5, 6), (AfterPointwise((3, 3), c[0]),))
    with pytest.raises(ValueError, match="`matrix` has shape"):
        AfterPointwise((3, 3), [1.0, 2.0])
    with pytest.raises(ValueError, match="`matrix` has shape"):
        AfterPointwise((3, 3), [[np.nan]])
    assert BranchSet((3, 3, 3, 3), (Average(), Identity())).elementwise is False


def test_kernels_are_compared_where_they_have_values():
    """Not those of a program that is being traced, also where its arrays are constants."""
    x, y = jnp.full((3, 3, 2, 2), 1e4), jnp.full((3, 3, 2, 2), 1 - 1e4)
    merges = dict.fromkeys(("right", "cancelled", "wrong"), (jnp.add, (x, y)))
    ones = jnp.ones_like(x)
    # Terms of 1e4 that cancel are rounded by their own size.
    leaves = {"right": ones, "cancelled": ones + 1e-3, "wrong": ones + 1e-1}
    assert other_kernels(merges, leaves, 1e-6) == ["wrong"]
    assert other_kernels(merges, jax.eval_shape(lambda: leaves), 1e-6) == []
    found = []
    jax.jit(lambda: found.append(other_kernels(merges, leaves, 1e-6)))()
    assert found == [[]]
