"""Finds the weights in what a PyTorch file holds: a state dict, a checkpoint around one, a whole module."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from repopt_jax.interop.pickles import Record, TensorRef, Unreadable

T = TypeVar("T")

# The entries in which training programs save the weights, in the order in which they are tried.
NESTED = ("model", "state_dict", "model_state_dict", "params", "ema")

# Prefixes that wrappers add to every name: data parallel, and `torch.compile`.
WRAPPERS = ("module.", "_orig_mod.")


def select_tensors(value: Any, key: str | None, name: str) -> dict[str, TensorRef]:
    """Returns the tensors of a file's value by name, without the prefixes of wrappers.

    Args:
      value: the result of `pickles.load`.
      key: the entry to take, with `/` for entries inside entries; None for the first of `NESTED` that holds
        tensors, or the tensors of `value` itself.
      name: the file's name, for messages.

    Raises:
      Unreadable: no such entry, or no tensors in it.
    """
    for part in key.split("/") if key is not None else ():
        entries = _entries(value)
        if part not in entries:
            known = ", ".join(repr(name) for name in entries if isinstance(name, (str, int))) or "none"
            raise Unreadable(f"{name} has no entry {part!r} (`key` {key!r}): the entries are {known}")
        value = entries[part]
    tensors = _find_tensors(value, 4, set())
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
    """Removes the prefixes in `WRAPPERS` that all names have."""
    end = 0  # length of the common prefix
    while tensors and (
        prefix := next((p for p in WRAPPERS if all(n.startswith(p, end) for n in tensors)), "")
    ):
        end += len(prefix)
    return {name[end:]: tensor for name, tensor in tensors.items()}


def _find_tensors(value: Any, depth: int, seen: set[tuple[int, int]]) -> dict[str, TensorRef]:
    """Returns the tensors of a module, of an entry in `NESTED`, or of the mapping itself.

    The result is empty if there are none, or if the value has been visited before.
    """
    if (id(value), depth) in seen:
        return {}
    seen.add((id(value), depth))
    if _is_module(value):
        return _module_tensors(value)
    entries = _entries(value)
    for name in NESTED if depth else ():
        if name in entries and (tensors := _find_tensors(entries[name], depth - 1, seen)):
            return tensors
    return {name: t for name, t in entries.items() if isinstance(name, str) and isinstance(t, TensorRef)}


def _parts_with_tensors(value: Any, tensors: Mapping[str, Any]) -> list[str]:
    """Returns entries that are modules or state dicts, unless `tensors` were found inside an entry."""
    if any(name not in _entries(value) for name in tensors):
        return []
    seen, parts = set(), []
    for name, entry in _entries(value).items():
        if id(entry) in seen or not isinstance(name, (str, int)) or str(name).endswith("_extra_state"):
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


# Limits far above those of real networks, against files that hold a few modules many times.
_MAX_DEPTH = 100
_MAX_MODULES = 20_000
_MAX_NAMES = 1_000_000
_MAX_CHARACTERS = 100_000_000


def _module_tensors(module: Record) -> dict[str, TensorRef]:
    """Returns what `module.state_dict()` would hold: parameters and persistent buffers, parents first."""
    tensors: dict[str, TensorRef] = {}
    above: set[int] = set()  # the modules that hold the one being visited
    modules = names = characters = 0

    def count(more_names: int, more_characters: int) -> None:
        nonlocal names, characters
        names, characters = names + more_names, characters + more_characters
        if names > _MAX_NAMES or characters > _MAX_CHARACTERS:
            raise ValueError("its modules hold too many names")

    def named(prefix: str, part: Any) -> Iterator[tuple[str, str, Any]]:
        """Yields names, full names and entries of tensors and modules."""
        entries = _entries(part)
        count(len(entries), 0)
        for name, entry in entries.items():
            if isinstance(name, (str, int)) and (isinstance(entry, TensorRef) or _is_module(entry)):
                name = str(name)
                count(0, len(prefix) + len(name))
                yield name, prefix + name, entry

    def visit(module: Record, prefix: str) -> None:
        nonlocal modules
        modules += 1
        if id(module) in above or len(above) > _MAX_DEPTH or modules > _MAX_MODULES:
            raise ValueError("its modules are nested without end")
        above.add(id(module))
        state = module.state
        passing = state.get("_non_persistent_buffers_set") or ()
        count(len(passing), 0)
        passing = {name for name in passing if isinstance(name, str)}
        for _, full, entry in named(prefix, state.get("_parameters")):
            if isinstance(entry, TensorRef):
                tensors[full] = entry
        for name, full, entry in named(prefix, state.get("_buffers")):
            if isinstance(entry, TensorRef) and name not in passing:
                tensors[full] = entry
        for _, full, entry in named(prefix, state["_modules"]):
            if not isinstance(entry, TensorRef):
                visit(entry, f"{full}.")
        above.remove(id(module))

    visit(module, "")
    return tensors
