"""What public functions are given: refused at once, by the argument's name, if it is of the wrong kind."""

import math
import numbers
import operator
import os
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable


def check_number(
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    more_than: float | None = None,
    at_most: float | None = None,
    less_than: float | None = None,
    optional: bool = False,
) -> None:
    """Checks a number that is known now; arrays, traced values and schedules are passed over, and so is None
    if the number is `optional`.

    Raises:
      TypeError: `value` is text, a container or a Boolean.
      ValueError: it is NaN, infinite or out of its range.
    """
    if isinstance(value, (str, bytes, bool, list, tuple, dict)) or (value is None and not optional):
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


def check_count(name: str, value: Any, *, at_least: int = 1) -> None:
    """Checks a number of things.

    Raises:
      TypeError: `value` is no integer.
      ValueError: it is less than `at_least`.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"`{name}` is {value!r}: it must be a whole number")
    if value < at_least:
        raise ValueError(f"`{name}` is {value}: it must be at least {at_least}")


def whole_number(name: str, value: Any) -> int:
    """Returns an integer of any library as one of Python, so that it can be compared and written to files.

    Raises:
      TypeError: `value` is no integer.
    """
    try:
        return int(operator.index(value))
    except TypeError:
        raise TypeError(f"`{name}` is {value!r}: it must be a whole number") from None


def whole_numbers(name: str, values: Any, *, one_for: str) -> tuple[int, ...]:
    """Returns integers of any library, in any sequence, as a tuple of integers of Python.

    Args:
      name: of the argument.
      values: what was given.
      one_for: what each stands for, in words: "each axis".

    Raises:
      TypeError: `values` is no sequence of integers.
    """
    try:
        return tuple(int(operator.index(value)) for value in values)
    except TypeError:
        raise TypeError(
            f"`{name}` is {values!r}: it must hold whole numbers, one for {one_for}, such as (3, 3)"
        ) from None


def check_kind(name: str, value: Any, kind: Any, what: str, *, remedy: str = "") -> None:
    """Checks what an argument is.

    Args:
      name: of the argument.
      value: what was given.
      kind: the class or classes that it may be of, as `isinstance` takes them.
      what: these in words, "an NNX model".
      remedy: what to do, of a path that was given in place of what is in the file.

    Raises:
      TypeError: it is something else.
    """
    if isinstance(value, kind):
        return
    text = isinstance(value, (str, os.PathLike))
    shown = repr(value) if text else f"of type {type(value).__name__}"
    raise TypeError(f"`{name}` is {shown}: it must be {what}{f' ({remedy})' if text and remedy else ''}")


def is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of the type that a dataclass declares for a field; True and False are no numbers."""
    if kind is Any:
        return True
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return any(is_of(value, one) for one in typing.get_args(kind))
    origin, inside = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is tuple and inside[1:] == (...,):
        return isinstance(value, tuple) and all(is_of(entry, inside[0]) for entry in value)
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(inside) and all(map(is_of, value, inside))
    if origin is dict:
        return isinstance(value, dict) and all(is_of(entry, inside[1]) for entry in value.values())
    if kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, origin)


def is_finite(value: Any) -> bool:
    """Whether a value, each entry of a tuple, is no infinite number and no NaN."""
    entries = value if isinstance(value, tuple) else (value,)
    return all(not isinstance(entry, numbers.Real) or math.isfinite(entry) for entry in entries)


def must_be(kind: Any, *, length: int | None = None) -> str:
    """What a value is to be for `is_of`, without None: what follows "must", of a tuple with its `length`."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    kind = next(one for one in kinds if one is not type(None))
    if typing.get_origin(kind) is tuple:
        entries = {int: "whole numbers", float: "finite numbers", str: "texts"}
        what = entries.get(typing.get_args(kind)[0], "lists")
        return " ".join(filter(None, ("hold", str(length or ""), what)))
    names = {int: "a whole number", float: "a finite number", bool: "True or False", str: "text"}
    if typing.get_origin(kind) is dict and is_of(0, entry := typing.get_args(kind)[1]) and entry is not Any:
        return "be an object of numbers"
    return f"be {names.get(kind, 'an object of fields')}"


def check_path(name: str, value: Any) -> None:
    """Checks the path of a file or a folder.

    Raises:
      TypeError: `value` is no text and no path.
    """
    check_kind(name, value, (str, os.PathLike), "a path")


def check_items(name: str, value: Any, what: str) -> None:
    """Checks several things, in a list or whatever can be iterated over.

    Raises:
      TypeError: `value` is a single text or path, a mapping, or nothing to iterate over.
    """
    single = isinstance(value, (str, bytes, os.PathLike, Mapping)) or not isinstance(value, Iterable)
    check_kind(name, value, () if single else object, f"{what}, in a list")


@runtime_checkable
class HasShape(Protocol):
    """An array, or what stands for one."""

    @property
    def shape(self) -> Any:
        """Its sizes."""


def check_array(name: str, value: Any) -> None:
    """Checks an array, of any library.

    Raises:
      TypeError: `value` has no shape.
    """
    check_kind(name, value, HasShape, "an array")


@runtime_checkable
class Transforms(Protocol):
    """A transformation of Optax, or what can be used as one, such as `optax.MultiSteps`."""

    @property
    def init(self) -> Any:
        """Makes the state."""

    @property
    def update(self) -> Any:
        """Transforms updates."""


def check_transformation(name: str, value: Any) -> None:
    """Checks a transformation of Optax.

    Raises:
      TypeError: `value` has no `init` and `update`.
    """
    check_kind(name, value, Transforms, "an Optax transformation")
