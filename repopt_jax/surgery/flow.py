"""Which batch norms and layers come together, and with nothing else, and in which order layers are called: by
the flow of data, not by names.

The model is traced once, with a mark on the input and the output of every layer and every batch norm. Two of
them come together if the second is the only one to read the first one's output, at each use, and reads
nothing else. In pre-activation networks a norm may come after a sum or a concatenation: it belongs to no
layer before it, but perhaps to the one after it.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from repopt_jax.core.jaxprs import Flat, Value, bodies, flatten
from repopt_jax.core.tracing import PASSED
from repopt_jax.surgery.modules import intercepted

Example: TypeAlias = Sequence[Any] | Callable[[Any], Any] | None

_OUT, _IN = "output of ", "input of "


class Neighbours(NamedTuple):
    """The batch norms that come together with a layer, by the layer's path.

    Attributes:
      after: the norm that alone reads the layer's output, and reads nothing else.
      before: the norm whose output the layer alone reads, and which reads nothing else.
    """

    after: dict[str, str]
    before: dict[str, str]


def norms_of_layers(
    model: nnx.Module, example: Example, layers: Sequence[str], norms: Sequence[str]
) -> Neighbours:
    """Returns the batch norms after and before layers.

    Args:
      model: the model, which is not changed. It is traced in evaluation mode.
      example: what it is called with, a tuple of arrays or `jax.ShapeDtypeStruct`s; or a function that calls
        a model, such as `lambda model: model(x, train=False)`.
      layers, norms: paths of modules of one array that return one array.

    Raises:
      TypeError: `example` is neither.
    """
    reads = list(_reads(_traced(model, example, {*layers, *norms})))
    readers: dict[str, list[str]] = {}
    sources: dict[str, list[str]] = {}
    for source, reader in reads:
        readers.setdefault(source, []).append(reader)
        sources.setdefault(reader, []).append(source)

    def next_of(path: str) -> str:
        """Returns the path of what alone reads this output, and reads nothing else; "" if nothing does."""
        taken = readers.get(_OUT + path, [])
        reader = taken[0] if taken else ""
        alone = reader.startswith(_IN) and set(taken) == {reader}
        return reader.removeprefix(_IN) if alone and set(sources[reader]) == {_OUT + path} else ""

    after = {layer: next_of(layer) for layer in layers}
    before = {next_of(norm): norm for norm in norms}
    return Neighbours(
        {layer: norm for layer, norm in after.items() if norm in norms},
        {layer: norm for layer, norm in before.items() if layer in layers},
    )


def order_of_calls(model: nnx.Module, example: Example, layers: Sequence[str]) -> list[str]:
    """Returns the paths of those layers that the model calls, in the order of their first calls.

    Args:
      model, example, layers: as in `norms_of_layers`.

    Raises:
      TypeError: as `norms_of_layers`.
    """
    return list(dict.fromkeys(p.removeprefix(_OUT) for p in _outputs(_traced(model, example, set(layers)))))


def _outputs(flat: Flat) -> Iterator[str]:
    """Yields the marks of outputs, in the order of the equations, in all bodies."""
    for equation in flat.equations:
        label = str(equation.params.get("name", "")) if equation.name == "name" else ""
        if label.startswith(_OUT):
            yield label
        for body in bodies(equation):
            yield from _outputs(flatten(body))


def _traced(model: nnx.Module, example: Example, known: Container[str]) -> Flat:
    """Returns the model's program in evaluation mode, with marks at the modules of the paths `known`."""
    if not callable(example) and not isinstance(example, (tuple, list)):
        raise TypeError(
            f"`example` is a {type(example).__name__}: it must be a tuple of what the model is called with, "
            "such as (images,), or a function that calls a model"
        )
    marked = intercepted(model, _mark, lambda path, module: path in known)
    marked.eval()
    graph, state = nnx.split(marked)

    def run(state: Any, inputs: Sequence[Any]) -> Any:
        one = nnx.merge(graph, state, copy=True)
        return example(one) if callable(example) else one(*inputs)

    return flatten(jax.make_jaxpr(run)(state, () if callable(example) else tuple(example)))


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


def _mark(path: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    if args:  # an input by keyword has no mark, and counts as none that was read alone
        args = (checkpoint_name(args[0], _IN + path), *args[1:])
    return checkpoint_name(call(*args, **options), _OUT + path)
