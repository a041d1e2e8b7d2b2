"""The functional search model: what it is merged into, how it trains, and what it gives back.

The claims of exactness are made in float64 on a network of a 3x3 convolution with the identity, a grouped and
strided one with average pooling, and a dense layer. Its parameters are an `nnx.State`, so that an NNX search
model and `repopt_mask` can be trained beside it.
"""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from repopt_jax import (
    Average,
    BranchSet,
    Kernel,
    Scales,
    default_branches,
    extract_scales,
    load_scales,
    reinitialize,
    repopt_mask,
    save_scales,
)
from repopt_jax.core import paths
from repopt_jax.surgery.search import csla_twin
from repopt_jax.surgery.searchtree import SearchTree, search_tree

STEPS = 10
EXACT = 1e-12  # relative to a leaf's largest entry, float64, 10 steps; measured: 7e-16
APART = 1e-3  # what another training differs by at least, in the same measure; measured: 5e-2
PADS = ((1, 1), (1, 1))


class Net(nnx.Module):
    """(batch, 4, 4, 4) -> (batch, 6)"""

    def __init__(self, *, rngs):
        # Their kernels are drawn by what is tested.
        zeros: Any = {"kernel_init": nnx.initializers.zeros, "rngs": rngs, "param_dtype": jnp.float64}
        options: Any = zeros | {"padding": PADS}
        self.first = nnx.Conv(4, 4, (3, 3), **options)
        self.grouped = nnx.Conv(4, 6, (3, 3), feature_group_count=2, strides=2, **options)
        self.dense = nnx.Linear(6, 6, use_bias=False, **zeros)

    def __call__(self, x):
        x = jnp.tanh(self.first(x))
        x = jnp.tanh(self.grouped(x))
        return self.dense(x.mean((1, 2)))


BRANCHES = {
    "first/kernel": default_branches((3, 3, 4, 4)),
    "grouped/kernel": BranchSet((3, 3, 2, 6), (Kernel((3, 3)), Kernel((1, 3)), Average()), groups=2),
    "dense/kernel": default_branches((6, 6)),
}
DICTS = {
    "conv": {"kernel": jnp.zeros((3, 3, 2, 2)), "bias": jnp.arange(2.0)},
    "list": [jnp.ones(3), {"w": jnp.zeros((2, 5, 5))}],
    "nothing": None,
}
DICT_BRANCHES = {
    "conv/kernel": default_branches((3, 3, 2, 2)),
    "list/1/w": BranchSet((2, 5, 5), default_branches((5, 5)).branches, stacked=1),
}


def random_scales(branch_sets, dtype=jnp.float32):
    """Scales of both signs, away from 0."""
    rng = np.random.default_rng(1)

    def draw(v):
        return jnp.asarray(rng.choice([-1, 1], v.shape) * rng.uniform(0.5, 1.5, v.shape), dtype)

    return jax.tree.map(draw, Scales.ones(branch_sets).with_metadata(architecture="a network", step=3))


@pytest.fixture(scope="module")
def dict_scales():
    return random_scales(DICT_BRANCHES)


@pytest.fixture(scope="module")
def dict_tree(dict_scales):
    return search_tree(DICTS, dict_scales, rngs=nnx.Rngs(2))


@pytest.fixture
def model(x64):
    return Net(rngs=nnx.Rngs(0))


@pytest.fixture
def scales(x64):
    return random_scales(BRANCHES, jnp.float64)


def loss(graph, params):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 4, 4, 4)), rng.normal(size=(5, 6))
    return jnp.mean((nnx.merge(graph, params, copy=True)(jnp.asarray(x)) - y) ** 2)


def not_scales(tree):
    return paths.map_named(lambda path, _: "scales" not in path.split("/"), tree)


def sgd(*first, mask=None):
    return optax.chain(*first, optax.add_decayed_weights(1e-2, mask), optax.sgd(0.1, 0.9, nesterov=True))


def train(params, loss, tx):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    return params


def difference(found, expected):
    """The largest over the leaves, each relative to its largest entry."""
    found, expected = paths.named_leaves(found)[0], paths.named_leaves(expected)[0]
    assert found.keys() == expected.keys()
    return max(float(jnp.abs(found[p] - v).max() / jnp.abs(v).max()) for p, v in expected.items())


def test_constant_scales_train_as_repopt_mask(model, scales):
    graph, params = nnx.split(model, nnx.Param)
    plain_loss = functools.partial(loss, graph)
    tree = search_tree(params, scales, rngs=nnx.Rngs(1), trainable_scales=False)
    start = tree.merged()
    trained = train(tree, lambda tree: plain_loss(tree.merged()), sgd(mask=not_scales))

    assert difference(trained.merged(), train(start, plain_loss, sgd(repopt_mask(scales)))) <= EXACT
    assert difference(trained.merged(), train(start, plain_loss, sgd())) >= APART
    assert difference(trained.weights, tree.weights) >= APART
    assert difference(trained.scales, tree.scales) == 0


def test_a_search_trains_as_the_search_model_of_nnx(model, scales):
    """Whose layers merge themselves, from the same tensors, with trainable scales that are not decayed."""
    graph, params = nnx.split(model, nnx.Param)
    tree = search_tree(params, scales, rngs=nnx.Rngs(1))
    twin = csla_twin(model, scales, tree.weights, trainable_scales=True)
    twin_graph, twin = nnx.split(twin, nnx.Param)
    twin = train(twin, functools.partial(loss, twin_graph), sgd(mask=not_scales))
    expected = extract_scales(nnx.merge(twin_graph, twin, copy=True))

    trained = train(tree, lambda tree: loss(graph, tree.merged()), sgd(mask=not_scales))
    found = trained.extract_scales()
    assert found.branch_sets == expected.branch_sets
    assert difference(found.vectors, expected.vectors) <= EXACT
    assert difference(found.vectors, scales.vectors) >= APART

    all_decayed = train(tree, lambda tree: loss(graph, tree.merged()), sgd())
    assert difference(all_decayed.extract_scales().vectors, expected.vectors) >= APART


