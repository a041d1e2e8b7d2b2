"""Which cases run every time: a mistake here would leave tests out without a word."""

from types import SimpleNamespace

import pytest
import tiers


def test_all_but_the_kept_are_long():
    by_value = tiers.often(["a", 2, pytest.param("c", marks=pytest.mark.once)], "a")
    assert [case.values[0] for case in by_value] == ["a", 2, "c"]
    assert [[mark.name for mark in case.marks] for case in by_value] == [[], ["long"], ["once", "long"]]
    by_id = tiers.often([pytest.param(1, 2, id="one"), pytest.param(3, 4, id="three")], "three")
    assert [(case.id, [mark.name for mark in case.marks]) for case in by_id] == [
        ("one", ["long"]),
        ("three", []),
    ]
    pairs = tiers.often([("a", 1), ("b", 2)], ("b", 2))
    assert [(case.values, len(case.marks)) for case in pairs] == [(("a", 1), 1), (("b", 2), 0)]


def test_the_seldom_alone_are_long():
    cases = tiers.seldom(["a", pytest.param("b", marks=pytest.mark.once), "c"], "b")
    assert [[mark.name for mark in case.marks] for case in cases] == [[], ["once", "long"], []]


@pytest.mark.parametrize("choose", [tiers.often, tiers.seldom])
def test_a_case_that_is_not_there_is_said(choose):
    with pytest.raises(KeyError, match="no case is called 'depthwise'"):
        choose(["plain"], "plain", "depthwise")


def test_the_first_cases_of_each_test():
    ids = ["f::a[1]", "f::b", "f::a[2-[x]]", "f::C::a[1]", "f::a[3]", "g::a[1]", "f::C::a[2]"]
    first, further = tiers.first_cases([SimpleNamespace(nodeid=name) for name in ids], 2)
    assert [item.nodeid for item in first] == [name for name in ids if name != "f::a[3]"]
    assert [item.nodeid for item in further] == ["f::a[3]"]
