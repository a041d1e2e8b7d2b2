"""Imports Python files named on the command line, configs and checks, and calls a function in them."""

import ast
import importlib.util
import sys
from pathlib import Path
from typing import Any


def defines(path: Path, function: str) -> bool:
    """Whether the Python file `path` defines, imports or assigns this name at its top level; it is not run.

    A file that is not valid Python has none; `call` says what is wrong with it.
    """
    try:
        body = ast.parse(path.read_bytes()).body
    except (SyntaxError, ValueError):
        return False
    names: set[str] = set()
    for node in body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return function in names


def call(path: Path, function: str, *args: Any, noun: str) -> Any:
    """Imports the Python file `path` and returns the result of its `function(*args)`.

    As for a script, the file may import modules of its own folder.

    Args:
      path: the file.
      function: name of the function in the file.
      noun: name of this kind of file in messages ("config").

    Raises:
      ValueError: `path` is not a Python file, is not valid Python, or has no such function.
    """
    what = f"a {noun} is a file NAME.py with a function `{function}`"
    name = f"repopt_{noun}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file: {what}")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.absolute().parent)
    before = sys.modules.get(name)
    sys.modules[name] = module  # dataclasses look up their module by name
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
