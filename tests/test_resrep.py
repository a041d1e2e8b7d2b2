"""ResRep's optimizer: the rule against loops in float64, and the controller against a walk one by one."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tolerances import RESREP, RESREP_ACCUMULATED, RESREP_APART

from repopt_jax.optim import (
    get_masks,
    masks_are_due,
    resrep,
    resrep_masks,
    row_norms,
    scale_by_resrep,
    set_masks,
)

LAM, RATE, MOMENTUM, STEPS = 1e-2, 0.05, 0.9, 40
COMPACTORS = ("a/compactor/kernel", "b/compactor/kernel")
MASKS = {COMPACTORS[0]: [1, 0, 1, 0], COMPACTORS[1]: [0, 1, 1]}


def start(dtype=None):
    """Two compactors, one as a dense kernel and one as a 1x1, and another kernel."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    a = draw(4, 4).at[:, 2].set(0)  # a row of zeros
    return {
        "a": {"compactor": {"kernel": a}},
        "b": {"compactor": {"kernel": draw(1, 1, 3, 3)}},
        "c": draw(4, 2),
    }


def gradients(step):
    rng = np.random.default_rng(100 + step)
    return jax.tree.map(lambda p: rng.normal(size=p.shape), start())


def by_hand(q, mask, rate=RATE, momentum=MOMENTUM, strength=LAM, gradient=lambda step: None):
    """Row by row, in NumPy."""
    q, buffer = np.array(q, np.float64), np.zeros(q.shape)
    for step in range(STEPS):
        g = gradient(step)
        for row in range(q.shape[-1]):
            norm = np.sqrt((q[..., row] ** 2).sum())
            lasso = strength * q[..., row] / norm if norm > 0 else 0 * q[..., row]
            buffer[..., row] = momentum * buffer[..., row] + mask[row] * g[..., row] + lasso
        q = q - rate * buffer
    return q


