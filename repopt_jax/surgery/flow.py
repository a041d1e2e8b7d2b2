"""Which batch norm reads which layer's output, and nothing else does: by the flow of data, not by names.

The model is traced once, with a mark on the output of every layer and on the input of every batch norm. A
batch norm belongs to a layer if it is the only one to read the layer's output, at each use, and reads nothing
else. In pre-activation networks a norm may come after a sum or a concatenation: it belongs to no layer.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from repopt_jax.core.jaxprs import Flat, Value, bodies, flatten
from repopt_jax.core.tracing import PASSED
from repopt_jax.surgery.modules import intercepted

Example: TypeAlias = Sequence[Any] | Callable[[Any], Any] | None

_OUT, _IN = "output of ", "input of "


def norms_of_layers(
    model: nnx.Module, example: Example, layers: Sequence[str], norms: Sequence[str]
) -> dict[str, str]:
    """Returns the batch norm that alone reads a layer's output, by the layer's path.

    Args:
      model: the model, which is not changed. It is traced in evaluation mode.
      example: what it is called with, a tuple of arrays or `jax.ShapeDtypeStruct`s; or a function that calls
        a model, such as `lambda model: model(x, train=False)`.
      layers, norms: paths of modules of one array that return one array.

    Raises:
      TypeError: `example` is neither.
    """
    if not callable(example) and not isinstance(example, (tuple, list)):
        raise TypeError(
            f"`example` is a {type(example).__name__}: it must be a tuple of what the model is called with, "
            "such as (images,), or a function that calls a model"
        )
    marked = intercepted(model, _mark_output, lambda path, module: path in layers)
    marked = intercepted(marked, _mark_input, lambda path, module: path in norms)
    marked.eval()
    graph, state = nnx.split(marked)

    def run(state: Any, inputs: Sequence[Any]) -> Any:
        one = nnx.merge(graph, state, copy=True)
        return example(one) if callable(example) else one(*inputs)

    inputs = () if callable(example) else tuple(example)
    reads = list(_reads(flatten(jax.make_jaxpr(run)(state, inputs))))
    readers: dict[str, list[str]] = {}
    sources: dict[str, list[str]] = {}
    for source, reader in reads:
        readers.setdefault(source, []).append(reader)
        sources.setdefault(reader, []).append(source)
    found = {}
    for layer in layers:
        taken = readers.get(_OUT + layer, [])
        norm = taken[0] if taken else ""
        alone = norm.startswith(_IN) and set(taken) == {norm}
        if alone and set(sources[norm]) == {_OUT + layer}:
            found[layer] = norm.removeprefix(_IN)
    return found


def _reads(flat: Flat) -> Iterator[tuple[str, str]]:
    """Yields (marked output or "", marked input or "") for every reader of a mark, in all bodies.

    An output is read by a marked input or by something else, ""; a marked input reads an output or "".
    """
    known: dict[Value, str] = {}
    for equation in flat.equations:
        label = str(equation.params.get("name", "")) if equation.name == "name" else ""
        source = known.get(equation.inputs[0], "") if equation.inputs else ""
        if label.startswith(_OUT):
            known[equation.outputs[0]] = label
        elif label.startswith(_IN):
            yield source, label
        elif equation.name in PASSED and len(equation.inputs) == 1:
            known[equation.outputs[0]] = source
        else:
            yield from ((known[value], "") for value in equation.inputs if known.get(value))
            for body in bodies(equation):
                yield from _reads(flatten(body))
    yield from ((known[value], "") for value in flat.outputs if known.get(value))


def _mark_output(path: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return checkpoint_name(call(*args, **options), _OUT + path)


def _mark_input(path: str, call: Callable[..., Any], x: Any, *args: Any, **options: Any) -> Any:
    return call(checkpoint_name(x, _IN + path), *args, **options)
