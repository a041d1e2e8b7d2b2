"""A config as the text of a Python file that gives the same config again."""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

from repopt_jax.train.config import Config


def python_file(value: Any, command: str) -> str:
    """Returns a file whose `get_config` returns an equal config, or its `get_comparison` an equal comparison.

    Every field is written, those at their defaults too.

    Args:
      value: a `train.Config` or a `report.comparison.Comparison`.
      command: the command that printed it, for the file's first line.

    Raises:
      ValueError: a value that is no text, number, tuple, list, mapping or None, nor a section of a config.
    """
    classes: dict[str, set[str]] = {}
    text = _written(value, "    ", "it", classes)
    imports = [_import(module, sorted(names)) for module, names in sorted(classes.items())]
    function = "get_config" if isinstance(value, Config) else "get_comparison"
    return "\n".join(
        (
            f"# {' '.join(command.split())}",
            *imports,
            "",
            "",
            f"def {function}(arg: str = '') -> {type(value).__name__}:",
            f"    return {text}",
            "",
        )
    )


def _import(module: str, names: list[str]) -> str:
    if len(names) < 4:
        return f"from {module} import {', '.join(names)}"
    return _lines(f"from {module} import (", names, ")", "")


def _written(value: Any, indent: str, name: str, classes: dict[str, set[str]]) -> str:
    """The expression of a value whose further lines are indented by `indent`; adds to `classes` those that it
    needs, by module."""
    inner = indent + "    "
    if dataclasses.is_dataclass(value) and type(value).__module__.startswith("repopt_jax."):
        kind = type(value)
        classes.setdefault(kind.__module__, set()).add(kind.__name__)
        fields = [field.name for field in dataclasses.fields(value)]
        parts = [f"{field}={_written(getattr(value, field), inner, field, classes)}" for field in fields]
        return _lines(f"{kind.__name__}(", parts, ")", indent)
    if isinstance(value, Mapping):
        items = [f"{key!r}: {_written(v, inner, f'{name}[{key!r}]', classes)}" for key, v in value.items()]
        return _lines("{", items, "}", indent)
    if isinstance(value, list | tuple):
        parts = [_written(entry, inner, name, classes) for entry in value]
        opening, closing = "[]" if isinstance(value, list) else "()"
        if len(parts) == 1 and closing == ")":
            return f"({parts[0]},)"
        flat = f"{opening}{', '.join(parts)}{closing}"
        return flat if len(flat) <= 80 and "\n" not in flat else _lines(opening, parts, closing, indent)
    return _atom(value, name)


def _lines(opening: str, parts: list[str], closing: str, indent: str) -> str:
    if not parts:
        return opening + closing
    return "\n".join((opening, *(f"{indent}    {part}," for part in parts), indent + closing))


def _atom(value: Any, name: str) -> str:
    """A text, number, truth or None, also where it is of a class that is derived from one of these."""
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, str):
        return repr(str.__str__(value))
    if isinstance(value, numbers.Integral):
        return repr(int(value))
    if isinstance(value, numbers.Real):
        number = float(value)
        return repr(number) if math.isfinite(number) else f"float({str(number)!r})"
    raise ValueError(f"`{name}` is of type {type(value).__name__}, which cannot be written as a config file")