def trained(tx, params=None, masks=None, grads=gradients):
    params = start() if params is None else params
    state = tx.init(params)
    if masks:
        state = set_masks(state, masks)

    @jax.jit
    def move(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for step in range(STEPS):
        params, state = move(params, state, grads(step))
    return params, state


def ready(**options):
    return resrep(optax.sgd(0.1, 0.9), COMPACTORS, RATE, strength=LAM, momentum=MOMENTUM, **options)


# -- the rule


def expected():
    kernels = {"a": start()["a"], "b": start()["b"]}
    return {
        name: by_hand(
            tree["compactor"]["kernel"],
            MASKS[f"{name}/compactor/kernel"],
            gradient=lambda step, name=name: gradients(step)[name]["compactor"]["kernel"],
        )
        for name, tree in kernels.items()
    }


def found(params):
    return {name: np.asarray(params[name]["compactor"]["kernel"]) for name in "ab"}


def test_compactors_move_as_in_loops_and_the_rest_as_by_the_inner_optimizer(x64):
    params, _ = trained(ready(), masks=MASKS)
    for name, q in expected().items():
        assert np.abs(found(params)[name] - q).max() < RESREP * np.abs(q).max()
    assert np.isfinite(found(params)["a"]).all()  # a row of zeros has the lasso gradient 0, not NaN
    inner, _ = trained(optax.sgd(0.1, 0.9), {"c": start()["c"]}, grads=lambda t: {"c": gradients(t)["c"]})
    np.testing.assert_allclose(params["c"], inner["c"], rtol=RESREP)


def test_mask_or_lasso_behind_the_momentum_is_another_training(x64):
    rule = scale_by_resrep(COMPACTORS, LAM)
    behind = optax.chain(optax.trace(MOMENTUM), rule, optax.scale_by_learning_rate(RATE))
    labels = functools.partial(
        jax.tree_util.tree_map_with_path, lambda path, _: "c" if path[0].key == "c" else "q"
    )
    tx = optax.partition({"q": behind, "c": optax.sgd(0.1)}, labels)
    params, _ = trained(tx, masks=MASKS)
    for name, q in expected().items():
        assert np.abs(found(params)[name] - q).max() > RESREP_APART


def test_masked_rows_go_on_by_their_momentum_and_the_lasso_alone(x64):
    """A masked row's own gradient counts for nothing, not even if it is NaN."""
    tx = scale_by_resrep(COMPACTORS, LAM)
    state = set_masks(tx.init(start()), MASKS)
    grads = gradients(0)
    grads["a"]["compactor"]["kernel"][:, 1] = np.nan
    updates, _ = tx.update(grads, state, start())
    q = np.asarray(start()["a"]["compactor"]["kernel"])
    u = updates["a"]["compactor"]["kernel"]
    np.testing.assert_allclose(u[:, 1], LAM * q[:, 1] / np.linalg.norm(q[:, 1]), rtol=1e-12)
    np.testing.assert_array_equal(u[:, 2], grads["a"]["compactor"]["kernel"][:, 2])
    np.testing.assert_array_equal(updates["c"], grads["c"])


def test_lasso_once_a_step_however_many_parts_a_batch_has(x64):
    """By `optax.MultiSteps`; the trainer accumulates before the optimizer, see test_train_prune."""
    parts = 4
    tx = optax.MultiSteps(ready(), parts)
    params = start()
    state = tx.init(params)
    update = jax.jit(tx.update)
    inner = set_masks(state.inner_opt_state, MASKS)
    state = state._replace(inner_opt_state=inner)
    for step in range(STEPS):
        for part in range(parts):
            grads = jax.tree.map(lambda g, part=part: g * (part + 1) * 4 / 10, gradients(step))
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
    for name, q in expected().items():
        assert np.abs(found(params)[name] - q).max() < RESREP_ACCUMULATED * np.abs(q).max()
    four_times = by_hand(
        start()["a"]["compactor"]["kernel"],
        MASKS[COMPACTORS[0]],
        strength=parts * LAM,
        gradient=lambda step: gradients(step)["a"]["compactor"]["kernel"],
    )
    assert np.abs(found(params)["a"] - four_times).max() > RESREP_APART


def test_rows_are_driven_to_zero_and_stay_finite():
    params = {"q": jnp.eye(4)}
    tx = resrep(optax.sgd(0.1), ["q"], optax.cosine_decay_schedule(0.1, STEPS * 10), strength=0.1)
    state = set_masks(tx.init(params), {"q": [0, 1, 0, 1]})
    update = jax.jit(tx.update)
    for _ in range(STEPS * 10):
        updates, state = update({"q": params["q"] * 0.02 - 0.15 * jnp.eye(4)}, state, params)
        params = optax.apply_updates(params, updates)
    norms = np.asarray(row_norms(params, ["q"])["q"])
    assert np.isfinite(norms).all()
    assert norms[[0, 2]].max() < 0.1 < norms[[1, 3]].min()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_updates_have_the_gradients_dtype(dtype):
    tx = scale_by_resrep(COMPACTORS)
    params = start(dtype)
    updates, state = tx.update(params, tx.init(params), params)
    assert all(u.dtype == dtype for u in jax.tree.leaves(updates))
    assert all(m.dtype == bool for m in state.masks.values())


def test_nnx_optimizer():
    from flax import nnx

    class Two(nnx.Module):
        def __init__(self):
            self.first = nnx.Param(jnp.eye(3))
            self.second = nnx.Param(jnp.ones((3, 2)))

    model = Two()
    optimizer = nnx.Optimizer(model, resrep(optax.sgd(0.1), ["first"], 0.1, momentum=0.0), wrt=nnx.Param)
    optimizer.opt_state = set_masks(optimizer.opt_state, {"first": [True, False, True]})

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: m.first[...].sum() + m.second[...].sum())(model)
        optimizer.update(model, grads)

    step(model, optimizer)
    masks = get_masks(optimizer.opt_state)
    np.testing.assert_array_equal(np.asarray(masks["first"][...]), [True, False, True])
    moved = np.asarray(model.first[...]) - np.eye(3)
    assert (moved[:, [0, 2]] < -0.05).all()
    np.testing.assert_allclose(moved[:, 1], [0, -0.1 * 1e-4, 0], rtol=1e-2, atol=1e-9)


