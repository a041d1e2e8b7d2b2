"""Walking and rebuilding NNX models by path."""

import functools
import numbers
import types
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx
from jax import core

from repopt_jax.core.paths import natural_order


def named_modules(model: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """Yields every module of `model` with its path, parents first, list entries in numerical order.

    A path is `stages/1/0/conv`, that of the model itself is empty. A module that is used in several places
    occurs once, under its path in `nnx.split(model)`; `aliases` has its other paths.
    """
    found = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    yield from sorted(found.items(), key=lambda item: natural_order(item[0]))


def aliases(model: nnx.Module) -> dict[str, str]:
    """Returns the other paths of shared modules, each with the module's path in `named_modules`.

    The layers of a block that is used twice have two paths as well.
    """
    canonical = {id(module): path for path, module in named_modules(model)}
    found = {}
    for path, module in _every_path("", model, ()):
        if (first := canonical[id(module)]) != path:
            found[path] = first
    return found


def check_model(model: Any) -> None:
    """Raises TypeError if an argument `model` is no NNX model."""
    if not isinstance(model, nnx.Module):
        raise TypeError(f"`model` is of type {type(model).__name__}: it must be an NNX model")


def is_training(module: nnx.Module) -> bool:
    """Returns whether a module computes what it does in training alone: takes the statistics of its batch, or
    drops something at a rate above 0, or at one that is not known."""
    if getattr(module, "use_running_average", True) is False:
        return True
    if getattr(module, "deterministic", True) is not False:
        return False
    rates = [getattr(module, name, None) for name in ("rate", "dropout_rate")]
    known = [rate for rate in rates if isinstance(rate, numbers.Real)]
    return not known or any(float(rate) > 0 for rate in known)


class Removed(nnx.Module):
    """Returned by `replace` to put `None` in the place of a module."""


def replace_modules(model: nnx.Module, replace: Callable[[str, nnx.Module], nnx.Module | None]) -> nnx.Module:
    """Returns a copy of `model` with every module replaced for which `replace(path, module)` returns another.

    If that is a `Removed`, `None` takes the module's place. `model` itself is unchanged. `replace` is called
    for the copy's modules with the paths of `named_modules`, parents first, but not for modules inside those
    that it replaced. A module that is used in several places is replaced by one module in all of them.

    Raises:
      TypeError: modules in a container that cannot be rebuilt here (other than modules, lists, dicts and
        tuples).
    """
    graph, state = nnx.split(model)
    copy = nnx.merge(graph, jax.tree.map(copy_leaf, state), copy=True)
    everything = {id(module): "/".join(map(str, path)) for path, module in nnx.iter_modules(copy)}
    done: dict[int, nnx.Module] = {}
    inside: set[int] = set()  # modules inside replaced ones
    kept: list[nnx.Module] = []  # ids stay unique as long as the replaced modules are alive

    def visit(path: str, value: Any) -> Any:
        match value:
            case nnx.Module():
                return visit_module(path, value)
            case list():
                value[:] = [visit(join(path, str(i)), item) for i, item in enumerate(value)]
            case dict():
                value.update({key: visit(join(path, str(key)), item) for key, item in value.items()})
            case tuple() if type(value) is tuple:
                return tuple(visit(join(path, str(i)), item) for i, item in enumerate(value))
        return value

    def visit_module(path: str, module: nnx.Module) -> nnx.Module:
        if id(module) not in done:
            kept.append(module)
            new = replace(everything[id(module)], module)
            done[id(module)] = module if new is None else new
            if new is not None:
                inside.update(id(child) for _, child in nnx.iter_modules(module))
            else:
                for name, child in sorted(_attributes(module), key=lambda item: natural_order(item[0])):
                    if (changed := visit(join(path, name), child)) is not child:
                        removed = isinstance(changed, Removed)
                        setattr(module, name, nnx.data(None) if removed else changed)
        return done[id(module)]

    result = visit("", copy)
    if unreached := [path for key, path in everything.items() if key not in done.keys() | inside]:
        raise TypeError(
            f"modules {', '.join(unreached)} are in containers that cannot be rebuilt: hold them in nnx.List "
            "or nnx.Dict"
        )
    return result


def is_abstract(model: Any) -> bool:
    """Returns whether a model, or a tree of parameters, has shapes in place of arrays (`nnx.eval_shape`)."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model))


def intercepted(
    model: nnx.Module, around: Callable[..., Any], select: Callable[[str, nnx.Module], bool]
) -> nnx.Module:
    """Returns a copy of `model` in which `around(path, call, *args, **options)` is run in place of the call
    of each module for which `select(path, module)` is true.

    `call` is what the module itself computes. The modules stay instances of their classes. `around` must be
    a function of a file and not made anew for each use: a subclass is made for it and each class, and NNX
    keeps its classes for ever.

    Raises:
      TypeError: as `replace_modules`.
    """
    copy = replace_modules(model, lambda path, module: None)
    for path, module in list(named_modules(copy)):
        if callable(module) and select(path, module):
            object.__setattr__(module, "__class__", _intercepting(type(module), around))
            setattr(module, "intercepted_path", path)  # noqa: B010  (of modules of any class)
    return copy


@functools.cache
def _intercepting(kind: type[nnx.Module], around: Callable[..., Any]) -> type[nnx.Module]:
    def call(self: Any, *args: Any, **options: Any) -> Any:
        own = functools.partial(kind.__call__, self)  # pyright: ignore[reportCallIssue]
        return around(self.intercepted_path, own, *args, **options)

    members = {"__call__": call, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return types.new_class(kind.__name__, (kind,), exec_body=lambda namespace: namespace.update(members))


def copy_leaf(leaf: Any) -> Any:
    """Copies an array, so that donating one model's arrays cannot invalidate another's."""
    if isinstance(leaf, core.Tracer):
        return leaf
    # `leaf.copy()` would compile a program for each shape.
    return jax.device_put(leaf, may_alias=False) if isinstance(leaf, jax.Array) else leaf


def join(path: str, name: str) -> str:
    """Returns the path of `name` inside `path`; the model's own path is empty."""
    return f"{path}/{name}" if path else name


def key_of(path: str, key: jax.Array) -> jax.Array:
    """Returns the key of the layer at `path`, which does not depend on the other layers."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _every_path(path: str, value: Any, above: tuple[int, ...]) -> Iterator[tuple[str, nnx.Module]]:
    """Yields all modules at or below `value` under all of their paths; cycles are followed once."""
    if id(value) in above:
        return
    match value:
        case nnx.Module():
            yield path, value
            children = _attributes(value)
        case list() | tuple():
            children = [(str(i), item) for i, item in enumerate(value)]
        case dict():
            children = [(str(key), item) for key, item in value.items()]
        case _:
            return
    for name, child in children:
        yield from _every_path(join(path, name), child, (*above, id(value)))


def _attributes(module: nnx.Module) -> list[tuple[str, Any]]:
    return [item for item in vars(module).items() if not item[0].startswith("_pytree__")]
