"""Imports Python files named on the command line, configs and checks, and calls a function in them."""

import ast
import contextlib
import inspect
import sys
import traceback
import types
from collections.abc import Iterator
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
      ModuleNotFoundError: the file imports what is not installed.
      ValueError: `path` is not a Python file, is not valid Python, has no such function, or one that takes
        other arguments; or an error inside, whatever its type. The message has the file and, where there is
        one, the line.
    """
    what = f"a {noun} is a file NAME.py with a function `{function}`"
    with _imported(path, what) as module:
        found = getattr(module, function, None)
        if not callable(found):
            raise ValueError(f"{path} has no function `{function}`: {what}")
        _check_signature(found, args, f"`{function}` of {path}")
        with _located(path):
            return found(*args)


def execute(path: Path) -> None:
    """Imports the Python file `path`, for what that does.

    Raises:
      ModuleNotFoundError, ValueError: as `call`.
    """
    with _imported(path, "give a file NAME.py"):
        pass


@contextlib.contextmanager
def _imported(path: Path, what: str) -> Iterator[types.ModuleType]:
    """The file as a module, while modules of its folder can be imported; `what` says what it should be."""
    if path.suffix != ".py":
        raise ValueError(f"{path} is not a Python file: {what}")
    name = f"repopt_file_{path.stem}"
    module = types.ModuleType(name)
    module.__file__ = str(path)
    folder = str(path.absolute().parent)
    before = sys.modules.get(name)
    sys.modules[name] = module  # dataclasses look up their module by name
    sys.path.insert(0, folder)
    try:
        with _located(path):
            # As a script and not imported: an import leaves `__pycache__` beside the user's file, and takes
            # one that was changed within the second it was written in for the one before.
            exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), vars(module))
        yield module
    finally:
        with contextlib.suppress(ValueError):  # the file has changed the list itself
            sys.path.remove(folder)
        if before is not None:
            sys.modules[name] = before


def _check_signature(function: Any, args: tuple[Any, ...], name: str) -> None:
    try:
        inspect.signature(function).bind(*args)
    except TypeError as error:
        code = getattr(function, "__code__", None)
        line = "" if code is None else f", line {code.co_firstlineno},"
        raise ValueError(f"{name}{line} must take {len(args) or 'no'} argument(s): {error}") from error
    except ValueError:  # one of C, which has none
        pass


@contextlib.contextmanager
def _located(path: Path) -> Iterator[None]:
    """Names the file and the line in the errors of its code."""
    try:
        yield
    except SyntaxError as error:
        raise ValueError(f"{error.filename or path} is not valid Python: {error}") from error
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        here = [frame.lineno for frame in frames if Path(frame.filename).absolute() == path.absolute()]
        line = f", line {here[-1]}" if here else ""
        # The text of a KeyError is its argument's repr, and others say little without their type.
        said = " ".join(str(error).split())
        text = said if isinstance(error, ValueError | OSError | ImportError) and said else _typed(error, said)
        if isinstance(error, ModuleNotFoundError):
            raise ModuleNotFoundError(f"{path}{line}: {text}", name=error.name) from error
        raise ValueError(f"{path}{line}: {text}") from error


def _typed(error: BaseException, said: str) -> str:
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
