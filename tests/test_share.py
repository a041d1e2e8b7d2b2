"""Environments that share the tests run all of them together; see `dealt` in conftest.py."""

import conftest
import pytest


def test_shares_are_the_whole(request):
    items = request.session.items
    shares = [conftest.dealt(items, share, 3) for share in range(3)]
    assert set().union(*shares) == set(items)
    several = [item for item in items if sum(item in share for share in shares) > 1]
    assert all(item.get_closest_marker("torch") for item in several)


@pytest.mark.parametrize("case", range(6))
def test_cases_are_dealt_evenly(request, case):
    mine = [item for item in request.session.items if item.originalname == request.node.originalname]
    counts = [len(conftest.dealt(mine, share, 2)) for share in range(2)]
    assert counts[0] + counts[1] == len(mine)
    assert abs(counts[0] - counts[1]) <= 1


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b"])
def test_what_is_no_share(text):
    with pytest.raises(Exception, match=r"invalid|share|unpack"):
        conftest.share_of(text)
