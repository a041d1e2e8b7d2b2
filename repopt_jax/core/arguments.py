"""What public functions are given: refused at once, by the argument's name, if it is of the wrong kind."""

import math
import numbers
from typing import Any


def check_number(
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    more_than: float | None = None,
    at_most: float | None = None,
    less_than: float | None = None,
) -> None:
    """Checks a number that is known now; arrays, traced values, schedules and None are passed over.

    Raises:
      TypeError: `value` is text, a container or a Boolean.
      ValueError: it is NaN, infinite or out of its range.
    """
    if isinstance(value, (str, bytes, bool, list, tuple, dict)):
        raise TypeError(f"`{name}` is {value!r}: it must be a number")
    if not isinstance(value, numbers.Real):
        return
    bounds = {
        "at least": (at_least, lambda limit: value >= limit),
        "more than": (more_than, lambda limit: value > limit),
        "at most": (at_most, lambda limit: value <= limit),
        "less than": (less_than, lambda limit: value < limit),
    }
    given = {words: rule for words, rule in bounds.items() if rule[0] is not None}
    if not math.isfinite(value) or not all(holds(limit) for limit, holds in given.values()):
        range_of = " and ".join(f"{words} {limit}" for words, (limit, _) in given.items())
        raise ValueError(f"`{name}` is {value}: it must be a finite number{range_of and f', {range_of}'}")


def check_count(name: str, value: Any) -> None:
    """Checks a number of things, at least one.

    Raises:
      TypeError: `value` is no integer.
      ValueError: it is less than 1.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"`{name}` is {value!r}: it must be a whole number")
    if value < 1:
        raise ValueError(f"`{name}` is {value}: it must be at least 1")
