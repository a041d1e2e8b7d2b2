"""Which cases of a test are run every time, which by `pytest -m long`, and which `--cases` leaves."""

from collections import Counter
from collections.abc import Iterable, Sequence

import pytest


def often(cases: Iterable, *kept) -> list:
    """The cases for `pytest.mark.parametrize`, with the mark `long` on each one but the `kept` ones.

    `kept` are ids, or values where the cases have no ids (a tuple is the values of several arguments). They
    should have every kind of thing among them that the test is about: what the others add is more of the same
    kinds. Raises a KeyError for a name that no case has, so that renaming a case does not leave the ordinary
    run without it.
    """
    return _marked(cases, kept, lambda named: not named)


def seldom(cases: Iterable, *long) -> list:
    """The cases, with the mark `long` on these alone, whose kinds the others have; named as in `often`."""
    return _marked(cases, long, lambda named: named)


def _marked(cases, names, is_long):
    marked, found = [], set()
    for case in cases:
        if not isinstance(case, type(pytest.param())):
            case = pytest.param(*case) if isinstance(case, tuple) else pytest.param(case)
        values, marks, id = case
        name = id or (values[0] if len(values) == 1 else values)
        found.add(name)
        if is_long(name in names):
            case = pytest.param(*values, id=id, marks=[*marks, pytest.mark.long])
        marked.append(case)
    if missing := [name for name in names if name not in found]:
        raise KeyError(f"no case is called {', '.join(map(repr, missing))}")
    return marked


def first_cases(items: Sequence[pytest.Item], most: int) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Of each test the first `most` cases, and all the others."""
    first, further, seen = [], [], Counter()
    for item in items:
        name = item.nodeid.partition("[")[0]
        (first if seen[name] < most else further).append(item)
        seen[name] += 1
    return first, further
