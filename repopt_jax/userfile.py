"""Python files that a caller names on the command line: run as a module, and one function of it called."""

import importlib.util
import sys
from pathlib import Path
from typing import Any


def call(path: Path, function: str, *args: Any, noun: str) -> Any:
    """What `function(*args)` of the Python file `path` returns.

    The file may import what lies beside it, as a script may.

    Args:
      path: the file.
      function: its name in the file.
      noun: what such a file is, for the messages ("config").

    Raises:
      ValueError: it is no Python file, or not valid Python, or has no such function.
    """
    what = f"a {noun} is a file NAME.py with a function `{function}`"
    name = f"repopt_{noun}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file: {what}")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.absolute().parent)
    before = sys.modules.get(name)
    sys.modules[name] = module  # dataclasses look their own module up
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, function, None)):
            raise ValueError(f"{path} has no function `{function}`: {what}")
        return getattr(module, function)(*args)
    except SyntaxError as error:
        raise ValueError(f"{path} is not valid Python: {error}") from error
    finally:
        sys.path.remove(folder)
        if before is not None:
            sys.modules[name] = before
