"""A network as a graph: the equations that depend on its input, each with the path of the module it is of.

    network -> jaxpr with a symbolic batch -> flat list of equations -> what depends on the input

What depends on parameters alone is computed here. Fake quantization is not, as it says which whole numbers a
file is to hold.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import export

from repopt_jax.core import jaxprs
from repopt_jax.core.jaxprs import Equation, Value
from repopt_jax.export.function import any_batch_size
from repopt_jax.nn.convolution import xla_convolutions
from repopt_jax.nn.geometry import ChangedOperands
from repopt_jax.surgery.modules import intercepted, named_modules

# Stands for the batch size in shapes, so that sizes are whole numbers: those that depend on the batch are its
# multiples, and, as it is a prime that no network has as a size, only those.
BATCH = 2**31 - 1
FAKE_QUANTIZE = "repopt_fake_quantize"
DTYPES = ("float32", "int32", "int64", "uint8", "int8", "bool")


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """The equations of a network.

    Attributes:
      inputs: one value, the images.
      outputs: name -> value.
      equations: in an order in which they can be evaluated; those that no output needs are left out.
      constants: the arrays of the values that are known.
      batch: the symbolic dimension of the batch.
      classes: path of each module -> name of its class.
    """

    inputs: tuple[Value, ...]
    outputs: Mapping[str, Value]
    equations: tuple[Equation, ...]
    constants: Mapping[Value, np.ndarray]
    batch: Any
    classes: Mapping[str, str]

    def sizes(self, shape: tuple[Any, ...]) -> tuple[int, ...]:
        """Returns a shape as whole numbers, `BATCH` for the batch size.

        Raises:
          Unsupported: a size that is no multiple of the batch size and depends on it.
        """
        return tuple(_size(n, self.batch) for n in shape)

    def place(self, equation: Equation) -> str:
        """Returns the path and class of the module that an equation is of, for people."""
        path = path_of(equation)
        return f"{path or 'the network itself'} ({self.classes.get(path, 'function')})"


class Unsupported(ValueError):
    """Why an equation has no form in a file."""


def trace(
    model: nnx.Module,
    function: Callable[[nnx.Module], Callable[[jax.Array], dict[str, jax.Array]]],
    shape: tuple[int, ...],
    dtype: Any,
) -> Graph:
    """Traces a network with a symbolic batch.

    Args:
      model: plain and in evaluation mode; not changed.
      function: model -> the function that is traced, from an array to arrays by name.
      shape: of the input, without the batch.
      dtype: of the input.

    Raises:
      ValueError: the network takes the batch size as a number.
    """
    definition, state = nnx.split(with_scopes(model))
    names = []
    (batch,) = export.symbolic_shape("batch")

    def traced(images: jax.Array) -> list[jax.Array]:
        # Transformations of Flax take modules of this trace alone.
        outputs = function(nnx.merge(definition, state, copy=True))(images)
        names[:] = list(outputs)
        return list(outputs.values())

    with xla_convolutions(), any_batch_size():
        closed = jax.make_jaxpr(traced)(jax.ShapeDtypeStruct((batch, *shape), dtype))
    flat = jaxprs.flatten(closed)
    equations, constants = folded(flat, flat.outputs)
    classes = {path: type(module).__name__ for path, module in named_modules(model)}
    return Graph(
        flat.inputs, dict(zip(names, flat.outputs, strict=True)), equations, constants, batch, classes
    )


def folded(
    flat: jaxprs.Flat, outputs: tuple[Value, ...]
) -> tuple[tuple[Equation, ...], dict[Value, np.ndarray]]:
    """Returns the equations that the input reaches and that the outputs need, and the known values."""
    constants: dict[Value, np.ndarray] = {}
    left = []
    for equation in map(_without_empty, flat.equations):
        for value in equation.inputs:
            if value.constant is not None and value not in constants:
                constants[value] = np.asarray(value.constant, value.aval.dtype)
        symbolic = any(map(export.is_symbolic_dim, _sizes_in(equation)))
        known = all(value in constants for value in equation.inputs)
        if not known or symbolic or equation.name == FAKE_QUANTIZE:
            left.append(equation)
            continue
        results = equation.primitive.bind(*(constants[v] for v in equation.inputs), **equation.params)
        results = results if equation.primitive.multiple_results else [results]
        constants |= {v: np.asarray(r) for v, r in zip(equation.outputs, results, strict=True)}
    constants |= {v: np.asarray(v.constant, v.aval.dtype) for v in outputs if v.constant is not None}
    needed, kept = set(outputs), []
    for equation in reversed(left):
        if needed.intersection(equation.outputs):
            kept.append(equation)
            needed.update(equation.inputs)
    return tuple(reversed(kept)), constants


def _without_empty(equation: Equation) -> Equation:
    """A concatenation without the operands that have no entries, as `jnp.pad` of "edge" makes them of an axis
    that is not padded. They may be cut from the batch, which has no form in a file."""
    if equation.name != "concatenate":
        return equation
    axis = equation.params["dimension"]
    inputs = tuple(v for v in equation.inputs if export.is_symbolic_dim(v.shape[axis]) or v.shape[axis] != 0)
    return dataclasses.replace(equation, inputs=inputs or equation.inputs)


def _sizes_in(equation: Equation) -> list[Any]:
    """What may be a symbolic size: of the outputs, and single parameters."""
    return [*(n for value in equation.outputs for n in value.shape), *equation.params.values()]


def _size(size: Any, batch: Any) -> int:
    if not export.is_symbolic_dim(size):
        return int(size)
    times = size // batch
    if export.is_symbolic_dim(times) or times * batch != size:
        raise Unsupported(f"has the size {size}, which is no multiple of the batch size")
    return int(times) * BATCH


# -- scopes


def with_scopes(model: nnx.Module) -> nnx.Module:
    """Returns a copy of `model` each of whose modules computes in a `jax.named_scope` of its own path.

    What stands in the place of a layer's function, such as a quantizer, counts as the layer.
    """
    return intercepted(model, _in_scope, lambda path, module: not isinstance(module, ChangedOperands))


def _in_scope(path: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with jax.named_scope(f"<{path}>"):
        return call(*args, **options)


def path_of(equation: Equation) -> str:
    """Returns the path of the module that an equation is of."""
    scopes = re.findall(r"<([^<>]*)>", equation.scope)
    return scopes[-1] if scopes else ""