def test_compactors_sharded_along_any_axis():
    """The masks lie whole on every device, before and after they are written anew."""
    mesh = Mesh(np.array(jax.devices()).reshape(4), ("x",), axis_types=(AxisType.Auto,))
    tx = scale_by_resrep(["q"], LAM)
    q = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)
    mask = {"q": np.arange(8) % 3 > 0}
    whole, _ = tx.update({"q": q}, set_masks(tx.init({"q": q}), mask), {"q": q})
    for spec in (PartitionSpec("x"), PartitionSpec(None, "x")):
        params = {"q": jax.device_put(q, NamedSharding(mesh, spec))}
        state = set_masks(tx.init(params), mask)
        assert state.masks["q"].sharding.is_fully_replicated
        updates, after = jax.jit(tx.update)(params, state, params)
        np.testing.assert_allclose(updates["q"], whole["q"], rtol=1e-6)
        np.testing.assert_array_equal(after.masks["q"], mask["q"])


def test_masks_are_saved_and_restored(tmp_path):
    from orbax.checkpoint import v1 as ocp

    state = set_masks(ready().init(start()), MASKS)
    ocp.save(str(tmp_path / "state"), state)
    loaded = ocp.load(str(tmp_path / "state"), ready().init(start()))
    chex.assert_trees_all_equal(get_masks(loaded), get_masks(state))


def test_errors_of_the_rule():
    tx = scale_by_resrep(COMPACTORS)
    with pytest.raises(ValueError, match="`compactors` is empty"):
        scale_by_resrep(())
    with pytest.raises(ValueError, match="`strength` is -1"):
        scale_by_resrep(COMPACTORS, -1)
    with pytest.raises(ValueError, match="`momentum` is 1"):
        resrep(optax.sgd(0.1), COMPACTORS, 0.1, momentum=1)
    with pytest.raises(ValueError, match="lack the compactors a/compactor/kernel, b/compactor/kernel"):
        tx.init({"c": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="are no kernels"):
        scale_by_resrep(["c"]).init({"c": jnp.ones(2)})
    with pytest.raises(ValueError, match="`params` is missing"):
        tx.update(start(), tx.init(start()))
    with pytest.raises(ValueError, match=r"gradients lack kernels .*: b/compactor/kernel"):
        tx.update({"a": start()["a"]}, tx.init(start()), {"a": start()["a"]})
    with pytest.raises(ValueError, match="has 0 states"):
        get_masks(optax.sgd(0.1).init(start()))
    # A mask that is not written would stay as it was: all or none.
    state = tx.init(start())
    with pytest.raises(ValueError, match="1 missing masks: b/compactor/kernel"):
        set_masks(state, {COMPACTORS[0]: [1, 1, 1, 1]})
    with pytest.raises(ValueError, match="1 misshapen masks"):
        set_masks(state, {**MASKS, COMPACTORS[1]: [1, 1]})


# -- the controller


def walked(norms, masks, cost, *, target, granularity, at_least):
    """As the paper describes it: one removal after the other, and the cost after each."""
    limit = target * cost({p: np.ones(len(n), bool) for p, n in norms.items()})
    removed = sum(int((~np.asarray(m, bool)).sum()) for m in masks.values())
    quota = removed + granularity if cost(masks) > limit else np.inf
    new, count = {p: np.ones(len(n), bool) for p, n in norms.items()}, 0
    for _, path, row in sorted((n, p, i) for p, ns in norms.items() for i, n in enumerate(ns)):
        if cost(new) <= limit or count >= quota:
            break
        if new[path].sum() <= at_least:
            continue
        new[path][row] = False
        count += 1
    return new


def chain_cost(masks):
    """Of a chain of layers: the product of neighbouring widths."""
    widths = [3, *(int(np.sum(masks[path])) for path in sorted(masks)), 5]
    return sum(a * b for a, b in itertools.pairwise(widths))


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    target=st.floats(0.01, 1),
    granularity=st.integers(1, 5),
    at_least=st.integers(1, 3),
)
def test_controller_against_a_walk(sizes, seed, target, granularity, at_least):
    rng = np.random.default_rng(seed)
    norms = {f"l{i}": rng.integers(0, 4, size) / 3 for i, size in enumerate(sizes)}  # with ties and zeros
    masks = {path: rng.random(len(n)) > 0.4 for path, n in norms.items()}
    options = {"target": target, "granularity": granularity, "at_least": at_least}
    new = resrep_masks(norms, masks, chain_cost, **options)
    chex.assert_trees_all_equal(new, walked(norms, masks, chain_cost, **options))
    assert new.keys() == norms.keys()
    assert all(mask.sum() >= min(at_least, mask.size) for mask in new.values())


