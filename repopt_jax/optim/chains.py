"""What can be seen of an Optax chain: the names of its parts, and whether it clips where that breaks the
equivalence.

A gradient transformation is two functions, and a chain keeps those of its members in a closure. Looking into
closures is best effort: nothing here raises for a transformation that cannot be seen through, and nothing
that is computed depends on it.
"""

import contextlib
import contextvars
import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import optax

# Transformations that are not linear in the gradient because they bound it by a norm of the plain kernels.
CLIPPING = frozenset(
    {
        "adaptive_grad_clip",
        "clip",
        "clip_by_block_rms",
        "clip_by_global_norm",
        "differentially_private_aggregate",
        "normalize_by_update_norm",
    }
)
# What stands inside works on the branches, whose ordinary norm is the right one.
OPAQUE = frozenset({"reparameterize"})
# What stands inside may leave the re-parameterized kernels out.
PARTIAL = frozenset({"masked", "partition"})


def _code(tx: Any) -> Any:
    """By its code the update function of a wrapper is recognised on the stack."""
    return getattr(tx.update, "__code__", None)


_CHAIN = _code(optax.chain(optax.identity()))
_NAMED_CHAIN = _code(optax.named_chain(("only", optax.identity())))
_INJECTING = _code(optax.inject_hyperparams(optax.sgd)(0.1))
_quiet = contextvars.ContextVar("quiet", default=False)


class ClippingWarning(UserWarning):
    """An ordinary clipping stands in one chain with a re-parameterized rule."""


def transformations(tx: Any) -> tuple[str, ...]:
    """Names of the primitive transformations inside `tx`, in order: `("clip_by_global_norm", "trace",
    "scale")`.

    The name of a transformation is that of the function that made it. Wrappers (`chain`, `masked`,
    `partition`, `MultiSteps`, `inject_hyperparams`, `apply_if_finite`, a closure of the user's own ...) give
    way to what they hold, as far as it is found in the closure of their update function or, of a bound
    method, in the attributes of its object. `reparameterize` counts as primitive. Never raises.
    """
    return tuple(_walk(tx))


def warn_of_clipping(rule: str) -> None:
    """Warns, once for each chain, if the `optax.chain` that is now calling `rule` also clips the ordinary
    way.

    To be called by the update function of `rule` itself: it is the Python stack that shows the chains, also
    those around `MultiSteps`, `masked` or `nnx.Optimizer`. Under `jax.jit` this happens while tracing, so
    that a compiled step pays nothing; an eager step pays for a walk up the stack. Clipping inside
    `optax.masked` or `optax.partition` may leave the kernels out, and is not warned about.
    """
    if _quiet.get():
        return
    names: dict[str, None] = {}
    key: list[Any] = []
    level = outermost = 2  # of the caller, as `warnings.warn` counts
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CHAIN or frame.f_code is _NAMED_CHAIN:
            outermost = level
            members = _members(frame.f_locals)
            if found := _clippings(members):
                names |= dict.fromkeys(found)
                key.append(members)
        elif frame.f_code is _INJECTING and key:  # the chains inside it are made anew at each step
            key = [frame.f_locals["inner_factory"]]
        frame, level = frame.f_back, level + 1
    if names:
        _warn_once(rule, tuple(names), tuple(key), outermost + 1)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warning inside, and none used up."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


@functools.lru_cache(maxsize=64)
def _warn_once(rule: str, names: tuple[str, ...], chain: tuple, level: int) -> None:
    del chain  # for the cache: once for each
    warnings.warn(
        f"{', '.join(names)} in one chain with {rule}: it goes by the plain gradient, so the network is no "
        "longer trained as its multi-branch counterpart; clip by the branches' norm instead, with "
        "clip_by_repopt_global_norm(max_norm, scales) at the head of the chain",
        ClippingWarning,
        stacklevel=level + 1,
    )


@functools.lru_cache(maxsize=64)
def _clippings(members: tuple) -> tuple[str, ...]:
    """Clippings of the ordinary kind among the members of a chain."""
    return tuple(name for member in members for name in _walk(member, closed=PARTIAL) if name in CLIPPING)


def _members(variables: Mapping[str, Any]) -> tuple:
    """Members of `optax.chain` or `optax.named_chain`, from the variables of its update function."""
    return tuple(variables.get("update_fns") or [tx for _, tx in variables.get("transforms", ())])


def _walk(node: Any, *, closed: frozenset[str] = frozenset(), depth: int = 0) -> Iterator[str]:
    """Names of what `node`, a transformation or an update function, is made of; wrappers in `closed` stay
    shut."""
    try:
        update = getattr(node, "update", node)
        name = _name(update)
        if name in closed:
            return
        inside = [] if name in OPAQUE or depth > 100 else list(_inside(update))
    except Exception:  # best effort: other people's objects may do anything when they are looked at
        name, inside = type(node).__name__, []
    if not inside:
        yield name
    for part in inside:
        yield from _walk(part, closed=closed, depth=depth + 1)


def _inside(update: Any) -> Iterator[Any]:
    """The transformations and update functions that an update function refers to."""
    if isinstance(update, functools.partial):
        yield from (
            value for value in (update.func, *update.args, *update.keywords.values()) if _is_update(value)
        )
        return
    if inspect.ismethod(update):
        variables = vars(update.__self__)
    else:
        variables = _closure(update)
    if getattr(update, "__code__", None) in (_CHAIN, _NAMED_CHAIN):
        yield from _members(variables)
    elif "inner_factory" in variables:  # inject_hyperparams makes its transformation anew at each step
        yield _made(variables["inner_factory"], variables.get("other_hps", {}))
    else:
        for value in variables.values():
            yield from _transformations_in(value)


def _closure(function: Any) -> dict[str, Any]:
    """The variables that a function has from where it was defined; those not yet assigned are left out."""
    try:
        return dict(inspect.getclosurevars(function).nonlocals)
    except (TypeError, ValueError):
        return {}


def _transformations_in(value: Any) -> Iterator[Any]:
    if _is_transformation(value) or _is_update(value):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _transformations_in(item)
    elif type(value) in (tuple, list):
        for item in value:
            yield from _transformations_in(item)


def _is_transformation(value: Any) -> bool:
    return callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))


def _is_update(value: Any) -> bool:
    return callable(value) and getattr(value, "__name__", "") in ("update", "update_fn")


def _made(factory: Callable[..., Any], known: Mapping[str, Any]) -> Any:
    """What `inject_hyperparams` makes of its arguments that are no numbers. Numbers and schedules are in the
    optimizer's state; any number will do to see the parts."""
    numbers = {name: 0.1 for name in inspect.signature(factory).parameters if name not in known}
    return factory(**numbers, **known)


def _name(update: Any) -> str:
    if isinstance(update, functools.partial):
        return _name(update.func)
    name = getattr(update, "__qualname__", type(update).__qualname__).split(".")[0]
    if name in ("stateless", "stateless_with_tree_map"):
        made_of = _closure(update).get("f")
        return name if made_of is None or "<lambda>" in made_of.__qualname__ else _name(made_of)
    return name
