"""Traced functions as flat lists of equations.

`flatten(jax.make_jaxpr(f)(x))` gives the equations of f in order, those of `jax.jit`, `jax.checkpoint` and
functions with rules of their own for derivatives in the place of the calls. Control flow (`scan`, `while`,
`cond`) and `shard_map` stay equations, with their bodies among their parameters.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from jax.extend import core

# Equations that are replaced by those of the function that they call -> their parameter that holds it.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}


# Primitives of one convolution, with the parameters of the first: JAX's, and this library's, which is lowered
# to other programs on a CPU (`nn.convolution`).
CONVOLUTIONS = ("conv_general_dilated", "repopt_convolution")


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """An array of a traced function; two are the same only if they are one object.

    Attributes:
      aval: its shape and dtype.
      constant: the array itself where it is known before the function runs, else None.
    """

    aval: Any
    constant: Any = None

    @property
    def shape(self) -> tuple[Any, ...]:
        """The sizes; those that stand for any size are symbolic dimensions of `jax.export`."""
        return tuple(self.aval.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """outputs = primitive(*inputs, **params).

    Attributes:
      scope: the names of the `jax.named_scope`s around it, such as `stages/1/0/conv`; empty without any.
    """

    primitive: core.Primitive
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    params: Mapping[str, Any]
    scope: str

    @property
    def name(self) -> str:
        """The name of the primitive."""
        return self.primitive.name


@dataclasses.dataclass(frozen=True, eq=False)
class Flat:
    """A traced function: its equations in an order in which they can be evaluated."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    equations: tuple[Equation, ...]


def flatten(closed: core.ClosedJaxpr) -> Flat:
    """Returns the equations of a traced function, calls replaced by what they call.

    Args:
      closed: what `jax.make_jaxpr(f)(...)` returns.
    """
    inputs = tuple(Value(variable.aval) for variable in closed.jaxpr.invars)
    equations: list[Equation] = []
    outputs = _inline(closed, inputs, "", equations)
    return Flat(inputs, tuple(outputs), tuple(equations))


def _inline(
    closed: core.ClosedJaxpr, inputs: tuple[Value, ...], scope: str, equations: list[Equation]
) -> list[Value]:
    """Appends the equations of `closed`, whose inputs are these values, and returns its outputs."""
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.invars, inputs, strict=True))
    values |= {v: Value(v.aval, const) for v, const in zip(jaxpr.constvars, closed.consts, strict=True)}

    def read(atom: Any) -> Value:
        return Value(atom.aval, atom.val) if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        taken = tuple(map(read, equation.invars))
        inner = "/".join(filter(None, (scope, str(equation.source_info.name_stack))))
        called = equation.params.get(CALLS.get(equation.primitive.name, ""))
        if called is not None:
            made = _inline(_closed(called), taken, inner, equations)
        else:
            made = [Value(v.aval) for v in equation.outvars]
            params = equation.params
            equations.append(Equation(equation.primitive, taken, tuple(made), params, inner))
        values |= dict(zip(equation.outvars, made, strict=True))
    return list(map(read, jaxpr.outvars))


def _closed(jaxpr: Any) -> core.ClosedJaxpr:
    """Returns a jaxpr with its constants; some calls hold one without, because it has none."""
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


def bodies(equation: Equation) -> Iterator[core.ClosedJaxpr]:
    """Yields the functions among the parameters of an equation, such as the body of a scan."""
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (core.ClosedJaxpr, core.Jaxpr)):
                yield _closed(item)


def scan_arguments(equation: Equation) -> tuple[int, int, int]:
    """Returns how many arguments of a scan are constants, carried, and scanned over, which is their order.

    They follow from the shapes, as parameters of the primitive differ among versions of JAX: what is scanned
    over, or stacked, has an axis more outside than in the body.
    """
    (body,) = bodies(equation)
    inside = [len(variable.aval.shape) for variable in body.jaxpr.invars]
    scanned = sum(len(value.shape) > axes for value, axes in zip(equation.inputs, inside, strict=True))
    made = [len(variable.aval.shape) for variable in body.jaxpr.outvars]
    carried = sum(len(value.shape) == axes for value, axes in zip(equation.outputs, made, strict=True))
    return len(inside) - carried - scanned, carried, scanned