FULL = {"a": np.ones(4, bool), "b": np.ones(4, bool)}


def test_quota_counts_removals_and_the_walk_passes_layers_at_their_minimum():
    """The first entries of the list are of a layer that has nothing to give: they use up no quota."""
    norms = {"a": np.array([0.1, 0.2, 0.3, 0.4]), "b": np.array([1.0, 2.0, 3.0, 4.0])}
    masks = {"a": np.array([False, False, True, True]), "b": FULL["b"]}
    new = resrep_masks(norms, masks, chain_cost, target=0.1, granularity=1, at_least=2)
    assert [int((~m).sum()) for m in new.values()] == [2, 1]
    new = resrep_masks(norms, new, chain_cost, target=0.1, granularity=1, at_least=2)
    assert [int((~m).sum()) for m in new.values()] == [2, 2]


def test_walk_stops_at_the_end_of_the_list():
    """A target that cannot be reached: every layer at its minimum, however large the quota."""
    norms = {"a": np.arange(4.0), "b": np.arange(4.0)}
    new = resrep_masks(norms, FULL, chain_cost, target=1e-6, granularity=1000, at_least=3)
    assert [int(m.sum()) for m in new.values()] == [3, 3]
    assert resrep_masks(norms, new, chain_cost, target=1e-6, granularity=1000, at_least=9)["a"].all()


def test_masks_of_all_layers_are_written_and_rows_return():
    """A layer whose rows have all returned has a mask of ones, not the one of before."""
    norms = {"a": np.array([5.0, 6.0, 7.0, 8.0]), "b": np.array([0.0, 0.1, 0.2, 4.0])}
    masks = {"a": np.array([False, False, True, True]), "b": FULL["b"]}
    new = resrep_masks(norms, masks, chain_cost, target=0.5, granularity=1)
    assert new["a"].all()
    np.testing.assert_array_equal(new["b"], [False, False, False, True])


def test_reached_target_may_move_without_a_quota():
    norms = {"a": np.arange(4.0), "b": np.arange(4.0) + 10}
    reached = {"a": FULL["a"], "b": np.array([True, False, False, False])}
    assert chain_cost(reached) <= 0.65 * chain_cost(FULL)
    new = resrep_masks(norms, reached, chain_cost, target=0.65, granularity=1)
    assert new["b"].all()
    assert chain_cost(new) <= 0.65 * chain_cost(FULL)


def test_target_one_masks_nothing_and_other_targets_are_refused():
    norms = {"a": np.zeros(4), "b": np.ones(4)}
    masks = {"a": np.array([False] * 3 + [True]), "b": FULL["b"]}
    chex.assert_trees_all_equal(resrep_masks(norms, masks, chain_cost, target=1.0), FULL)
    for target in (0, 1.2, float("nan")):
        with pytest.raises(ValueError, match=r"`target` is .*: it must be more than 0 and at most 1"):
            resrep_masks(norms, masks, chain_cost, target=target)
    with pytest.raises(ValueError, match=r"`granularity` is 0.*; `at_least` is 0"):
        resrep_masks(norms, masks, chain_cost, target=0.5, granularity=0, at_least=0)
    with pytest.raises(ValueError, match="rows of b are not finite"):
        resrep_masks({**norms, "b": np.full(4, np.nan)}, masks, chain_cost, target=0.5)
    with pytest.raises(ValueError, match="1 missing masks: b"):
        resrep_masks(norms, {"a": FULL["a"]}, chain_cost, target=0.5)


def test_when_masks_are_due():
    due = [step for step in range(1000) if masks_are_due(step, before=300, interval=200)]
    assert due == [500, 700, 900]
