"""JSON that somebody else may have written or damaged: read as a value or refused in one sentence."""

import json
from typing import Any

DEPTH = 50  # lists and objects inside one another; no file of ours has more than ten


def parse(text: str | bytes, name: object, *, depth: int | None = DEPTH) -> Any:
    """The value of a JSON text.

    Args:
      text: the JSON; bytes are UTF-8.
      name: what messages call it, such as the path of its file.
      depth: how deeply lists and objects may be nested; code that walks through a value of more could exhaust
        the stack. None where the value is so large that it is not walked through; nesting that Python cannot
        read is refused all the same.

    Raises:
      ValueError: the text is not JSON, or nested more deeply. The message begins with `name`.
    """
    try:
        value = json.loads(text)
    except ValueError as error:  # also of integers of thousands of digits, and of bytes that are no text
        raise ValueError(f"{name} is not JSON: {error}") from error
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply to be read") from None
    if depth is not None and not _is_within(value, depth):
        raise ValueError(f"{name} has more than {depth} lists and objects inside one another")
    return value


def _is_within(value: Any, depth: int) -> bool:
    """Whether a value is nested at most `depth` levels deep, found level by level and not by recursion."""
    level = [value]
    for _ in range(depth):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return True
    return not any(isinstance(inner, dict | list) for inner in level)
