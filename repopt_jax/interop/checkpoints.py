"""Finds the weights in what a PyTorch file holds: a state dict, a checkpoint around one, a whole module."""

from collections.abc import Mapping
from typing import Any, TypeVar

from repopt_jax.interop.pickles import Record, TensorRef, Unreadable

T = TypeVar("T")

# Where training programs put the weights beside other things, in the order in which they are looked for.
NESTED = ("model", "state_dict", "model_state_dict", "params", "ema")

# Prefixes that wrappers add to every name: data parallel, and `torch.compile`.
WRAPPERS = ("module.", "_orig_mod.")


def select_tensors(value: Any, key: str | None, name: str) -> dict[str, TensorRef]:
    """The tensors of a file's value by name, without the prefixes of wrappers.

    Args:
      value: what `pickles.load` gave.
      key: the entry to take, inside entries with `/`; None for the first of `NESTED` that holds tensors, or
        those of `value` itself.
      name: of the file, for messages.

    Raises:
      Unreadable: no such entry, or no tensors in it.
    """
    for part in key.split("/") if key is not None else ():
        entries = _entries(value)
        if part not in entries:
            known = ", ".join(map(repr, entries)) or "none"
            raise Unreadable(f"{name} has no entry {part!r} (`key` {key!r}): the entries are {known}")
        value = entries[part]
    tensors = _find_tensors(value)
    if tensors and not _parts_with_tensors(value, tensors):
        return without_wrappers(tensors)
    where = f"{name} holds no tensors" + (f" under {key!r}" if key is not None else "")
    if parts := _parts_with_tensors(value, tensors):
        listed = ", ".join(map(repr, parts))
        raise Unreadable(
            f"{where} where they are looked for, but in its entries: give `key`, one of {listed}"
        )
    raise Unreadable(where)


def without_wrappers(tensors: dict[str, T]) -> dict[str, T]:
    """`tensors` without the prefixes in `WRAPPERS` that all of their names have."""
    while tensors and (prefix := next((p for p in WRAPPERS if all(n.startswith(p) for n in tensors)), "")):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _find_tensors(value: Any, depth: int = 4) -> dict[str, TensorRef]:
    """The tensors of a module, of an entry in `NESTED`, or of the mapping itself; none if there are none."""
    if _is_module(value):
        return _module_tensors(value)
    entries = _entries(value)
    for name in NESTED if depth else ():
        if name in entries and (tensors := _find_tensors(entries[name], depth - 1)):
            return tensors
    return {name: t for name, t in entries.items() if isinstance(name, str) and isinstance(t, TensorRef)}


def _parts_with_tensors(value: Any, tensors: Mapping[str, Any]) -> list[str]:
    """Entries that are modules or state dicts, if no tensors, or no more than loose ones beside them, were
    found."""
    if any(name not in _entries(value) for name in tensors):
        return []
    seen, parts = set(), []
    for name, entry in _entries(value).items():
        if id(entry) in seen or str(name).endswith("_extra_state"):
            continue
        seen.add(id(entry))
        if _is_module(entry) or any(isinstance(t, TensorRef) for t in _entries(entry).values()):
            parts.append(str(name))
    return parts


def _entries(value: Any) -> Mapping[Any, Any]:
    if isinstance(value, Record):
        return value.items
    return value if isinstance(value, dict) else {}


def _is_module(value: Any) -> bool:
    return isinstance(value, Record) and isinstance(value.state, dict) and "_modules" in value.state


# Real networks stay far below; a module that contains itself does not.
_MAX_DEPTH = 100
_MAX_MODULES = 20_000


def _module_tensors(module: Record) -> dict[str, TensorRef]:
    """What `module.state_dict()` would hold: parameters and persistent buffers, parents first."""
    tensors = {}
    count = 0
    todo: list[tuple[tuple[str, ...], Record]] = [((), module)]
    while todo:
        path, module = todo.pop()
        count += 1
        if count > _MAX_MODULES or len(path) > _MAX_DEPTH:
            raise ValueError("its modules are nested without end")
        state = module.state
        passing = state.get("_non_persistent_buffers_set") or ()
        own = dict(_entries(state.get("_parameters")))
        own |= {name: t for name, t in _entries(state.get("_buffers")).items() if name not in passing}
        tensors |= {".".join((*path, str(name))): t for name, t in own.items() if isinstance(t, TensorRef)}
        children = [
            ((*path, str(name)), m) for name, m in _entries(state["_modules"]).items() if _is_module(m)
        ]
        todo.extend(reversed(children))
    return tensors