def test_merged_has_the_structure_given_and_the_draws_of_reinitialize(dict_tree, dict_scales):
    merged, fresh = dict_tree.merged(), reinitialize(DICTS, dict_scales, rngs=nnx.Rngs(2))
    assert jax.tree.structure(merged) == jax.tree.structure(DICTS)
    jax.tree.map(np.testing.assert_array_equal, merged, fresh)
    assert np.abs(merged["conv"]["kernel"]).max() > 0.1


def test_a_merged_kernel_by_hand(dict_tree):
    """3x3 + 1x1 + identity, entry by entry."""
    w, s = dict_tree.weights["conv/kernel"], dict_tree.scales["conv/kernel"]
    expected = np.zeros((3, 3, 2, 2))
    for i in range(2):
        for o in range(2):
            for a in range(3):
                for b in range(3):
                    expected[a, b, i, o] = s["3x3"][o] * w["3x3"][a, b, i, o]
            expected[1, 1, i, o] += s["1x1"][o] * w["1x1"][0, 0, i, o]
        expected[1, 1, i, i] += w["identity"][i]
    np.testing.assert_allclose(dict_tree.merged()["conv"]["kernel"], expected, rtol=1e-6, atol=1e-6)


def test_paths_of_the_leaves(dict_tree):
    named, _ = paths.named_leaves(dict_tree)
    assert set(named) == {
        "other_params/conv/bias",
        "other_params/list/0",
        "weights/conv/kernel/3x3",
        "weights/conv/kernel/1x1",
        "weights/conv/kernel/identity",
        "scales/conv/kernel/3x3",
        "scales/conv/kernel/1x1",
        "weights/list/1/w/dense",
        "weights/list/1/w/identity",
        "scales/list/1/w/dense",
    }


def test_extracted_scales_are_those_given_and_go_through_a_file(dict_tree, dict_scales, tmp_path):
    found = dict_tree.extract_scales()
    save_scales(tmp_path / "scales", found)
    for back in (found, load_scales(tmp_path / "scales", DICTS)):
        assert back.branch_sets == dict_scales.branch_sets
        assert back.metadata == dict_scales.metadata
        jax.tree.map(np.testing.assert_array_equal, back.vectors, dict_scales.vectors)


def test_what_is_decayed_by_name(dict_tree):
    """A step of pure decay: the identity's u shrinks with the weights, the scales of the others stay."""
    tx = optax.chain(optax.add_decayed_weights(0.5, mask=not_scales), optax.sgd(1.0))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, dict_tree), tx.init(dict_tree), dict_tree)
    after = optax.apply_updates(dict_tree, updates)
    assert isinstance(after, SearchTree)
    jax.tree.map(np.testing.assert_array_equal, after.scales, dict_tree.scales)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.5 * b), after.weights, dict_tree.weights)


def test_an_equinox_model_keeps_its_static_part():
    """Kernels (out, in, *spatial): the branch tensors have the axes of every other framework's."""
    model = eqx.nn.Sequential(
        [eqx.nn.Conv2d(2, 2, 3, padding=1, key=jax.random.key(0)), eqx.nn.Lambda(jnp.tanh)]
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)
    scales = random_scales({"layers/0/weight": default_branches((2, 2, 3, 3), layout="oi...")})
    tree = search_tree(params, scales, rngs=nnx.Rngs(2))
    grads = jax.grad(lambda t: eqx.combine(t.merged(), static)(jnp.ones((2, 4, 4))).sum())(tree)
    assert tree.weights["layers/0/weight"]["3x3"].shape == (3, 3, 2, 2)
    assert min(np.abs(g).max() for g in jax.tree.leaves(grads)) > 1e-3
    with pytest.raises(TypeError, match=r"arrays only, not layers/1/fn \(.*partition"):
        search_tree(model, scales, rngs=nnx.Rngs(2))


def test_the_dtype_is_that_of_the_kernel(dict_scales):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), DICTS)
    tree = search_tree(half, dict_scales, rngs=nnx.Rngs(2))
    assert {x.dtype for x in jax.tree.leaves((tree, tree.merged()))} == {jnp.dtype(jnp.bfloat16)}


def test_a_step_that_overwrites_the_tree_leaves_what_it_is_made_of():
    given = random_scales({"k": default_branches((5, 5))})
    params = {"k": jnp.zeros((5, 5)), "bias": jnp.zeros(5)}
    tree = search_tree(params, given, rngs=nnx.Rngs(2))
    jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)(tree)
    assert all(x.is_deleted() for x in jax.tree.leaves(tree))
    assert not any(v.is_deleted() for v in jax.tree.leaves((params, given)))


def test_mistakes(dict_scales):
    with pytest.raises(TypeError, match="an NNX model, whose search model is made by `to_search`"):
        search_tree(nnx.Linear(5, 5, rngs=nnx.Rngs(0)), dict_scales, rngs=nnx.Rngs(2))
    with pytest.raises(ValueError, match=r"extra layers: list/1/w"):
        search_tree({"conv": DICTS["conv"]}, dict_scales, rngs=nnx.Rngs(2))
    with pytest.raises(ValueError, match=r"NaN.*conv/kernel/3x3"):
        search_tree(DICTS, jax.tree.map(lambda v: v * jnp.nan, dict_scales), rngs=nnx.Rngs(2))
