"""Pytrees by name: every leaf has one path, `stages/1/0/conv/kernel`, whatever built the tree.

The same path is found in a plain dict, an `nnx.State`, an NNX module, a Linen variable dict and an Equinox
module, so that scales, weight-decay rules, checkpoints and conversions can all go by name.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax.tree_util import GetAttrKey

T = TypeVar("T")


def named_leaves(tree: Any, *, is_leaf: Callable[[Any], bool] | None = None) -> tuple[dict[str, Any], Any]:
    """Flattens `tree` into `{path: leaf}`, in tree order, and the treedef that rebuilds it.

    Raises:
      ValueError: two leaves have the same path (a dict key that contains `/`).
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    named = {path_name(path): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        names = [path_name(path) for path, _ in leaves]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"`tree` has several leaves named {', '.join(twice)}: paths must be unique")
    return named, treedef


def path_name(path: Sequence[Any]) -> str:
    """`/`-joined name of a key path, without the `.value` that an NNX variable adds below its name."""
    if path and isinstance(path[-1], GetAttrKey) and path[-1].name in ("value", "raw_value"):
        path = path[:-1]
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def map_named(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` whose function is given the leaf's path first: `fn(path, leaf, *rest_leaves)`."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: fn(path_name(path), *leaves), tree, *rest)


def nested(values: Mapping[str, T]) -> dict[str, Any]:
    """Plain nested dicts, one level for each part of a path, from values by path."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *parts, last = path.split("/")
        node = tree
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def at(tree: Any, path: str) -> Any:
    """What nested dicts hold at `path`."""
    node = tree
    for part in path.split("/"):
        node = node[part]
    return node


def natural_order(path: str) -> list[list[str | int]]:
    """Key for sorting paths: conv2 before conv10 in every part of a path, parents first."""
    return [
        [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
        for name in path.split("/")
    ]


def match_rules(rules: Sequence[tuple[str, T]], names: Iterable[str]) -> dict[str, T]:
    """Gives each name the value of the first rule whose regular expression matches the whole of it.

    Raises:
      ValueError: a name that no rule matches; all of them are listed.
    """
    compiled = [(re.compile(pattern), value) for pattern, value in rules]
    matched: dict[str, T] = {}
    uncovered = []
    for name in names:
        for pattern, value in compiled:
            if pattern.fullmatch(name):
                matched[name] = value
                break
        else:
            uncovered.append(name)
    if uncovered:
        raise ValueError(
            f"no rule of `rules` matches {', '.join(uncovered)}; "
            f"every name must be covered by one of {[pattern for pattern, _ in rules]}"
        )
    return matched


def compiled(
    pattern: str | re.Pattern[str], argument: str, *, replacement: str | None = None
) -> re.Pattern[str]:
    """A regular expression of a caller; `argument` is what the error calls its place.

    Raises:
      ValueError: it is none, or has not the groups that `replacement` names.
    """
    try:
        regex = re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"`{argument}` holds {pattern!r}, which is no regular expression: {error}") from None
    if replacement is not None:
        try:
            regex.sub(replacement, "")  # reads the replacement also where nothing matches
        except (re.error, IndexError, TypeError) as error:
            raise _wrong_replacement(regex, replacement, argument, error) from None
    return regex


def expanded(match: re.Match[str], replacement: str, argument: str) -> str:
    """The replacement with the groups of the match.

    Raises:
      ValueError: it names a group that the expression does not have.
    """
    try:
        return match.expand(replacement)
    except (re.error, IndexError) as error:
        raise _wrong_replacement(match.re, replacement, argument, error) from None


def _wrong_replacement(
    regex: re.Pattern[str], replacement: str, argument: str, error: Exception
) -> ValueError:
    return ValueError(f"`{argument}` gives {regex.pattern!r} the replacement {replacement!r}: {error}")


def describe_difference(
    expected: Mapping[str, Any], found: Mapping[str, Any], *, noun: str = "entries"
) -> str:
    """One sentence that lists every missing, extra and different path, or "" where both mappings are equal.

    The values are what is compared and shown: shapes, usually.
    """
    missing = [f"{name} {expected[name]}".rstrip() for name in expected if name not in found]
    extra = [f"{name} {found[name]}".rstrip() for name in found if name not in expected]
    differ = [
        f"{name} (expected {expected[name]}, found {found[name]})"
        for name in expected
        if name in found and expected[name] != found[name]
    ]
    parts = [
        f"{len(names)} {word} {noun}: {', '.join(names)}"
        for word, names in (("missing", missing), ("extra", extra), ("misshapen", differ))
        if names
    ]
    return "; ".join(parts)


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first `most` names of a list, and how many more there are: for messages."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"
