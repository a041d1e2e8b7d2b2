"""How much a network computes: the multiplications of its convolutions and products, from its trace."""

import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.extend import core

from repopt_jax.arguments import check_kind
from repopt_jax.core.jaxprs import CONVOLUTIONS

# Programs inside an equation that run once.
_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr", "cond_jaxpr", "body_jaxpr")


def count_macs(model: Callable[..., Any], *inputs: Any) -> int:
    """Returns the multiply-accumulates of `model(*inputs)` in convolutions and products of matrices.

        count_macs(model, jax.ShapeDtypeStruct((1, 224, 224, 3), "float32"))  # of one image

    It is what publications call FLOPs: batch norms, activations and biases are not counted, and products with
    the zeros of padding are. Nothing is computed: the program is traced. Of a loop whose length is not known
    one round is counted, of alternatives the most expensive one.

    Args:
      model: an NNX model in evaluation mode, or a function of arrays.
      inputs: arrays or `jax.ShapeDtypeStruct`s.
    """
    check_kind("model", model, Callable, "a model or a function")
    if isinstance(model, nnx.Module):
        graphdef, state = nnx.split(model)

        def function(state: Any, *inputs: Any) -> Any:
            return nnx.merge(graphdef, state, copy=True)(*inputs)

        inputs = (state, *inputs)
    else:
        function = model
    return _of_program(jax.make_jaxpr(function)(*inputs).jaxpr)


def _of_program(program: Any) -> int:
    program = program.jaxpr if isinstance(program, core.ClosedJaxpr) else program
    return sum(map(_of_equation, program.eqns))


def _of_equation(equation: Any) -> int:
    params, name = equation.params, equation.primitive.name

    def shape(variable: Any) -> tuple[int, ...]:
        return variable.aval.shape

    if name in CONVOLUTIONS:
        kernel, outputs = shape(equation.invars[1]), params["dimension_numbers"].rhs_spec[0]
        return math.prod(shape(equation.outvars[0])) * math.prod(kernel) // kernel[outputs]
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = shape(equation.invars[0])
        return math.prod(shape(equation.outvars[0])) * math.prod(left[axis] for axis in contracted)
    if name == "cond":
        return max(map(_of_program, params["branches"]))
    inside = sum(_of_program(params[key]) for key in _CALLS if key in params)
    return inside * params.get("length", 1) if name == "scan" else inside
