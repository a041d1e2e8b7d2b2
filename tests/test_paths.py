"""Leaves by name: one path for one parameter, whatever holds it."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from repopt_jax.core import paths


class Small(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.stages = nnx.List([nnx.List([nnx.Conv(1, 2, (3,), rngs=rngs)]), nnx.List([])])
        self.named = nnx.Dict({"3x3": nnx.Param(jnp.ones(2))})


class EquinoxSmall(eqx.Module):
    layers: list[eqx.nn.Linear]


NAMES = ["named/3x3", "stages/0/0/bias", "stages/0/0/kernel"]


def test_module_state_and_plain_dict_have_the_same_names():
    model = Small(rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    for tree in (model, state, nnx.to_pure_dict(state)):
        named, _ = paths.named_leaves(tree)
        assert sorted(named) == NAMES
        assert named["stages/0/0/kernel"].shape == (3, 1, 2)


def test_nnx_optimizer_and_gradients_have_the_same_names():
    """`nnx.Optimizer` hands a transformation trees of other leaf types than `nnx.state`."""
    seen = []

    def record(tree):
        seen.append(sorted(paths.named_leaves(tree)[0]))
        return optax.EmptyState()

    tx = optax.GradientTransformation(record, lambda g, s, p=None: (g, record(g)))
    model = Small(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda m: m.stages[0][0](jnp.ones((1, 4, 1))).sum() + m.named["3x3"].sum())(model)
    optimizer.update(model, grads)
    assert seen == [NAMES, NAMES]


def test_equinox_modules_and_sequences():
    model = EquinoxSmall([eqx.nn.Linear(2, 3, key=jax.random.key(0))])
    assert sorted(paths.named_leaves(model)[0]) == ["layers/0/bias", "layers/0/weight"]
    assert sorted(paths.named_leaves({"a": (1, [2, {"b": 3}])})[0]) == ["a/0", "a/1/0", "a/1/1/b"]


def test_the_treedef_rebuilds_the_tree():
    tree = {"b": [1, 2], "a": {"c": 3}}
    named, treedef = paths.named_leaves(tree)
    assert list(named.items()) == [("a/c", 3), ("b/0", 1), ("b/1", 2)]
    assert jax.tree.unflatten(treedef, named.values()) == tree


def test_masked_nodes_can_be_seen():
    tree = {"a": optax.MaskedNode(), "b": 1}
    assert list(paths.named_leaves(tree)[0]) == ["b"]
    named, _ = paths.named_leaves(tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    assert list(named) == ["a", "b"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Attention:
    query: jax.Array
    key: jax.Array
    value: jax.Array


class Holder(nnx.Module):
    def __init__(self):
        self.value = nnx.Param(jnp.ones(2))
        self.raw = nnx.data(Attention(*(jnp.full(1, n) for n in range(3))))


def test_a_field_called_value_keeps_its_name():
    """An NNX variable and a box of Linen have one leaf, of that name, which adds nothing to theirs."""
    attention = Attention(jnp.zeros(1), jnp.zeros(2), jnp.zeros(3))
    names = ["attn/query", "attn/key", "attn/value"]
    named, _ = paths.named_leaves({"attn": attention})
    assert list(named) == names
    assert named["attn/value"].shape == (3,)
    assert jax.tree.leaves(paths.map_named(lambda path, x: path, {"attn": attention})) == names
    assert list(paths.named_leaves(attention)[0]) == ["query", "key", "value"]
    boxed = {"a": nn.Partitioned(jnp.ones(2), names=("x",)), "b": nnx.Param(jnp.ones(2)), "c": attention}
    assert list(paths.named_leaves(boxed)[0]) == ["a", "b", "c/query", "c/key", "c/value"]
    assert list(paths.named_leaves(nnx.Param(jnp.ones(2)))[0]) == [""]
    model = Holder()
    for tree in (model, nnx.state(model)):
        named, _ = paths.named_leaves(tree)
        assert [name for name in named if name.endswith("value")] == ["raw/value", "value"]


def test_values_above_others_are_refused():
    with pytest.raises(ValueError, match="others below it: a/b below a, c/d/e below c/d; rename one of each"):
        paths.nested({"a": 1, "a/b": 2, "ab": 3, "c/d/e": 4, "c/d": 5})
    assert paths.nested({"a/b": 2, "ab": 3}) == {"a": {"b": 2}, "ab": 3}


def test_a_name_that_two_leaves_share_is_refused():
    with pytest.raises(ValueError, match="several leaves named a/b: paths must be unique"):
        paths.named_leaves({"a/b": 1, "a": {"b": 2}, "c": 3})


def test_map_named_gives_the_path_and_keeps_the_structure():
    tree = {"a": jnp.ones(2), "b": [jnp.zeros(3)]}
    mapped = paths.map_named(lambda path, x, y: (path, x.shape, y), tree, {"a": 5, "b": [6]})
    assert mapped == {"a": ("a", (2,), 5), "b": [("b/0", (3,), 6)]}


def test_map_named_keeps_an_nnx_state():
    state = nnx.state(Small(rngs=nnx.Rngs(0)))
    doubled = paths.map_named(lambda path, x: 2 * x if path == "named/3x3" else x, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    np.testing.assert_array_equal(doubled["named"]["3x3"][...], [2, 2])


def test_the_first_rule_that_matches_the_whole_name_decides():
    rules = [("a/.*", 1), (".*/bias", 2), ("b/kernel", 3)]
    assert paths.match_rules(rules, ["a/bias", "b/bias", "b/kernel"]) == {
        "a/bias": 1,
        "b/bias": 2,
        "b/kernel": 3,
    }


def test_names_that_no_rule_matches_are_all_listed():
    with pytest.raises(ValueError, match=r"matches b/kernel2, c; every name must be covered by .*'b/kernel'"):
        paths.match_rules([("b/kernel", 3)], ["b/kernel", "b/kernel2", "c"])


def test_describe_difference_lists_everything():
    expected = {"a": (1,), "b": (2,), "c": (3,), "d": (4,)}
    found = {"b": (2,), "c": (5,), "x": (6,), "y": (7,)}
    assert paths.describe_difference(expected, found, noun="layers") == (
        "2 missing layers: a (1,), d (4,); 2 extra layers: x (6,), y (7,); "
        "1 misshapen layers: c (expected (3,), found (5,))"
    )
    assert paths.describe_difference(found, found) == ""


def test_names_without_values_leave_no_blanks():
    assert paths.describe_difference({"a": "", "b": ""}, {"c": ""}) == (
        "2 missing entries: a, b; 1 extra entries: c"
    )


def test_natural_order_counts_in_every_part_and_puts_parents_first():
    names = [
        "conv10",
        "conv2/kernel",
        "conv2",
        "a/10",
        "a/9/b",
        "a/9",
        "a",
        "",
        "1x1",
        "stage2.10",
        "stage2.9",
    ]
    assert sorted(names, key=paths.natural_order) == [
        *("", "1x1", "a", "a/9", "a/9/b", "a/10", "conv2", "conv2/kernel", "conv10", "stage2.9", "stage2.10")
    ]
