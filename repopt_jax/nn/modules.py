"""Walking and rebuilding NNX models by path."""

from collections.abc import Callable, Iterator

from flax import nnx


def named_modules(model: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """Every module of `model` with its path (`stages/1/0/conv`, the model itself being ``), parents first.

    A module that is used in several places comes once, under the first path.
    """
    seen = set()

    def visit(path, module):
        if id(module) in seen:
            return
        seen.add(id(module))
        yield path, module
        for name, child in _children(module):
            yield from visit(_join(path, name), child)

    yield from visit("", model)


def replace_modules(model: nnx.Module, replace: Callable[[str, nnx.Module], nnx.Module | None]) -> nnx.Module:
    """A copy of `model` in which every module for which `replace(path, module)` gives another one has given
    way to it.

    `model` is untouched; `replace` sees the copy's modules, parents first, and is not asked about the inside
    of what it replaced. A module used in several places is replaced once, by one module, in all of them.
    """
    done: dict[int, nnx.Module] = {}
    kept: list[nnx.Module] = []  # ids stay unique as long as the replaced modules are alive

    def visit(path: str, module: nnx.Module) -> nnx.Module:
        if id(module) not in done:
            kept.append(module)
            new = replace(path, module)
            done[id(module)] = module if new is None else new
            if new is None:
                for name, child in list(_children(module)):
                    setattr(module, name, visit(_join(path, name), child))
        return done[id(module)]

    return visit("", nnx.clone(model))


def _children(module: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    for name, value in sorted(vars(module).items(), key=lambda item: _natural(item[0])):
        if isinstance(value, nnx.Module):
            yield name, value


def _natural(name: str) -> tuple[int, str]:
    """List entries in numerical order."""
    return (int(name), "") if name.isdecimal() else (-1, name)


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name
